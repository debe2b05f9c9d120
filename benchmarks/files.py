"""Records as files of JSON, written whole or not at all, in which each row has a line to itself."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(text(record))
    os.replace(temporary, path)


def text(record: dict[str, Any]) -> str:
    parts = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            lines = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        else:
            lines = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(name)}: {lines}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
