"""What was built, what runs, and what has run on a real card: :func:`info`, and the command ``pyrnnfast info``."""

from typing import Any, NamedTuple

import torch

from . import _cpu, cuda


class Info(NamedTuple):
    """What :func:`info` tells; ``str`` of it is for people."""

    version: str
    torch_version: str
    instruction_sets: tuple[str, ...]
    """Of the processor and this build, the best first."""
    instruction_set: str
    """The one in use."""
    threads: int
    """Of torch's setting."""
    processors: int
    """That this process may use, by its affinity and its control groups' quota: no call takes more threads."""
    cuda_architectures: str | None
    """What the CUDA kernels are compiled for; None: there are none in this build."""
    cuda_toolkit: str | None
    cuda_devices: tuple[str, ...]
    cuda_reason: str | None
    """Why no device is served by the CUDA kernels."""
    cuda_path: str | None
    """The path that :func:`pyrnnfast.cuda.use` or ``PYRNNFAST_CUDA_PATH`` asks for."""
    cuda_records: tuple[str, ...]
    """The runs on real cards whose tests passed."""
    cuda_refused: tuple[str, ...]
    """Those that were not all right, which choose nothing."""

    def __str__(self) -> str:
        lines = [
            f"pyrnnfast {self.version}, torch {self.torch_version}",
            f"CPU: {self.instruction_set} in use, of {', '.join(self.instruction_sets)}; {self.threads} thread(s) "
            f"on {self.processors} processor(s)",
        ]
        if self.cuda_architectures is not None:
            lines.append(f"CUDA: kernels for {self.cuda_architectures}, built by CUDA {self.cuda_toolkit}")
        lines += [f"CUDA device: {device}" for device in self.cuda_devices]
        if self.cuda_reason is not None:
            lines.append(f"CUDA: {self.cuda_reason}")
        if self.cuda_path is not None:
            lines.append(f"CUDA: the path {self.cuda_path!r} is asked for")
        lines += [f"CUDA record: {record}" for record in self.cuda_records]
        lines += [f"CUDA record, refused: {record}" for record in self.cuda_refused]
        if not self.cuda_records:
            state = "None of them is green" if self.cuda_refused else "This version comes without one"
            lines.append(
                f"CUDA record: none that counts. {state}, and cuDNN serves CUDA tensors, unless "
                "pyrnnfast.cuda.use asks for another path"
            )
        return "\n".join(lines)


def info() -> Info:
    """What this build of pyrnnfast has, on this machine.

    Where it has CUDA kernels, the driver is asked for its devices, and a process that is forked later cannot use CUDA.
    """
    from . import __version__

    loaded, records = cuda.load(), cuda.table().records
    return Info(
        version=__version__,
        torch_version=str(torch.__version__),
        instruction_sets=tuple(_cpu.instruction_sets()),
        instruction_set=_cpu.instruction_set(),
        threads=torch.get_num_threads(),
        processors=_cpu.processors(),
        cuda_architectures=None if loaded.module is None else loaded.architectures,
        cuda_toolkit=None if loaded.module is None else loaded.module.toolkit(),
        cuda_devices=tuple(_device(d, loaded.architectures) for d in loaded.devices),
        cuda_reason=loaded.reason,
        cuda_path=cuda.asked(),
        cuda_records=tuple(str(r) for r in records if r.refusal is None),
        cuda_refused=tuple(str(r) for r in records if r.refusal is not None),
    )


def _device(device: dict[str, Any], architectures: str) -> str:
    fits = cuda.runs_on(architectures, device["major"], device["minor"])
    return f"{device['name']}, compute capability {cuda.capability(device)}" + ("" if fits else ", not compiled for")
