"""Files of JSON that outlive a kill."""

import contextlib
import json
import os
from pathlib import Path


def read_records(file: Path) -> list[dict]:
    """All but those that a kill has cut short; none where there is no file."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk, where a power cut leaves them."""
    with contextlib.suppress(OSError):  # Some systems open no folders.
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_json(file: Path, value: dict) -> None:
    """Writes the whole file or, if killed, leaves the one that was there.

    Raises:
        ValueError: it holds a number that JSON has not: NaN or an infinite one.
    """
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(value, indent=1, allow_nan=False))
    flush(new)
    new.replace(file)
    flush(file.parent)


def append_record(file: Path, record: dict) -> None:
    """Writes a line, after the end of one that was cut short."""
    with file.open("ab+") as lines:
        if lines.tell() > 0:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(f"{json.dumps(record)}\n".encode())
