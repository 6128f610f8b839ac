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
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import safetensors.torch
import torch
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    PreTrainedModel,
)
from transformers.utils import logging

from .cache_layers import RECURRENT_LAYERS, LastHiddenStateLayer, RecurrentStateLayer
from .compat import checkpointing
from .fixed_point import Words
from .progress import Progress, contents, pack, refill, unpack
from .reversible_layers import ReversibleStateLayer

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
