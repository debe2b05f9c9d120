"""Recorded results: ``benchmarks/results/NAME.json``, which `table` and `plot` read.

A record says where it comes from (machine, versions, commit, settings, allocator), and has an entry for each row in
each run.
"""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

import pyrnnfast
from pyrnnfast import _cpu

from . import files

RESULTS = Path(__file__).parent / "results"


class Entry(TypedDict):
    """One run of one row; times in milliseconds, medians."""

    kind: str
    cell: str
    mode: str
    shape: list[int]
    threads: int
    dtype: str
    run: int
    path: str
    ours_ms: float
    torch_ms: float
    limit_ms: float
    # Of a call behind the other side's; all others are behind a call of their own. Old records have such alone.
    ours_first_ms: NotRequired[float]
    torch_first_ms: NotRequired[float]
    torch_cell_ms: NotRequired[float]
    ours_float32_ms: NotRequired[float]
    dense_ms: NotRequired[float]  # our dense training steps at the batches of a ragged row's steps, summed
    ours_beside_dense_ms: NotRequired[float]  # the ragged row timed among those
    error: float  # the largest difference of the two sides, relative to the largest value
    rounds: int
    meeting_us: NotRequired[float]  # of a barrier of the threads, behind the row: how far apart their cores stood
    disturbed: bool  # around every attempt a core was stolen, or stood elsewhere than it should


def processor() -> str:
    """Its name and, as hosts of virtual machines hide most of that, its family and model."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor())
    numbers = [f"{what} {fields[key]}" for what, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(settings: dict[str, object]) -> dict[str, object]:
    """Where results come from, the first part of every record."""
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "instruction_set": _cpu.instruction_set()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyrnnfast": pyrnnfast.__version__,
            "linux": platform.release(),
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        # How an allocator hands out large tensors decides over page faults, and so over large training steps.
        "allocator": {
            "libc": " ".join(platform.libc_ver()),
            "environment": {
                name: value
                for name, value in os.environ.items()
                if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
            },
        },
    }


def save(name: str, record: dict[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    files.write(path, record)
    return path


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record
