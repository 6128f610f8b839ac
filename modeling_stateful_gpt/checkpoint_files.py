"""The files of a checkpoint folder."""

import ast
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

PART = r"model-\d+-of-\d+\.safetensors"

WEIGHTS = rf"model\.safetensors(\.index\.json)?|{PART}"


def code(folder: Path) -> set[str]:
    """The files of code that a checkpoint's Auto classes need."""
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    with reading(folder / "config.json"):
        # A tokenizer has two classes, one of which may be None.
        entries = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
        modules = [entry.split(".")[0] for entry in entries if entry is not None]
    return with_imports(folder, modules)


def with_imports(folder: Path, modules: list[str]) -> set[str]:
    """The files of these modules of a folder, and of those that they import from it."""
    found: set[str] = set()
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found:
            found.add(name)
            modules += relative_imports(folder / name)
    return found


def relative_imports(file: Path) -> list[str]:
    """The modules beside a file of code that it imports; none if there is no such file."""
    text = read_text(file)
    with reading(file):
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [node.module for node in nodes if node.module]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the one, which `from_pretrained` prefers, or those that an index names."""
    return [file for file in weights_and_index(folder) if file.name != SAFE_WEIGHTS_INDEX_NAME]


def weights_and_index(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [folder / SAFE_WEIGHTS_NAME]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(re.fullmatch(PART, str(name)) for name in parts.values()):
        raise ValueError(f"{index} is damaged. Save the checkpoint again.")
    return [index, *sorted({folder / name for name in parts.values()})]


def no_link(path: Path) -> Path:
    """`path`; a ValueError if it is a link, which may lead to what was not meant to be published."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.readlink()}. Put the file itself there, or take it away.")
    return path


def plain(file: Path) -> Path:
    """`file`; a ValueError if it is a link, or no plain file."""
    if not no_link(file).is_file():
        raise ValueError(f"{file} is no plain file. Take it away, or save the checkpoint again.")
    return file


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Names the file in which something else stands than what is looked for.

    Raises:
        ValueError: any error that this leads to.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError) as error:
        why = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is damaged ({why}); mend it, or take it away.") from error


def read_text(file: Path) -> str:
    """What is in a text file; nothing if there is none.

    Raises:
        ValueError: it is no plain file, or no text in UTF-8.
    """
    if not os.path.lexists(file):
        return ""
    with reading(plain(file)):
        return file.read_text(encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """What is in a JSON file; nothing if there is none.

    Raises:
        ValueError: it is damaged, or something else than an object.
    """
    text = read_text(file)
    with reading(file):
        value = json.loads(text) if os.path.lexists(file) else {}
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, no object; mend it, or take it away.")
    return value


def finite(number: float) -> float:
    """The number; a ValueError if it is none, or NaN, or infinite."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def count_parameters(files: list[Path]) -> int:
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                tensor = weights.get_slice(name)
                if tensor.get_dtype() != "I64":  # A counter.
                    count += math.prod(tensor.get_shape())
    return count
