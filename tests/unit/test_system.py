import os
import shutil
import subprocess
from pathlib import Path

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
    assert (found.cpus, found.jiffies, found.load) == (2, (100, 10, 50, 800, 40, 0, 0, 0), (0.5, 1.25, 2.0))
    assert (found.swap_total, found.swap_free) == (None, None)
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


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        ("100 10 50 800 40 0 0 0", "140 10 50 840 60 0 0 0", 0.4),
        ("100 10 50 800 40 0 0 0", "120 10 50 820 20 0 0 0", 0.5),  # iowait went back
        ("100 10 50 800 40 0 0 90", "110 10 50 830 40 0 0 20", 0.25),  # steal went back
        ("100 10 50 800", "110 10 50 830", 0.25),  # an old kernel
        ("100 10 50 800 40 0 0 0", "100 10 50 800 40 0 0 0", None),
    ],
)
def test_cpu_usage_is_a_ratio_even_if_times_go_back(before: str, after: str, ratio: float | None) -> None:
    earlier, later = (
        system.parse_machine(PROC.replace("100 10 50 800 40 0 0 0 0 0", times)) for times in (before, after)
    )
    assert later.usage_since(earlier) == ratio


def test_filesystems_of_an_earlier_wrapper() -> None:
    output = (
        "mount /dev/sda1 ext4 /\n"
        "/dev/sda1  1000 600 300 67% /\n"
        "/dev/sda1  5000 1000 4000 20% /\n"
        "mount /dev/sdb1 btrfs /with a blank\n"
        "/dev/sdb1 2000 1 1999 1% /with a blank\n"
        "/dev/sdb1 0 0 0 - /with a blank\n"
        "mount /dev/sdc1 xfs /gone\n"
    )
    assert system.parse_filesystems(output).found == [
        system.Filesystem("/dev/sda1", "ext4", "/", 1000 * 1024, 300 * 1024, 5000, 4000),
        system.Filesystem("/dev/sdb1", "btrfs", "/with a blank", 2000 * 1024, 1999 * 1024),
    ]


def test_filesystems() -> None:
    output = (
        "local 8:1 /dev/sda1 ext4 /\nsizes 8:1 4096 1000 300 5000 4000\n"
        "local 0:40 tank/data zfs /with\\040a\\134blank\nsizes 0:40 131072 20 19 0 0\n"
        "local 8:2 /dev/sdb1 fuseblk /ntfs\nrow 8:2 /dev/sdb1 2000 1 1999 1% /ntfs\nfiles 8:2 /dev/sdb1 9 2 7 1% /ntfs\n"
        "local 8:3 /dev/sdc1 xfs /broken\nfailed 8:3 Input/output error\n"
        "local 8:4 /dev/sdd1 xfs /hangs\nlocal 8:5 /dev/sde1 xfs /private\nfailed 8:5 Permission denied\n"
        "local 8:6 /dev/sdf1 ext4 /hanged\nskipped 8:6\nlocal x\nsizes 8:4 1 2 -3 4 5\nmore 7\n"
    )
    filesystems = system.parse_filesystems(output)
    assert filesystems == system.FilesystemList(
        [
            system.Filesystem("/dev/sda1", "ext4", "/", 4096000, 1228800, 5000, 4000, "8:1"),
            system.Filesystem("tank/data", "zfs", "/with a\\blank", 2621440, 2490368, number="0:40"),
            system.Filesystem("/dev/sdb1", "fuseblk", "/ntfs", 2048000, 2046976, 9, 7, "8:2"),
            system.Filesystem("/dev/sdc1", "xfs", "/broken", None, None, number="8:3", error="Input/output error"),
            system.Filesystem("/dev/sdd1", "xfs", "/hangs", None, None, number="8:4"),
            system.Filesystem("/dev/sdf1", "ext4", "/hanged", None, None, number="8:6"),
        ],
        left_out=7,
    )
    assert [each.mountpoint for each in filesystems.found if each.hangs] == ["/hangs", "/hanged"]


MOUNTS = r"""22 27 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw - ext4 /dev/vda rw
30 27 8:1 / {0}/hangs rw shared:1 - ext4 /dev/sda1 rw
31 27 8:2 / {0}/a\040b rw shared:1 master:2 - fuseblk /dev/sdb1 rw
32 27 8:3 / {0}/data/below rw - ext4 /dev/sdc1 rw
33 27 8:4 / {0}/data rw - xfs /dev/sdc2 rw
34 33 8:5 / {0}/data/on rw - btrfs /dev/sdc3 rw
35 27 8:6 / {0}/under rw - ext4 /dev/sdd1 rw
36 35 0:55 / {0}/under rw - nfs4 server:/x rw
37 27 254:0 /sub {0}/bind rw - ext4 /dev/vda rw
38 27 7:0 / {0}/snap rw - ext4 /dev/loop0 rw
39 27 8:7 / {0}/twice rw - ext4 /dev/sde1 rw
40 39 8:8 / {0}/twice rw - zfs tank/home rw
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("has_stat", [True, False])
def test_the_last_filesystem_at_a_place_counts_and_one_that_hangs_costs_only_itself(
    tmp_path: Path, shell: str, has_stat: bool
) -> None:
    for name in ("hangs", "a b", "data/on", "under", "bind", "snap", "twice"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mounts").write_text(MOUNTS.replace("{0}", str(tmp_path)))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("stat", "df"):
        refuse = "exit 1" if name == "stat" and not has_stat else "true"
        hang = (
            f'{refuse}\ncase "$*" in */hangs) exec sleep 30 ;; *"/a b") echo "{name}: an error" >&2; exit 1 ;; esac\n'
        )
        (tools / name).write_text(f'#!/bin/sh\n{hang}exec {shutil.which(name)} "$@"\n')
        (tools / name).chmod(0o755)
    script = system.FILESYSTEMS_SECTION.script.replace("/proc/self/mountinfo", str(tmp_path / "mounts"))
    done = subprocess.run(
        [shell, "-c", script, "sh", "8:5"],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "limit": "2", "LC_ALL": "C"},
        capture_output=True, text=True, check=True, timeout=25,
    )  # fmt: skip
    found = {
        each.mountpoint.removeprefix(str(tmp_path)): each.size is not None or each.error
        for each in system.parse_filesystems(done.stdout).found
    }
    assert found == {"/": True, "/hangs": "", "/a b": "an error", "/data": True, "/data/on": "", "/twice": True}


def test_what_the_kernel_counts() -> None:
    found = kernel.parse_kernel(
        f"{PROC}oom_kill 3\nfiles 1024 0 9223372036854775807\nconntrack 10 262144\nnet eth0 100 200 1 2\n"
        "disk sda 1500\nraid md0 1\nclock 0\ntraffic eth0 1000 2000 3 4\nio sda 5 6 7 8 900\npswpin 11\npswpout 12\n"
        "pressure cpu/some 2500000\npressure io/full 0\npressure irq/full 1\npressure cpu/SOME 1\n"
    )
    assert (found.oom_kills, found.files, found.connections) == (3, (1024, 2**63 - 1), (10, 262144))
    assert found.network == [
        kernel.NetworkCounts("eth0", "receive", 100, 1),
        kernel.NetworkCounts("eth0", "transmit", 200, 2),
    ]
    assert found.traffic == [
        kernel.TrafficCounts("eth0", "receive", 1000, 3),
        kernel.TrafficCounts("eth0", "transmit", 2000, 4),
    ]
    assert found.disks == [kernel.DiskCounts("sda", "read", 5, 7 * 512), kernel.DiskCounts("sda", "write", 6, 8 * 512)]
    assert (found.busy_seconds, found.swapped_pages) == ({"sda": 0.9}, {"in": 11, "out": 12})
    assert found.pressure == {("cpu", "some"): 2.5, ("io", "full"): 0.0}
    assert (found.queue_seconds, found.missing_disks, found.clock_synchronized) == ({"sda": 1.5}, {"md0": 1}, False)
    assert kernel.parse_kernel(PROC) == kernel.Kernel()  # a wrapper of an earlier version


def test_lines_of_another_form_are_ignored_and_devices_are_limited() -> None:
    hostile = "oom_kill -1\nfiles 1 2\nconntrack\nnet\nnet eth0 1 2 x 4\ndisk sda \u0661\nraid md0 1 2\nclock\ncat: no such file\n"
    assert kernel.parse_kernel(hostile) == kernel.Kernel()
    many = "".join(f"disk sd{number} 1\n" for number in range(1000))
    assert len(kernel.parse_kernel(many).queue_seconds) == kernel.DEVICES_LIMIT
