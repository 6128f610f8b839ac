"""Backpropagation through documents of any length, in the memory of a piece of them.

    loss = backward_through_time(model, input_ids, labels, chunk_size=1024)   # as loss.backward() would, into .grad

The document is read once, keeping of each layer only its last state; then once more from its end, piece by piece: what
each layer's state was at the beginning of a piece is rebuilt, the piece is computed again, with gradients, and the
gradient of that state is passed on to the piece before. Reversible and RWKV layers rebuild their states by running
backwards (with the lost bits, if they forget); those of GateLoop layers, which are small, are kept for the beginning of
each piece. So are all states of a model with feedback around it: what its layers read at a token depends on what they
gave at the one before, which would have to be known already.

`train.py --context unbounded --chunk_size 1024` uses it. For a Trainer of your own:

    class DocumentTrainer(WholeDocuments, Trainer): ...

    documents = Documents("tokens.int32", texts, tokenizer)
    arguments = TrainingArguments(..., remove_unused_columns=False)
    DocumentTrainer(model, arguments, data_collator=pad, train_dataset=documents, chunk_size=1024).train()
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from modeling_stateful_gpt.cache_layers import RECURRENT_LAYERS, LastHiddenStateLayer, RecurrentStateLayer
from modeling_stateful_gpt.compat import checkpointing
from modeling_stateful_gpt.fixed_point import Words
from modeling_stateful_gpt.reversible_layers import ReversibleStateLayer

logger = logging.get_logger(__name__)


class RewindableLayer(ReversibleStateLayer):
    """The state of a layer that can be run backwards, while documents are read, forwards or backwards."""

    _layer_type = "rewindable"  # A class by which transformers would make caches, if it had the type of its parent.

    def __init__(self, layer_type: str) -> None:
        super().__init__()
        self._layer_type = layer_type
        self.words: Words | None = None
        self.backwards = False

    def advance(self, recur, inputs):
        return super().advance(partial(recur, words=self.words, backwards=self.backwards), inputs)


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


class Boundaries:
    """A stack of the layers that cannot be run backwards, as they were before each piece.

    As bytes: thousands of small tensors that stay, allocated among large ones that go, would leave memory in pieces of
    which the large ones cannot be made again.
    """

    def __init__(self):
        self.file, self.starts = BytesIO(), array("q")

    def push(self, layers: list) -> None:
        data = safetensors.torch.save(*pack([contents(layer) for layer in layers]))
        self.starts.append(self.file.seek(0, os.SEEK_END))
        self.file.write(data)

    def pop(self, layers: list) -> list:
        """New `layers`, filled with what those held that were pushed last."""
        start = self.starts.pop()
        self.file.seek(start)
        data = self.file.read()
        self.file.truncate(start)
        # The header: its length in eight bytes, then JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        held = unpack(header["__metadata__"], safetensors.torch.load(data).__getitem__)
        for layer, z in zip(layers, held, strict=True):
            refill(layer, z)
        return layers

    def contents(self) -> dict[str, Any]:
        self.file.seek(0)
        return {"bytes": bytearray(self.file.read()), "starts": self.starts}

    def refill(self, held: dict[str, Any]) -> None:
        self.file.write(held["bytes"].numpy().tobytes())
        self.starts.frombytes(held["starts"].numpy().tobytes())


def check_recurrent(model: PreTrainedModel) -> None:
    """Raises a ValueError unless all that the model carries from token to token are states of fixed size."""
    config = model.config
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    wrong = [f"{number} ({kind})" for number, kind in enumerate(layer_types) if kind not in RECURRENT_LAYERS]
    if wrong:
        raise ValueError(
            f"Unbounded context needs layers whose past is a state of fixed size ({', '.join(RECURRENT_LAYERS)}). "
            f"These look back at every token, or are unknown: layers {', '.join(wrong)}. Train this model on blocks of "
            f"text."
        )
    if checkpointing(model):
        raise ValueError("Unbounded context computes again whatever it needs: leave out gradient checkpointing.")
    if has_feedback(model) and config.training_solver != "sequential":
        raise ValueError(
            f"The feedback's training_solver is {config.training_solver!r}, whose passes over the sequence need all of "
            f"it at once. Use training_solver='sequential', feedback=None, or train on blocks of text."
        )
    if has_feedback(model) and config.feedback_noise:
        raise ValueError("Unbounded context takes the feedback as it is: leave out feedback_noise.")


def has_feedback(model: PreTrainedModel) -> bool:
    return getattr(model.config, "feedback", None) is not None


@contextlib.contextmanager
def same_dropout(seed: int) -> Iterator[None]:
    """Draws from `seed`, and leaves the random numbers outside as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass
class Batch:
    """Documents, right-padded, that are read piece by piece.

    Raises:
        ValueError: for a model with other layers, no tokens, or a `chunk_size` below 1.
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    labels: torch.Tensor
    chunk_size: int
    attention_mask: torch.Tensor | None
    num_items_in_batch: int | torch.Tensor | None

    def __post_init__(self) -> None:
        check_recurrent(self.model)
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; it must be at least 1.")
        if self.input_ids.numel() == 0:
            raise ValueError("The documents have no tokens.")
        if self.labels.shape != self.input_ids.shape:
            raise ValueError(
                f"labels are {tuple(self.labels.shape)}, input_ids {tuple(self.input_ids.shape)}; both are [B, T]."
            )
        if self.num_items_in_batch is None:
            self.num_items_in_batch = (self.labels[:, 1:] != -100).sum().clamp(min=1)
        self.seed = int(torch.randint(2**62, ()))
        self.starts = range(0, self.input_ids.shape[1], self.chunk_size)

    def layers(self) -> list:
        """Of an empty cache. A layer can be run backwards unless what it reads depends on what it gave: that is what
        feedback around the model does."""
        kinds = self.model.config.get_text_config().layer_types
        if has_feedback(self.model):
            return [*(RECURRENT_LAYERS[kind]() for kind in kinds), LastHiddenStateLayer()]
        rewindable = {k for k, layer in RECURRENT_LAYERS.items() if issubclass(layer, ReversibleStateLayer)}
        return [RewindableLayer(kind) if kind in rewindable else RECURRENT_LAYERS[kind]() for kind in kinds]

    def read(self, start: int, layers: list) -> torch.Tensor:
        """The share of a piece in the loss; leaves the states after it in `layers`."""
        piece = slice(start, start + self.chunk_size)
        for layer in layers:
            if isinstance(layer, RecurrentStateLayer):
                layer.seen = 0  # The mask is of this piece only.
        cache = DynamicCache()
        cache.layers = layers
        ids, targets = self.input_ids[:, piece], self.labels[:, start + 1 : piece.stop + 1]
        targets = torch.nn.functional.pad(targets, (0, ids.shape[1] - targets.shape[1]), value=-100)
        solver = {"solver": "sequential"} if has_feedback(self.model) else {}
        with same_dropout(self.seed + start):
            loss = self.model(
                input_ids=ids,
                attention_mask=None if self.attention_mask is None else self.attention_mask[:, piece],
                position_ids=torch.arange(start, start + ids.shape[1], device=ids.device)[None],
                labels=self.labels[:, piece],
                shift_labels=targets.contiguous(),
                num_items_in_batch=self.num_items_in_batch,
                past_key_values=cache,
                use_cache=True,
                **solver,
            ).loss
        layers[:] = cache.layers
        return loss


def pieces(starts: range, done: int, what: str) -> Iterator[int]:
    """The `starts` after those that are `done`, with a bar where there are many."""
    bar = {"initial": done, "total": len(starts), "disable": len(starts) < 100}
    return iter(tqdm(starts[done:], desc=what, unit="piece", leave=False, **bar))


def open_to_gradients(layer, dtype: torch.dtype) -> torch.Tensor | None:
    """Cuts a layer off from what came before, and returns the tensor to which its gradient then goes; None if there is
    nothing before."""
    name = layer.gradient_carrier
    if name == "carrier":
        before = None if layer.state is None else torch.zeros_like(layer.state[:, :, 0], dtype=dtype)
    else:
        before = getattr(layer, name, None)
    before = None if before is None else before.detach().requires_grad_()
    setattr(layer, name, before)
    return before


@dataclass
class Reading:
    """How far a batch of documents has been read, and all that is needed to go on from there."""

    layers: list
    boundaries: Boundaries | None
    gradients: list[torch.Tensor | None]
    """Of the loss of the pieces behind, by what `layers` carry into them."""
    total: torch.Tensor
    forwards: int = 0
    backwards: int = 0
    """Pieces."""

    def contents(self) -> dict[str, Any]:
        """For `pack`."""
        layers = [None if layer is None else contents(layer) for layer in self.layers]
        return {**vars(self), "layers": layers, "boundaries": self.boundaries and self.boundaries.contents()}

    def refill(self, held: dict[str, Any]) -> None:
        """Makes a new reading into the one that `contents` is of."""
        for layer, z in zip(self.layers, held["layers"], strict=True):
            if z is not None:
                refill(layer, z)
        if self.boundaries is not None:
            self.boundaries.refill(held["boundaries"])
        self.gradients, self.total = held["gradients"], held["total"]
        self.forwards, self.backwards = held["forwards"], held["backwards"]


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

    def begin(self, batch: Batch, context: str, reading: Reading) -> Reading:
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

    def save(self, batch: Batch, reading: Reading) -> None:
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


def backward_through_time(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Adds to every parameter's `.grad` the gradient of the mean loss over whole documents, and returns that loss.

    Args:
        model: a causal language model of layers with a state of fixed size; around it, feedback with
            `training_solver="sequential"`, which is then stepped token by token.
        input_ids: `[B, T]`.
        labels: `[B, T]`, the `input_ids` themselves (they are shifted here), −100 where there is no loss.
        chunk_size: tokens of a piece, whose activations are in memory together. Any number does.
        attention_mask: `[B, T]`, 0 on padding.
        num_items_in_batch: what the sum of the losses is divided by; by default, the number of tokens with a loss.
        progress: where to keep, from time to time, how far it has come.

    Raises:
        ValueError: for a model with other layers, no tokens, `labels` of another shape, or a `chunk_size` below 1.
        RuntimeError: if running backwards does not lead to the state at the beginning; the gradients would be wrong.
    """
    batch = Batch(model, input_ids, labels, chunk_size, attention_mask, num_items_in_batch)
    progress, dtype = progress or Progress(), torch.promote_types(model.dtype, torch.float32)
    layers = batch.layers()
    for layer in rewindable(layers):
        layer.words = Words()
    total = torch.zeros((), device=input_ids.device)
    reading = progress.begin(batch, "unbounded", Reading(layers, Boundaries(), [None] * len(layers), total))
    with torch.no_grad():
        for start in pieces(batch.starts, reading.forwards, "forwards"):
            if kept := [z for z in reading.layers if not isinstance(z, RewindableLayer)]:
                reading.boundaries.push(kept)
            reading.total += batch.read(start, reading.layers)
            reading.forwards += 1
            progress.save(batch, reading)
    for layer in rewindable(reading.layers):
        layer.backwards = True
    reading.layers = [z if isinstance(z, RewindableLayer) else None for z in reading.layers]
    for start in pieces(batch.starts[::-1], reading.backwards, "backwards"):
        kept = [z for z in batch.layers() if not isinstance(z, RewindableLayer)]
        stored = iter(reading.boundaries.pop(kept) if kept else [])
        layers = [next(stored) if z is None else z for z in reading.layers]
        before = [open_to_gradients(layer, dtype) for layer in layers]
        loss = batch.read(start, layers)
        after = [getattr(layer, layer.gradient_carrier) for layer in layers]
        pairs = zip(after, reading.gradients, strict=True)
        known = [(z, g) for z, g in pairs if g is not None and z is not None and z.requires_grad]
        torch.autograd.backward([loss, *(z for z, _ in known)], [None, *(g for _, g in known)])
        reading.gradients = [None if z is None else z.grad for z in before]
        for layer in rewindable(layers):
            layer.carrier = None
        reading.layers = [z if isinstance(z, RewindableLayer) else None for z in layers]
        reading.backwards += 1
        progress.save(batch, reading)
    progress.end()
    states = [layer.state for layer in rewindable(reading.layers)]
    if any(state.any() for state in states):
        raise RuntimeError(
            "Running backwards did not lead to the empty state that the documents began with: something was not "
            "computed again as it was the first time. The gradients are wrong; do not change the number of threads "
            "meanwhile."
        )
    return reading.total


def rewindable(layers: list) -> list[RewindableLayer]:
    return [layer for layer in layers if isinstance(layer, RewindableLayer)]


def truncated_backward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """States go on from piece to piece, gradients do not: what people do today. Arguments: `backward_through_time`."""
    batch = Batch(model, input_ids, labels, chunk_size, attention_mask, num_items_in_batch)
    progress, total = progress or Progress(), torch.zeros((), device=input_ids.device)
    reading = progress.begin(batch, "truncated", Reading(batch.layers(), None, [], total))
    for start in pieces(batch.starts, reading.forwards, "truncated"):
        loss = batch.read(start, reading.layers)
        loss.backward()
        reading.total += loss.detach()
        for layer in reading.layers:
            name = layer.gradient_carrier
            setattr(layer, name, None if name == "carrier" else getattr(layer, name).detach())
        reading.forwards += 1
        progress.save(batch, reading)
    progress.end()
    return reading.total


CONTEXTS: dict[str, Callable[..., torch.Tensor]] = {"unbounded": backward_through_time, "truncated": truncated_backward}


class Documents(Dataset):
    """The tokens of whole documents, each closed by the end token, in a file that is memory-mapped.

    A document is tokenised in parts of about `PART` characters, cut after a line.

    An item is the `input_ids` of a document.
    """

    PART = 1_000_000

    def __init__(self, path: str | Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, write: bool = True):
        """`write`: False if another process has written the files."""
        path, ends_path = Path(path), Path(f"{path}.ends.npy")
        if write:
            ends = [0]
            with path.open("wb") as file:
                for text in texts:
                    for number, part in enumerate(self.parts(text)):
                        ids = tokenizer(part, add_special_tokens=number == 0)["input_ids"]
                        np.asarray(ids, dtype=np.int32).tofile(file)
                    np.array([tokenizer.eos_token_id], dtype=np.int32).tofile(file)
                    ends.append(file.tell() // 4)
            np.save(ends_path, ends)
        self.tokens, self.ends = np.memmap(path, dtype=np.int32, mode="r"), np.load(ends_path)

    def parts(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            end = text.find("\n", start + self.PART) + 1 or len(text)
            yield text[start:end]
            start = end

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.tokens[self.ends[index] : self.ends[index + 1]]}


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Documents of different lengths, right-padded; what is padding, the mask says."""
    ids = [torch.from_numpy(np.array(example["input_ids"], dtype=np.int64)) for example in examples]
    together = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(document) for document in ids])
    real = torch.arange(together.shape[1]) < lengths[:, None]
    batch = {"input_ids": together, "labels": together.masked_fill(~real, -100)}
    return batch if real.all() else {**batch, "attention_mask": real.long()}


def check_arguments(arguments: TrainingArguments) -> None:
    """Raises a ValueError for what steps over whole documents do not do."""
    if arguments.fp16 or arguments.n_gpu > 1:
        raise ValueError(
            "Whole documents are not trained on with fp16 or several GPUs a process; use fp32 or bf16, and DDP."
        )
    other_loss = arguments.label_smoothing_factor or not arguments.average_tokens_across_devices
    if other_loss or arguments.gradient_checkpointing:
        raise ValueError(
            "Whole documents are trained on with the mean loss over all tokens: leave out label_smoothing_factor, "
            "gradient_checkpointing and average_tokens_across_devices=False."
        )


class WholeDocuments:
    """Mixed into a Trainer: a step is one over whole documents, read in pieces of `chunk_size`; see `CONTEXTS`.

    Every `progress_seconds`, how far a document has been read is kept in the output folder. Resumed from a checkpoint,
    a run goes on from there when it comes to that document again.
    """

    def __init__(
        self, *args, context: str = "unbounded", chunk_size: int = 1024, progress_seconds: float = 300, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.context, self.chunk_size, self.progress_seconds = context, chunk_size, progress_seconds
        check_recurrent(self.model)  # type: ignore[attr-defined]
        self.add_callback(DeleteProgress())  # type: ignore[attr-defined]
        check_arguments(self.args)  # type: ignore[attr-defined]
        if self.compute_loss_func:  # type: ignore[attr-defined]
            raise ValueError("Whole documents are trained on with the mean loss: leave out compute_loss_func.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise ValueError("Whole documents are not trained on with FSDP or DeepSpeed; use DDP.")

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Leaves gradients as Trainer's own does: of the tokens' mean loss over accumulated batches and processes."""
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        whole = accelerator.unwrap_model(model)
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            loss = CONTEXTS[self.context](
                whole,
                chunk_size=self.chunk_size,
                num_items_in_batch=num_items_in_batch,
                progress=Progress(folder, self.progress_seconds),
                **inputs,
            )
        if accelerator.num_processes > 1 and accelerator.sync_gradients:
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad = accelerator.reduce(parameter.grad, "sum")
        # Trainer takes the mean over the processes of what it logs.
        return loss * accelerator.num_processes
