import pytest

from fleet.host import kernel, system

PROC = """now 1700000000.250000000
cpu  100 10 50 800 40 0 0 0 0 0
cpu0 50 5 25 400 20 0 0 0 0 0
cpu1 50 5 25 400 20 0 0 0 0 0
btime 1690000000
load 0.50 1.25 2.00 1/234 5678
MemTotal:       1000 kB
MemFree:         100 kB
Buffers:          50 kB
Cached:          200 kB
"""


def test_proc() -> None:
    found = system.parse_machine(f"a banner\n{PROC}")
    assert (found.cpus, found.busy, found.total, found.load) == (2, 160, 1000, (0.5, 1.25, 2.0))
    assert (found.now, found.booted) == ((1700000000.25, 1700000000.25), 1690000000.0)
    assert (found.memory_total, found.memory_available) == (1000 * 1024, 350 * 1024)
    newer = system.parse_machine(f"{PROC}MemAvailable:    400 kB\n")
    assert newer.memory_available == 400 * 1024


@pytest.mark.parametrize(
    ("now", "between"), [("now 17", (17, 18)), ("now 17.%N", (17, 18)), ("now", None), ("now x", None)]
)
def test_clocks_without_nanoseconds(now: str, between: tuple[float, float] | None) -> None:
    assert system.parse_machine(PROC.replace("now 1700000000.250000000", now)).now == between


@pytest.mark.parametrize("gone", ["MemTotal", "btime", "load", "cpu "])
def test_what_is_missing_is_named(gone: str) -> None:
    text = "".join(line for line in PROC.splitlines(keepends=True) if not line.startswith(gone))
    with pytest.raises(ValueError, match="/proc has no"):
        system.parse_machine(text)


def test_filesystems() -> None:
    output = (
        "mount /dev/sda1 ext4 /\n"
        "/dev/sda1  1000 600 300 67% /\n"
        "/dev/sda1  5000 1000 4000 20% /\n"
        "mount /dev/sdb1 btrfs /with a blank\n"
        "/dev/sdb1 2000 1 1999 1% /with a blank\n"
        "/dev/sdb1 0 0 0 - /with a blank\n"
        "mount /dev/sdc1 xfs /gone\n"
    )
    assert system.parse_filesystems(output) == [
        system.Filesystem("/dev/sda1", "ext4", "/", 1000 * 1024, 300 * 1024, 5000, 4000),
        system.Filesystem("/dev/sdb1", "btrfs", "/with a blank", 2000 * 1024, 1999 * 1024),
    ]


def test_what_the_kernel_counts() -> None:
    found = kernel.parse_kernel(
        f"{PROC}oom_kill 3\nfiles 1024 0 9223372036854775807\nconntrack 10 262144\nnet eth0 100 200 1 2\n"
        "disk sda 1500\nraid md0 1\nclock 0\n"
    )
    assert (found.oom_kills, found.files, found.connections) == (3, (1024, 2**63 - 1), (10, 262144))
    assert found.network == [
        kernel.NetworkCounts("eth0", "receive", 100, 1),
        kernel.NetworkCounts("eth0", "transmit", 200, 2),
    ]
    assert (found.queue_seconds, found.missing_disks, found.clock_synchronized) == ({"sda": 1.5}, {"md0": 1}, False)
    assert kernel.parse_kernel(PROC) == kernel.Kernel()  # a wrapper of an earlier version


def test_lines_of_another_form_are_ignored_and_devices_are_limited() -> None:
    hostile = "oom_kill -1\nfiles 1 2\nconntrack\nnet\nnet eth0 1 2 x 4\ndisk sda \u0661\nraid md0 1 2\nclock\ncat: no such file\n"
    assert kernel.parse_kernel(hostile) == kernel.Kernel()
    many = "".join(f"disk sd{number} 1\n" for number in range(1000))
    assert len(kernel.parse_kernel(many).queue_seconds) == kernel.DEVICES_LIMIT
