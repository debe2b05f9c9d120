"""How many processors' time the control groups of this process allow: a container's limit, mostly.

Affinity does not tell of it, and torch takes as many threads as there are cores. The kernel stops all threads of a
process that has used its time, up to the end of a period of, mostly, 100 ms; so a team of more threads than the quota
has processors is slower than one of as many, the more so as threads that wait for others use time, too.
"""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from . import _cpu


def obey() -> None:
    """From here on no call uses more processors than that; what the quota is later is not looked at."""
    allowed = processors()
    if allowed is not None:
        _cpu.set_quota(allowed)


def processors(root: Path = Path("/")) -> int | None:
    """Those that the quota allows at once, a part of one counted as one; None where there is none that can be read.

    Args:
        root: under which ``proc`` is, and the mount points that it tells of
    """
    try:
        quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    except (OSError, ValueError):  # another system, or one that tells it in another form
        return None
    return max(1, math.ceil(min(quotas))) if quotas else None


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the groups that account for the time of this process, each within those after it."""
    own = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    # "… … … ROOT MOUNT_POINT … - TYPE … OPTIONS", proc_pid_mountinfo(5)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        (of_mount, mount_point), (kind, *_, options) = before.split()[3:5], after.split()
        mounted = root / mount_point.lstrip("/")
        for controllers, path in own:
            if kind == ("cgroup" if controllers else "cgroup2") and (
                not controllers or "cpu" in set(controllers.split(",")) & set(options.split(","))
            ):
                # Of what is mounted; a group elsewhere is one that cannot be seen.
                inside = PurePosixPath(path)
                if inside.is_relative_to(of_mount) and ".." not in inside.parts:
                    group = mounted / inside.relative_to(of_mount)
                    yield group
                    yield from (parent for parent in group.parents if parent.is_relative_to(mounted))


def _quota(group: Path) -> float | None:
    """Processors: of version 2, "max 100000" or "150000 100000", and of version 1 -1 or microseconds."""
    try:
        if (two := group / "cpu.max").exists():
            quota, period = two.read_text().split()
        elif (one := group / "cpu.cfs_quota_us").exists():
            quota, period = one.read_text(), (group / "cpu.cfs_period_us").read_text()
        else:
            return None
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # not for this process to read, or in another form
        return None
