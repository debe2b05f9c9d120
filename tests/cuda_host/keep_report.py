"""Stands before nvcc in a build and keeps what it says, ptxas's account of every kernel included, beside the object."""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
if "-o" in command and "-c" in command:
    Path(command[command.index("-o") + 1]).with_suffix(".ptxas").write_text(run.stderr)
if run.returncode:
    sys.stderr.write(run.stderr)
sys.exit(run.returncode)
