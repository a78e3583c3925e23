"""A Prometheus with the series of the week: they are written by remote write, and read by `query_range`.

Remote write, since series of a file have no staleness markers: an absent series would seem to exist for five minutes.
"""

import struct
import subprocess
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from defib.demo.stack import reserve_ports

Labels = tuple[tuple[str, str], ...]  # sorted, with __name__
STALE = struct.unpack("<d", (0x7FF0000000000002).to_bytes(8, "little"))[0]
BATCH = 16_000_000  # bytes of one request
SAMPLE = 18  # bytes of an encoded sample


def as_labels(name: str, labels: Mapping[str, str]) -> Labels:
    return tuple(sorted({"__name__": name, **labels}.items()))


class Store:
    """Prometheus at `client`."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._pending: list[bytes] = []
        self._size = 0
        self.samples = 0

    def add(self, labels: Labels, times: Sequence[int], values: Sequence[float]) -> None:
        """Add a series; `times` are Unix seconds. Sent in batches: `flush` sends the last one."""
        if not times:
            return
        encoded = _encode_series(labels, tuple(times), values)
        self._pending.append(encoded)
        self._size += len(encoded)
        self.samples += len(times)
        if self._size > BATCH:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        body = b"".join(self._pending)
        self._pending, self._size = [], 0
        headers = {
            "Content-Encoding": "snappy",
            "Content-Type": "application/x-protobuf",
            "X-Prometheus-Remote-Write-Version": "0.1.0",
        }
        response = self._client.post("/api/v1/write", content=_frame(body), headers=headers)
        assert response.is_success, response.text

    def query_range(self, expression: str, start: int, end: int, step: int) -> Iterator[tuple[dict[str, str], Any]]:
        """Yield the labels and the points (time, value) of each series."""
        asked = {"query": expression, "start": str(start), "end": str(end), "step": str(step)}
        response = self._client.post("/api/v1/query_range", data=asked)
        assert response.is_success, f"{expression}: {response.text}"
        for series in response.json()["data"]["result"]:
            yield series["metric"], series["values"]


@contextmanager
def running_prometheus(folder: Path) -> Iterator[Store]:
    """Run a Prometheus that keeps all samples in memory, so that series can be added in any order."""
    (folder / "prometheus.yml").write_text("{}")
    (port,) = reserve_ports(1)
    prometheus = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--storage.tsdb.retention.time=100y",
            "--storage.tsdb.min-block-duration=60d",
            "--storage.tsdb.max-block-duration=60d",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-remote-write-receiver",
            "--query.max-samples=1000000000",
            "--query.timeout=10m",
            "--log.level=error",
        ]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            _wait_until_ready(client)
            yield Store(client)
    finally:
        prometheus.terminate()
        prometheus.wait()


def _wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if client.get("/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError("Prometheus does not become ready")


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _field(number: int, content: bytes) -> bytes:
    """Encode a field of protobuf that has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _encode_series(labels: Labels, times: tuple[int, ...], values: Sequence[float]) -> bytes:
    """Encode a TimeSeries of Prometheus' remote write 1.0, as a field of its WriteRequest."""
    encoded = bytearray(_empty_samples(times))
    numbers = array("d", values).tobytes()
    for index in range(8):
        encoded[3 + index :: SAMPLE] = numbers[index::8]
    named = b"".join(_field(1, _field(1, name.encode()) + _field(2, text.encode())) for name, text in labels)
    return _field(1, named + bytes(encoded))


@lru_cache(maxsize=64)
def _empty_samples(times: tuple[int, ...]) -> bytes:
    """Encode samples with the value 0."""
    head, value = bytes([0x12, SAMPLE - 2, 0x09]), bytes(8)
    return b"".join(head + value + b"\x10" + _varint(at * 1000) for at in times)


def _frame(content: bytes) -> bytes:
    """Return the content in snappy's block format, uncompressed."""
    return _varint(len(content)) + b"\xfc" + (len(content) - 1).to_bytes(4, "little") + content


def with_markers(
    times: Sequence[int], values: Iterable[float | None], seen: Sequence[bool]
) -> tuple[list[int], list[float]]:
    """Return the samples of a series, with a staleness marker where it ends.

    `values` has one for each time, or None; `seen` is whether Prometheus scraped or evaluated at that time.
    """
    kept, found = [], []
    is_present = False
    for at, value, is_seen in zip(times, values, seen, strict=True):
        if value is not None:
            kept.append(at)
            found.append(value)
            is_present = True
        elif is_present and is_seen:
            kept.append(at)
            found.append(STALE)
            is_present = False
    return kept, found
