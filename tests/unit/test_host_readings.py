"""What hosts print, in any form: parsers raise nothing but what they document."""

import contextlib
from collections.abc import Callable
from dataclasses import astuple, is_dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.host import files, gpu, kernel, logs, ports, system
from fleet.managers import docker, supervisor, systemd

SOURCES = ["app", "/var/log/a"]
PATHS = ["/var/backups/*.dump", "/var/backups/db.dump"]


def finish_all(output: str) -> object:
    sources = logs.parse_sources(output, SOURCES)
    for source in sources.values():
        for before in (logs.NEW, "1.5", "", source.position):
            logs.finish_container(source, before)
    return sources


def find_all(output: str) -> object:
    return [listing.find_newest(path) for listing in files.parse_listings(output).values() for path in PATHS]


def parse_gpus(output: str) -> object:
    found = gpu.parse_query(output, ["index", "uuid", "memory_total", "name"]).gpus
    return [each.number(name) for each in found for name in ("index", "memory_total")]


PARSERS: dict[str, tuple[Callable[[str], object], type[Exception] | None]] = {
    "machine": (system.parse_machine, ValueError),
    "kernel": (kernel.parse_kernel, None),
    "filesystems": (system.parse_filesystems, None),
    "files": (find_all, None),
    "logs": (finish_all, None),
    "ports": (ports.parse_listening_ports, None),
    "gpus": (parse_gpus, None),
    "gpu instances": (gpu.parse_instances, None),
    "gpu memory": (gpu.parse_memory_by_gpu_and_container, None),
    "boot": (gpu.parse_boot_time, None),
    "xids": (gpu.parse_last_xid_times, None),
    "containers": (docker.parse_containers, None),
    "usage": (docker.parse_usage, None),
    "container": (docker.parse_details, None),
    "properties": (systemd.parse_properties, None),
    "uptime": (systemd.parse_uptime, None),
    "supervisor": (supervisor.parse_uptime, None),
}
NUMBERS = [
    "0", "1", "-1", "--5", "²", "٣", "9" * 20, "9" * 21, "9" * 400, "9" * 5000, "nan", "inf", "1e999", "1.5", "0x1", "%", "-", "",
]  # fmt: skip
# Lines of good outputs, # in place of each number.
GOOD = [
    "cpu # # #", "cpu0 #", "load # # #", "btime #", "now #.#", "MemTotal: # kB", "MemFree: # kB", "SwapTotal: # kB", "oom_kill #",
    "files # # #", "conntrack # #", "clock #", "pswpin #", "net eth0 # # # #", "traffic eth0 # # # #", "disk sda #",
    "io sda # # # # #", "raid md0 #", "pressure cpu/some #", "local 1 /dev/sda ext4 /", "sizes 1 # # # # #", "row 1 /dev/sda # # # 5% /",
    "files 1 /dev/sda # # # 5% /", "failed 1 Permission denied", "more #", "mount /dev/sda ext4 /", "/dev/sda # # # 5% /",
    "!now #", "!path /var/backups/", "!path /var/backups/db.dump", "+# # /var/backups/db.dump", "!count #", "!end", "!source app",
    "!position #.#", "!code 200 #", "!skipped # lines", "+2026-12-01T00:00:00.#Z text", "+9999-12-31T23:59:59.999999999Z text",
    "+0001-01-01T00:00:00+23:59 text", "+!failed", "sl: 00:#", "#, GPU-1, #, name", "GPU 0: name (UUID: GPU-1)", " MIG 1g.10gb Device #:",
    "app GPU-1, #, #", "zone", "zone ", "zone +#", "zone +0530", "[#.#] NVRM: Xid (PCI:0000:3b:00): #, x",
    "[Tue Dec  1 15:00:39 #] NVRM: Xid (PCI:0000:3b:00): 79, x", "listed|i|name|running|image|Exited (#) 2 hours ago",
    "/name|running|-|#|2026-12-01|#|image|always", "used|id|nanoseconds|#|#|#|#", "# days, #:02:03", "#:02:03", "#.# #",
    "running - # # false 2026-12-01 2026-12-02 - # id /name no",
]  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> str:
    """Return lines of good outputs with all sorts of numbers in them, some without an end."""
    line = draw(st.sampled_from(GOOD))
    while "#" in line:
        line = line.replace("#", draw(st.sampled_from(NUMBERS)), 1)
    return line[: draw(st.just(len(line)) | st.integers(0, len(line)))]


OUTPUTS = st.lists(lines() | st.text(max_size=20), min_size=10, max_size=40).map("\n".join)


def check_numbers(value: Any) -> None:
    """Metrics are floats."""
    if isinstance(value, int):
        float(value)
    elif is_dataclass(value) and not isinstance(value, type):
        check_numbers(astuple(value))
    elif isinstance(value, dict):
        check_numbers(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for each in value:
            check_numbers(each)


@pytest.mark.parametrize("name", PARSERS)
@given(output=OUTPUTS | st.text())
def test_any_output_is_parsed(name: str, output: str) -> None:
    parse, documented = PARSERS[name]
    with contextlib.suppress(*([documented] if documented else [])):
        check_numbers(parse(output))


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("number", NUMBERS)
def test_each_line_may_have_any_number(name: str, number: str) -> None:
    parse, documented = PARSERS[name]
    for bad in GOOD:
        output = "\n".join(line.replace("#", number if line == bad else "5") for line in GOOD)
        with contextlib.suppress(*([documented] if documented else [])):
            check_numbers(parse(output))


@pytest.mark.parametrize("number", ["9" * 21, "9" * 400, "9" * 5000, "²", "٣", "-1", "1.5"])
def test_lines_with_other_numbers_are_ignored(number: str) -> None:
    good = kernel.parse_kernel("oom_kill 18446744073709551615\npressure cpu/some 5")
    assert (good.oom_kills, good.pressure) == (2**64 - 1, {("cpu", "some"): 5e-6})
    bad = kernel.parse_kernel(
        f"oom_kill {number}\npressure cpu/some {number}\ndisk sda {number}\nio sda 1 2 3 4 {number}"
    )
    assert bad == kernel.Kernel()
    machine = f"cpu 1 2\nMemTotal: {number} kB\nMemFree: 1 kB\nload 1 1 1\nbtime 5"
    with pytest.raises(ValueError, match="is not a number"):
        system.parse_machine(machine)
    system.parse_machine(machine.replace(number, "5"))


def test_files_beyond_the_limit_of_a_folder_are_an_error() -> None:
    def list_files(number: int) -> files.FileListing:
        lines = [f"+{each} 1 /b/{each}" for each in range(number)]
        return files.parse_listings("\n".join(["!now 5", "!path /b/", *lines, f"!count {number}", "!end"]))["/b/"]

    full, more = list_files(files.FILES_LIMIT), list_files(50_000)
    assert (len(full.files), full.error) == (files.FILES_LIMIT, "")
    assert (len(more.files), more.error) == (files.FILES_LIMIT, "more than 1000 files were listed")
