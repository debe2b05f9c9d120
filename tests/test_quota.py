"""The quota of control groups, of both versions, as the files of a machine tell it."""

import subprocess
import sys
from pathlib import Path

import pytest

from pyrnnfast import _cpu, quota

MOUNTS_2 = (
    "25 1 0:22 / /proc rw - proc proc rw\n31 23 0:28 {of} {at} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
)
MOUNTS_1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {of} {at} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {of} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "34 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
OWN_1 = "4:memory:/elsewhere\n1:cpu,cpuacct:{group}\n0::/\n"


def machine(root: Path, own: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota_text", "expected"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("20000 100000\n", 1),
        ("6400000 50000\n", 128),
    ],
)
def test_a_container_of_version_2(tmp_path: Path, quota_text: str, expected: int | None) -> None:
    mounts = MOUNTS_2.format(of="/", at="/sys/fs/cgroup")
    assert quota.processors(machine(tmp_path, "0::/\n", mounts, {"sys/fs/cgroup/cpu.max": quota_text})) == expected


def test_the_least_of_the_groups_that_one_is_in(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/cpu.max": "300000 100000",
        "sys/fs/cgroup/other/cpu.max": "100000 100000",
    }
    mounts = MOUNTS_2.format(of="/", at="/sys/fs/cgroup")
    assert quota.processors(machine(tmp_path, "0::/user.slice/job\n", mounts, files)) == 3
    (tmp_path / "sys/fs/cgroup/user.slice/job/cpu.max").write_text("200000 100000")
    assert quota.processors(tmp_path) == 2


def test_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/elsewhere/cpu.max": "100000 100000",
    }
    mounts = MOUNTS_1.format(of="/", at="/sys/fs/cgroup/cpu")
    assert quota.processors(machine(tmp_path, OWN_1.format(group="/a/b"), mounts, files)) == 3


def test_a_container_that_sees_the_paths_of_its_host(tmp_path: Path) -> None:
    """Docker without a namespace of control groups: what is mounted is the container's own group."""
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    mounts = MOUNTS_1.format(of="/docker/12ab", at="/sys/fs/cgroup/cpu")
    assert quota.processors(machine(tmp_path, OWN_1.format(group="/docker/12ab"), mounts, files)) == 4
    (tmp_path / "proc/self/cgroup").write_text(OWN_1.format(group="/docker/other"))
    assert quota.processors(tmp_path) is None


@pytest.mark.parametrize(
    ("own", "mounts", "text"),
    [
        ("", "", "100000 100000"),
        ("0::/\n", "", "100000 100000"),
        ("0::/\n", "something else\n", "100000 100000"),
        ("something else\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), "100000 100000"),
        ("0::/\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), ""),
        ("0::/\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), "many 100000"),
        ("0::/\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), "100000 0"),
        ("0::/\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), "0 100000"),
        ("0::/../..\n", MOUNTS_2.format(of="/", at="/sys/fs/cgroup"), "100000 100000"),
        ("0::/../..\n", MOUNTS_2.format(of="/a", at="/sys/fs/cgroup"), "100000 100000"),
    ],
)
def test_what_cannot_be_read_is_no_quota(tmp_path: Path, own: str, mounts: str, text: str) -> None:
    assert quota.processors(machine(tmp_path, own, mounts, {"sys/fs/cgroup/cpu.max": text})) is None


def test_no_proc(tmp_path: Path) -> None:
    assert quota.processors(tmp_path) is None


def test_a_call_uses_no_more_processors() -> None:
    """In a process of its own, as a quota stays."""
    code = """
from pyrnnfast import _cpu, quota
quota.processors = lambda: 1
quota.obey()
assert _cpu.processors() == 1
try:
    _cpu.seconds_to_meet(2, 1)
except RuntimeError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "there is no team of so many threads\n"


def test_a_quota_is_at_least_a_processor() -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"processors must be at least 1, got {bad}"):
            _cpu.set_quota(bad)
