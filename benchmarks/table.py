"""Prints recorded results as the tables of the README: ``python -m benchmarks.table NAME``."""

import sys

from . import record, targets
from .rows import CELLS, MODES
from .targets import Judged

_COLUMNS = [(cell, mode) for cell in CELLS for mode in MODES]


def _label(j: Judged) -> str:
    kind, dtype = j.entry["kind"], j.entry["dtype"]
    words = [",".join(map(str, j.entry["shape"]))]
    words += [kind] if kind != "layer" else []
    words += [dtype] if dtype != "float32" else []
    return " ".join(words)


def _text(judged: Judged) -> str:
    """× torch (× limit), and a mark where a target is missed."""
    return f"{judged.ratio:.2f} ({judged.distance:.2f}){'' if judged.met else ' °'}"


def table(rows: list[Judged]) -> list[str]:
    """Markdown: a line for each kind, shape and dtype, in each column all numbers of threads."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for j in rows:
        texts = found.setdefault(_label(j), {}).setdefault((j.entry["cell"], j.entry["mode"]), [])
        texts.append(_text(j))
    return [
        "| T,B,I,H | " + " | ".join(f"{cell.upper()} {mode}" for cell, mode in _COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
        *(
            f"| {label} | " + " | ".join(" / ".join(texts.get(column, ["–"])) for column in _COLUMNS) + " |"
            for label, texts in found.items()
        ),
    ]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.table NAME", file=sys.stderr)
        return 2
    recorded = record.load(arguments[0])
    threads = " / ".join(f"{n} thread{'s' * (n > 1)}" for n in recorded["settings"]["threads"])
    print(f"torch's time over ours (ours over the limit), {threads}; °: misses one of its targets.\n")
    print(*table(targets.judge(recorded["rows"])), "", sep="\n")
    print("```", *targets.summary(recorded["rows"]), "```", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
