"""A run without a card fails; each test begins with the same state of torch; outcomes are written as they come."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LOST = 7
"""The status of a process that can do nothing on the card any more."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", help="K/N: the K-th of N parts of the tests")
    parser.addoption("--outcomes", type=Path, help="where a line of JSON goes for every test that begins or ends")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    # No skipping: tests that did not run have not passed.
    if not torch.cuda.is_available() and not session.config.option.collectonly:
        pytest.exit("these tests need a CUDA device, and torch sees none", returncode=4)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # several processes share the machine
    path = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(_Writer(path))


# Tests that follow each other share what they are compared with: oracle.prepared.
_TOGETHER = 10


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard: str | None = config.getoption("--shard")
    if shard is not None:
        part, parts = map(int, shard.split("/"))
        items[:] = [item for index, item in enumerate(items) if index // _TOGETHER % parts == part]
    path: Path | None = config.getoption("--outcomes")
    if path is not None and path.exists():
        # Where a process was lost, another goes on behind the test that it was lost in.
        known = {json.loads(line)["test"] for line in path.read_text().splitlines()}
        items[:] = [item for item in items if item.nodeid not in known]


class _Writer:
    """At once, line by line: a run that is stopped, or that a kernel takes with it, leaves what it has found."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def _write(self, test: str, outcome: str) -> None:
        self.file.write(json.dumps({"test": test, "outcome": outcome}) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome)
        if report.when == "teardown" and report.outcome == "failed":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"a kernel has taken CUDA with it: {error}", returncode=LOST)


@pytest.fixture(autouse=True)
def _same_state() -> Iterator[None]:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    # Where a kernel has gone wrong, the test that called it fails, and not one that comes later.
    torch.cuda.synchronize()
