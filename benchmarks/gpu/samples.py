"""Where a kernel's time goes, instruction by instruction: ``python -m benchmarks.gpu.samples FILE [LEAST]``

FILE is what ncu says of one launch, on a machine with a card::

    ncu --clock-control none -k regex:sweep_kernel -c 1 --section SourceCounters -f -o found python …
    ncu -i found.ncu-rep --page source --print-source sass --csv > FILE

Prints the instructions at which warps were found in LEAST per cent of the samples (0.5) or more, and those between
which the parts of a step lie: how often each was executed, its share of the samples, the share of all up to it, and
what was waited for. A warp is always somewhere, so that a share of the samples is a share of the time, of all warps
together.
"""

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# Loads and stores of the exchange, products, shared memory, meetings, transcendental functions.
_MARKS = ("STRONG", "HMMA", "STS", "LDS", "BAR", "MUFU")


def lines(rows: Iterable[Sequence[str]], least: float) -> Iterator[str]:
    """What is printed, of the rows of such a file."""
    table = iter(rows)
    names = next(row for row in table if "# Samples" in row)
    place = {name: i for i, name in enumerate(names)}
    waits = [name for name in names if name.startswith("stall_") and "Not Issued" not in name]
    body = list(table)
    total = sum(int(row[place["# Samples"]]) for row in body)
    by_wait = {name: sum(int(row[place[name]]) for row in body) / total for name in waits}
    for name, share in sorted(by_wait.items(), key=lambda item: -item[1]):
        if share >= 0.01:
            yield f"{share:7.1%} {name.removeprefix('stall_')}"
    before = 0
    for index, row in enumerate(body):
        samples, executed, text = (row[place[name]] for name in ("# Samples", "Instructions Executed", "Source"))
        before += int(samples)
        share = int(samples) / total
        if int(executed) == 0 or (share * 100 < least and not any(mark in text for mark in _MARKS)):
            continue
        found = max(waits, key=lambda name: int(row[place[name]]))
        wait = f"  {found.removeprefix('stall_')}" if int(row[place[found]]) else ""
        yield f"{index:6}{int(executed):10}{share:8.2%}{before / total:8.1%}  {text.strip()}{wait}"


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print("usage: python -m benchmarks.gpu.samples FILE [LEAST]", file=sys.stderr)
        return 2
    with Path(arguments[0]).open(newline="") as file:
        for line in lines(csv.reader(file), float(arguments[1]) if len(arguments) == 2 else 0.5):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
