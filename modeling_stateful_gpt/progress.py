"""How far documents have been read, kept in a file, so that a killed run can go on in the middle of one."""

import copy
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, TrainerCallback
from transformers.utils import logging

from .fixed_point import Words

if TYPE_CHECKING:
    from .unbounded import Batch, Reading

logger = logging.get_logger(__name__)


def pack(value: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a safetensors file is made of: the tensors in `value`, and as its metadata the rest, in JSON.

    Args:
        value: lists and dictionaries (without a key "tensor") of what JSON knows, tensors, and one-dimensional buffers
            (`bytearray`, `array`), which come back as tensors.
    """
    tensors: dict[str, torch.Tensor] = {}

    def place(z: Any) -> dict:
        if not isinstance(z, torch.Tensor):
            z = torch.from_numpy(np.asarray(z))
        number, flat = str(len(tensors)), z.detach()
        # The format knows no complex numbers in double precision.
        flat = torch.view_as_real(flat.resolve_conj()) if z.is_complex() else flat
        tensors[number] = flat.cpu().contiguous()
        return {"tensor": number, "is_complex": z.is_complex(), "device": str(z.device)}

    return tensors, {"outline": json.dumps(value, default=place)}


def unpack(metadata: dict[str, str], tensor: Callable[[str], torch.Tensor]) -> Any:
    """What `pack` was given. `tensor` finds one by its name."""

    def find(entry: dict) -> Any:
        if "tensor" not in entry:
            return entry
        # A copy: the last bits of what is computed from a tensor depend on how it is aligned.
        z = tensor(entry["tensor"]).to(entry["device"], copy=True)
        return torch.view_as_complex(z) if entry["is_complex"] else z

    return json.loads(metadata["outline"], object_hook=find)


def digest_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """The SHA-256 of what `pack` gave: a file in which a bit has turned over must not become a gradient."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(repr((name, tensors[name].shape, tensors[name].dtype)).encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


HELD = (torch.Tensor, int, type(None), Words)
"""The kinds of a layer's attributes that its past changes."""


def contents(layer) -> dict[str, Any]:
    """What a layer holds, for `pack`."""
    held = {name: z for name, z in vars(layer).items() if isinstance(z, HELD)}
    return {name: vars(z) if isinstance(z, Words) else z for name, z in held.items()}


def refill(layer, held: dict[str, Any]) -> None:
    """Puts what `contents` gave into a new layer of the same kind."""
    for name, z in vars(layer).items():
        if isinstance(z, Words):
            z.bytes += held[name]["bytes"].numpy().tobytes()
            z.moves.frombytes(held[name]["moves"].numpy().tobytes())
            z.steps = held[name]["steps"]
        elif isinstance(z, HELD):
            setattr(layer, name, held[name])


NOTES = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
"""What stands in a configuration and decides nothing; saving a model changes it."""


def computation(config: PreTrainedConfig | GenerationConfig) -> str:
    """A configuration without `NOTES`, as JSON."""

    def without_notes(fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name not in NOTES}

    return json.dumps(json.loads(config.to_json_string(), object_hook=without_notes), sort_keys=True)


# Not .safetensors: what publishes the folder would take it for weights. What is pickled (.pt) is only deleted.
FILE_NAME = re.compile(r"document-[0-9a-f]{16}-\d+\.(progress|unfinished|pt)")


class Progress:
    """Keeps a `Reading` in a safetensors file, so that a killed run can go on in the middle of a document.

    A file is named after all that the gradients depend on: as a run is resumed from a checkpoint, it comes again to the
    same documents with the same weights and the same dropout, and what is not the same is not taken up.

    Args:
        folder: where; None to keep nothing.
        seconds: between two writes.
    """

    FORMAT = 4
    """Of the files. One of another is not taken up."""

    def __init__(self, folder: Path | None = None, seconds: float = 300):
        self.folder, self.seconds, self.written = folder, seconds, time.monotonic()

    @cached_property
    def path(self) -> Path:
        batch, mask = self.batch, self.batch.attention_mask
        sizes = (self.FORMAT, self.context, batch.seed, batch.chunk_size, batch.num_items_in_batch)
        digest = hashlib.sha256(repr((*sizes, computation(batch.model.config))).encode())
        for tensor in (batch.input_ids, batch.labels, *([] if mask is None else [mask]), *batch.model.parameters()):
            digest.update(repr((tensor.shape, tensor.device)).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return self.folder / f"document-{digest.hexdigest()[:16]}-{PartialState().process_index}.progress"

    def begin(self, batch: "Batch", context: str, reading: "Reading") -> "Reading":
        """The reading in the file, if there is one, with the gradients so far; otherwise the given one."""
        self.batch, self.context = batch, context
        # To take the digest of all weights takes time, which most steps need not spend.
        if self.folder is None or not any(self.folder.glob("document-*.progress")) or not self.path.exists():
            return reading
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata()
            tensors = safetensors.torch.load_file(self.path)
            if metadata.pop("digest") != digest_of(tensors, metadata):
                raise ValueError("its digest is that of other contents")
            saved = unpack(metadata, tensors.__getitem__)
            # A copy, as something may turn out to be wrong half-way.
            resumed, gradients = copy.deepcopy(reading), saved["parameters"]
            resumed.refill(saved["reading"])
            for parameter, gradient in zip(batch.model.parameters(), gradients, strict=True):
                if gradient is not None and (gradient.shape, gradient.dtype) != (parameter.shape, parameter.dtype):
                    raise ValueError(f"a gradient is {list(gradient.shape)}, its parameter {list(parameter.shape)}")
        except Exception as error:  # Whatever is in the file.
            logger.warning(
                f"{self.path} is damaged, or something else than progress ({type(error).__name__}: {error}); the "
                f"documents are read again from their beginning."
            )
            return reading
        logger.warning(f"Going on in the middle of documents, from {self.path}.")
        for parameter, gradient in zip(batch.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return resumed

    def save(self, batch: "Batch", reading: "Reading") -> None:
        if self.folder is None or time.monotonic() - self.written < self.seconds:
            return
        unfinished = self.path.with_suffix(".unfinished")
        value = {"reading": reading.contents(), "parameters": [p.grad for p in batch.model.parameters()]}
        tensors, metadata = pack(value)
        metadata["digest"] = digest_of(tensors, metadata)
        try:
            safetensors.torch.save_file(tensors, unfinished, metadata)
            os.replace(unfinished, self.path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            logger.warning_once(
                f"How far documents are read cannot be kept ({error}). Killed, the run would begin them again."
            )
        self.written = time.monotonic()

    def end(self) -> None:
        if "path" in vars(self) and self.path.is_file():
            self.path.unlink()


class DeleteProgress(TrainerCallback):
    """When a run is over, of the documents that were being read when it was killed once."""

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in Path(args.output_dir).glob("document-*"):
                if FILE_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
