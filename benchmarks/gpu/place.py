"""Where the check builds and keeps things, and how it starts other programs: with what it built, and a time limit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
LOGS = BUILD / "logs"


class Finished(NamedTuple):
    status: int | None  # None: it was stopped at its limit
    seconds: float
    log: Path

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def why(self, limit: float) -> str:
        return f"stopped after {limit:.0f} s" if self.status is None else f"ended with status {self.status}"


def python(*arguments: str) -> list[str]:
    # -P: not the Python files of the working directory, beside which no compiled module lies, but those of SITE.
    return [sys.executable, "-P", *arguments]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(map(str, (SITE, ROOT)))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | dict(more or {})


def run(command: Sequence[str], name: str, limit: float, more: Mapping[str, str] | None = None) -> Finished:
    """Runs a command from ROOT, its output into a log of that name; at its limit it and all that it started end.

    Args:
        more: of environment variables
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    log, begin = LOGS / f"{name}.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(more), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Whatever happens here, interruption included, nothing stays behind on the card.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Finished(status, time.monotonic() - begin, log)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which is often not on the PATH."""
    found = shutil.which(name)
    for directory in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if found is None and directory:
            found = shutil.which(name, path=str(Path(directory) / "bin"))
    return found
