"""Prints recorded results as the table of the README: ``python -m benchmarks.table NAME``."""

import json
import sys

from .__main__ import CELLS, MODES, RESULTS


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.table NAME", file=sys.stderr)
        return 2
    record = json.loads((RESULTS / f"{arguments[0]}.json").read_text())
    ratios: dict[tuple[str, str, str], list[str]] = {}
    for row in record["rows"]:
        shape = ",".join(map(str, row["shape"]))
        ratios.setdefault((shape, row["cell"], row["mode"]), []).append(f"{row['torch_ms'] / row['ours_ms']:.2f}")
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    print("| T,B,I,H | " + " | ".join(f"{cell.upper()} {mode}" for cell, mode in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for shape in dict.fromkeys(shape for shape, _, _ in ratios):
        cells = (" / ".join(ratios.get((shape, *column), ["-"])) for column in columns)
        print(f"| {shape} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
