"""What ptxas says of each kernel that it compiles, from the output of ``nvcc -Xptxas -v``."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    name: str
    """Mangled."""
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def persistent(self) -> bool:
        return "sweep" in self.name

    def __str__(self) -> str:
        return (
            f"{self.name} for {self.architecture}: {self.registers} registers, {self.stack} bytes of stack, "
            f"{self.spill_stores} spilled, {self.spill_loads} loaded back"
        )


_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'\n"
    r".*Function properties for (?P=name)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def kernels(report: str) -> list[Kernel]:
    """All of them; a kernel that is begun but not read raises."""
    found = [
        Kernel(m["name"], m["architecture"], int(m["registers"]), int(m["stack"]), int(m["stores"]), int(m["loads"]))
        for m in _KERNEL.finditer(report)
    ]
    begun = report.count("Compiling entry function")
    if len(found) != begun:
        raise ValueError(f"{begun} kernels in the report, but only {len(found)} could be read")
    return found
