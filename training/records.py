"""Files of JSON lines that outlive a kill."""

import json
import os
from pathlib import Path


def read_records(file: Path) -> list[dict]:
    """Those of its lines that were written to their end; none where there is no file."""
    return [json.loads(line) for line in whole_lines(file).splitlines()] if file.exists() else []


def append_record(file: Path, record: dict) -> None:
    """Writes a line, in the place of one that was cut short."""
    if file.exists():
        os.truncate(file, len(whole_lines(file)))
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def whole_lines(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1]
