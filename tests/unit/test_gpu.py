"""How nvidia-smi's answers read; the wording of the faults is that of broken drivers and cards."""

import pytest

from fleet.host import gpu
from fleet.host.gpu import GpuQueryResult

BASIC = ["index", "uuid", "temperature", "utilization", "name"]


@pytest.mark.parametrize(
    ("output", "cards", "lost", "said"),
    [
        ("0, GPU-1, 40, 7, NVIDIA A100, with a comma\n", [{"index": "0", "uuid": "GPU-1", "temperature": "40", "utilization": "7", "name": "NVIDIA A100, with a comma"}], [], ""),
        ("0, GPU-1, [N/A], [Not Supported], X\n", [{"index": "0", "uuid": "GPU-1", "name": "X"}], [], ""),
        ("Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover this GPU\n", [], [("00000000:02:00.0", "")], "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot the system to recover this GPU"),
        ("Unable to determine the device handle for GPU0000:07:00.0: Unknown Error\n", [], [("00000000:07:00.0", "")], "Unable to determine the device handle for GPU0000:07:00.0: Unknown Error"),
        ("Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error\n0, GPU-1, 40, 7, X\n", [{"index": "0", "uuid": "GPU-1", "temperature": "40", "utilization": "7", "name": "X"}], [("00000000:34:00.0", "1")], "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error"),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.144\n", [], [], "Failed to initialize NVML: Driver/library version mismatch NVML library version: 550.144"),
        ("No devices were found\n", [], [], "No devices were found"),
        ("", [], [], ""),
    ],
)  # fmt: skip
def test_rows_and_what_stands_between_them(
    output: str, cards: list[dict[str, str]], lost: list[tuple[str, str]], said: str
) -> None:
    found = gpu.parse_query(output, BASIC)
    assert ([dict(card.values) for card in found.gpus], found.lost, found.messages) == (cards, lost, said)
    assert not any(card.faults for card in found.gpus)


def test_faults_are_not_absences() -> None:
    found: GpuQueryResult = gpu.parse_query(
        "0, GPU-1, [GPU requires reset], [Unknown Error], X\n1, GPU-2, 43, 95, X\n", BASIC
    )
    assert [card.faults for card in found.gpus] == [("temperature", "utilization"), ()]
    assert (found.gpus[0].number("temperature"), found.gpus[1].number("temperature")) == (None, 43.0)


def test_fields_are_asked_for_by_the_names_that_the_driver_has() -> None:
    help_text = '"index"\nGPU index.\n"name" or "gpu_name"\n"clocks_throttle_reasons.hw_slowdown"\n"power.draw"\n"nothing.of.ours"\n'
    assert gpu.map_fields_to_driver_names(help_text) == {
        "index": "index", "power": "power.draw", "throttle_hw_slowdown": "clocks_throttle_reasons.hw_slowdown",
        "name": "name",
    }  # fmt: skip
    newer = help_text.replace("throttle_reasons", "event_reasons") + '"power.draw.instant"\n'
    assert gpu.map_fields_to_driver_names(newer)["throttle_hw_slowdown"] == "clocks_event_reasons.hw_slowdown"
    assert gpu.map_fields_to_driver_names(newer)["power"] == "power.draw"
    assert gpu.map_fields_to_driver_names(newer)["power_instant"] == "power.draw.instant"


def test_memory_by_container() -> None:
    one, two, three = ("ab12" * 16, "cd34" * 16, "ef56" * 16)
    output = (
        "app GPU-1, 10, 100, /usr/bin/python, with commas\n"
        "app GPU-1, 11, 50, vllm\n"
        "app GPU-1, 12, 7, x\n"
        "app GPU-2, 13, [N/A], y\n"
        "app GPU-1, [Insufficient Permissions], [Insufficient Permissions], [Insufficient Permissions]\n"
        "app GPU-1, 14, 3, on the host\n"
        f"cgroup 10 0::/system.slice/docker-{one}.scope\n"
        f"cgroup 11 12:devices:/docker/{two}\n"
        f"cgroup 12 0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{three}.scope\n"
        "cgroup 14 0::/user.slice/user-0.slice/session-1.scope\n"
        f"container {one} vllm-a\n"
        f"container {two} mineru\n"
    )
    mib = 2.0**20
    assert gpu.parse_memory_by_gpu_and_container(output) == {
        "GPU-1": {"vllm-a": 100 * mib, "mineru": 50 * mib, "ef56ef56ef56": 7 * mib, "host": 3 * mib}
    }


def test_xids_and_when_they_were_seen_last() -> None:
    output = (
        "btime 1000\n"
        "[  100.500000] NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[  200.500000] NVRM: Xid (0000:03:00): 14, Channel 00000001\n"
        "[  300.000000] NVRM: Xid (PCI:0000:05:00): 79, pid=1896, again\n"
        "[  400.000000] NVRM: something else\n"
        "[  500.000000] NVRM: Xid (PCI:0000:07:00 GPU-I:05): 94, pid=1896, of a MIG instance\n"
    )
    assert gpu.parse_last_xid_times(output) == {
        ("00000000:05:00", "79"): 1300.0, ("00000000:03:00", "14"): 1200.5, ("00000000:07:00", "94"): 1500.0,
    }  # fmt: skip
    assert (gpu.parse_boot_time(output), gpu.parse_boot_time("")) == (1000.0, 0.0)


def test_instances() -> None:
    output = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-1)\n"
        "  MIG 1g.10gb     Device  1: (UUID: MIG-2)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)\n"
    )
    assert gpu.parse_instances(output) == {"GPU-1": ["3g.40gb 0", "1g.10gb 1"]}
