"""The first stage: both extension modules by plain cmake, for one card, into build/gpu/site.

Also by itself, as ``python -m benchmarks.gpu.build``. Nothing is fetched, and the Python that runs this, with whatever
torch it has, is the one that is built for. Two small programs, planted.cu and probe.cu, are built with it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import place
from .place import BUILD, ROOT, SITE

PROGRAMS = ("planted", "probe")


class Failed(RuntimeError):
    """The build went wrong; the text is the end of what it printed."""


def program(name: str) -> Path:
    return BUILD / name


def _step(name: str, command: list[str], limit: float) -> None:
    done = place.run(command, name, limit)
    if done.status != 0:
        raise Failed(f"{' '.join(command)} {done.why(limit)}:\n{done.tail()}")


def build(architectures: str = "native", limit: float = 540) -> None:
    """Builds and installs everything.

    Args:
        architectures: as CMake's variable has them, "native": that of the card in this machine
        limit: in seconds

    Raises:
        Failed: with the compiler's words.
    """
    end = time.monotonic() + limit
    nvcc = place.tool("nvcc")
    if nvcc is None:
        raise Failed("there is no nvcc, neither on the PATH nor in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    if shutil.which("cmake") is None:
        raise Failed("there is no cmake on the PATH")
    asked = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    if asked.returncode != 0:
        raise Failed(f"{sys.executable} has no pybind11: {asked.stderr.strip()}")
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{BUILD}",
        *(["-GNinja"] if shutil.which("ninja") else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-Dpybind11_DIR={asked.stdout.strip()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DPYRNNFAST_CUDA=on",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
    ]
    _step("configure", configure, end - time.monotonic())
    _step("compile", ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)], end - time.monotonic())
    # What an earlier state of the sources left there is not to be imported by this one.
    shutil.rmtree(SITE, ignore_errors=True)
    _step("install", ["cmake", "--install", str(BUILD), "--prefix", str(SITE)], end - time.monotonic())
    # The modules of a build for another Python lie beside the sources where somebody builds in place.
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pyrnnfast", SITE / "pyrnnfast", dirs_exist_ok=True, ignore=ignored)
    for name in ("_cpu", "_cuda"):
        if not list((SITE / "pyrnnfast").glob(f"{name}*.so")):
            raise Failed(f"the build left no pyrnnfast/{name}*.so in {SITE}")
    architecture = f"sm_{architectures}" if architectures.isdigit() else architectures
    for name in PROGRAMS:
        source = Path(__file__).parent / f"{name}.cu"
        command = [
            nvcc,
            "-O2",
            "-std=c++17",
            "-lineinfo",
            f"-arch={architecture}",
            str(source),
            "-o",
            str(program(name)),
        ]
        _step(name, command, end - time.monotonic())
    # Where the machine has no driver either, it must still say so in its own words.
    _step("import", place.python("-c", "import pyrnnfast, pyrnnfast._cuda"), end - time.monotonic())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", default="native", help="default: that of the card in this machine")
    try:
        build(parser.parse_args().architectures)
    except Failed as reason:
        sys.exit(str(reason))
    print(f"built into {SITE}")
