"""The folder of a run: one command at a time writes to it, and a checkpoint in it is complete or of no use.

A checkpoint is complete once the checksums of its files are written, after the files themselves are on the disk.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from errors import RunError
from filelock import FileLock, Timeout
from records import flush, write_json
from rich.filesize import decimal
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

CHECKSUMS = "checksums.json"
LOCK = "run.lock"
UNFINISHED = {LOCK, "run.json.new"}
"""What a command leaves that was killed before it had begun."""


def read_object(file: Path) -> dict[str, Any]:
    """What is in a file of JSON.

    Raises:
        RunError: it is damaged, or something else than an object.
    """
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); use another --output_dir.") from error
    if not isinstance(value, dict):
        raise RunError(f"{file} is damaged: it holds {type(value).__name__}, no object; use another --output_dir.")
    return value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made if it does not exist, for this process, until it ends in whatever way.

    Raises:
        RunError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{error}; use another --output_dir.") from error
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise RunError(
            f"Another command is training in {folder}. Wait until it ends, or use another --output_dir."
        ) from error


def checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def tensors_checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, z in tensors.items():
        digest.update(f"{name} {z.dtype} {tuple(z.shape)}".encode())
        digest.update(z.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the files as which it is saved."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {file.name: checksum(file) for file in sorted(Path(folder).glob("*"))}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def seal(checkpoint: Path) -> None:
    """Makes a checkpoint complete: its files are on the disk, and their checksums beside them."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    for file in files:
        flush(file)
    write_json(checkpoint / CHECKSUMS, {str(file.relative_to(checkpoint)): checksum(file) for file in files})
    flush(checkpoint.parent)


def fault(checkpoint: Path, read: bool = True) -> str | None:
    """Why one cannot go on from a checkpoint; None if one can. Unless its files are read, only whether they exist."""
    if not (checkpoint / CHECKSUMS).is_file():
        return f"it was not saved to its end: there is no {CHECKSUMS}"
    try:
        checksums = read_object(checkpoint / CHECKSUMS)
    except RunError:
        return f"{CHECKSUMS} is damaged"
    for name, expected in checksums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if read and checksum(checkpoint / name) != expected:
            return f"{name} is damaged"
    return None


def fault_of_best(checkpoint: Path) -> str | None:
    """Why the best checkpoint so far, which a run ends with, cannot be used; None if it can, or if there is none."""
    best = read_object(checkpoint / TRAINER_STATE_NAME).get("best_model_checkpoint")
    if best is None or Path(best).name == checkpoint.name:
        return None
    best = checkpoint.with_name(Path(best).name)
    why = fault(best)
    return why and f"the best one so far, {best.name}, is of no use: {why}"


def last_complete_checkpoint(folder: Path) -> str | None:
    """The path of the last checkpoint that one can go on from. Those that are of no use are set aside, and named."""
    found = None
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        why = fault(checkpoint, read=found is None) or (None if found else fault_of_best(checkpoint))
        if why is None:
            found = found or str(checkpoint)
        else:
            aside = checkpoint.with_name(f"incomplete-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            print(f"{checkpoint} is of no use ({why}). It is now {aside.name}; delete it when you like.")
    return found


def delete_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints until there are `limit`, but neither the last nor the best one."""
    checkpoints = sort_checkpoints(str(folder))
    kept = {checkpoints[-1], *([str(Path(best))] if best else [])}
    surplus = len(checkpoints) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        # Killed half-way, it is not complete.
        Path(checkpoint, CHECKSUMS).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def saving(file: Path, size: int) -> Iterator[None]:
    """Names what could not be saved, and why.

    Args:
        size: about how many bytes are written.

    Raises:
        RunError: an error of writing.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(file.parent).free
        full = f"the disk is full: {decimal(free)} are free, and it takes about {decimal(size)}"
        why = (
            full if free < size or getattr(error, "errno", None) == errno.ENOSPC else f"{type(error).__name__}: {error}"
        )
        raise RunError(
            f"{file} could not be saved ({why}). Nothing that was complete is lost: make room, or lower "
            f"--save_total_limit, and give the same command again."
        ) from error


def size_of_checkpoint(model: torch.nn.Module) -> int:
    """About how many bytes: the weights, and two numbers for each that is trained."""
    weights = {id(z): z for z in model.parameters()}.values()
    return sum(z.nbytes * (3 if z.requires_grad else 1) for z in weights)


def is_empty(folder: Path) -> bool:
    """Whether no run has begun there."""
    return not folder.exists() or all(file.name in UNFINISHED for file in folder.iterdir())
