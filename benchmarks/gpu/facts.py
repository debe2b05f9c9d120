"""Which card, driver and versions a check runs on: prints them as JSON, or says that there is no card.

A process of its own, so that the check itself holds no context on the card.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import place


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    if found:
        return found.splitlines()[0]
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", version.read_text()) if version.exists() else None
    return match[1] if match else None


def _nvcc() -> str | None:
    compiler = place.tool("nvcc")
    match = re.search(r"release [\d.]+, V([\d.]+)", _output(compiler, "--version") or "") if compiler else None
    return match[1] if match else None


def facts() -> dict[str, Any] | None:
    """None where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "driver": _driver(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvcc": _nvcc(),
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    found = facts()
    if found is None:
        sys.exit("torch sees no CUDA device")
    print(json.dumps(found))
