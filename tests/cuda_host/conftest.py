"""The CUDA path without a GPU: ``make cuda-check`` builds what these tests need. Without it they fail, not skip."""

from collections.abc import Iterator

import pytest

try:
    import _emulation
except ImportError as error:
    raise pytest.UsageError(
        f"tests/cuda_host wants the module _emulation, which `make cuda-check` builds: {error}"
    ) from error

DEFAULTS = {"chunk_bytes": _emulation.CHUNK_BYTES, "multiprocessors": 2**31 - 1, "delays": 0}


@pytest.fixture(autouse=True)
def _same_thresholds() -> Iterator[None]:
    yield
    for name, value in DEFAULTS.items():
        _emulation.set_threshold(name, value)
