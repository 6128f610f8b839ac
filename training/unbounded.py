"""Backpropagation through documents of any length, in the memory of a piece of them.

    loss = backward_through_time(model, input_ids, labels, chunk_size=1024)   # as loss.backward() would, into .grad

The document is read once, keeping of each layer only its last state; then once more from its end, piece by piece: what
each layer's state was at the beginning of a piece is rebuilt, the piece is computed again, with gradients, and the
gradient of that state is passed on to the piece before. Reversible layers rebuild their states by running backwards
(with the lost bits, if they forget); those of GateLoop layers, which are small, are kept for the beginning of each
piece.

`train.py --context unbounded --chunk_size 1024` uses it. For a Trainer of your own:

    class DocumentTrainer(WholeDocuments, Trainer): ...

    documents = Documents("tokens.int32", texts, tokenizer)
    arguments = TrainingArguments(..., remove_unused_columns=False)
    DocumentTrainer(model, arguments, data_collator=pad, train_dataset=documents, chunk_size=1024).train()
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from modeling_stateful_gpt.cache import RECURRENT_LAYER_TYPES, GateLoopStateLayer, ReversibleStateLayer
from modeling_stateful_gpt.reversible import LOWEST, Words


class RewindableLayer(ReversibleStateLayer):
    """A reversible layer's state while documents are read, forwards or backwards."""

    _layer_type = "rewindable"  # A class by which transformers would make caches, if it had the type of its parent.

    def __init__(self) -> None:
        super().__init__()
        self._layer_type = "reversible"
        self.words: Words | None = None
        self.backwards = False

    def advance(self, recur, inputs):
        return super().advance(partial(recur, words=self.words, backwards=self.backwards), inputs)


@dataclass
class Boundaries:
    """The states of GateLoop layers before each piece, in memory or, one file each, in `folder`."""

    folder: Path | None
    kept: list = field(default_factory=list)

    def push(self, states: list[torch.Tensor | None]) -> None:
        if self.folder is not None:
            path = self.folder / f"{len(self.kept)}.pt"
            torch.save(states, path)
            self.kept.append(path)
        else:
            self.kept.append(states)

    def pop(self) -> list[torch.Tensor | None]:
        kept = self.kept.pop()
        if self.folder is None:
            return kept
        states = torch.load(kept)
        kept.unlink()
        return states


def check_recurrent(model: PreTrainedModel) -> None:
    """Raises a ValueError unless all that the model carries from token to token are states of fixed size."""
    config = model.config
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    wrong = [f"{number} ({kind})" for number, kind in enumerate(layer_types) if kind not in RECURRENT_LAYER_TYPES]
    if wrong:
        raise ValueError(
            f"Unbounded context needs layers whose past is a state of fixed size, gateloop or reversible. These look "
            f"back at every token, or are unknown: layers {', '.join(wrong)}. Train this model on blocks of text."
        )
    if getattr(model, "is_activation_checkpointing", False):
        raise ValueError("Unbounded context computes again whatever it needs: leave out gradient checkpointing.")
    if getattr(config, "feedback", None) is not None:
        raise ValueError(
            "Unbounded context is for decoders without feedback: its passes over the sequence need all of it at once. "
            "Use feedback=None, or train on blocks of text."
        )


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
        self.targets = torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=-100)
        if self.num_items_in_batch is None:
            self.num_items_in_batch = (self.targets != -100).sum().clamp(min=1)
        self.seed = int(torch.randint(2**62, ()))
        self.starts = range(0, self.input_ids.shape[1], self.chunk_size)

    def layers(self) -> list:
        kinds = {"gateloop": GateLoopStateLayer, "reversible": RewindableLayer}
        return [kinds[kind]() for kind in self.model.config.get_text_config().layer_types]

    def read(self, start: int, layers: list) -> torch.Tensor:
        """The share of a piece in the loss; leaves the states after it in `layers`."""
        piece = slice(start, start + self.chunk_size)
        for layer in layers:
            layer.seen = 0  # The mask is of this piece only.
        cache = DynamicCache()
        cache.layers = layers
        with same_dropout(self.seed + start):
            return self.model(
                input_ids=self.input_ids[:, piece],
                attention_mask=None if self.attention_mask is None else self.attention_mask[:, piece],
                labels=self.labels[:, piece],
                shift_labels=self.targets[:, piece].contiguous(),
                num_items_in_batch=self.num_items_in_batch,
                past_key_values=cache,
                use_cache=True,
            ).loss

    def pieces(self, starts: range, what: str) -> Iterator[int]:
        """The `starts`, with a bar where there are many."""
        return iter(tqdm(starts, desc=what, unit="piece", leave=False, disable=len(starts) < 100))


def backward_through_time(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    offload: bool = False,
) -> torch.Tensor:
    """Adds to every parameter's `.grad` the gradient of the mean loss over whole documents, and returns that loss.

    Args:
        model: a causal language model of GateLoop and reversible layers.
        input_ids: `[B, T]`.
        labels: `[B, T]`, the `input_ids` themselves (they are shifted here), −100 where there is no loss.
        chunk_size: tokens of a piece, whose activations are in memory together. Any number does.
        attention_mask: `[B, T]`, 0 on padding.
        num_items_in_batch: what the sum of the losses is divided by; by default, the number of tokens with a loss.
        offload: keep the states of GateLoop layers at the beginnings of pieces on disk instead of in memory.

    Raises:
        ValueError: for a model with other layers, no tokens, or a `chunk_size` below 1.
        RuntimeError: if running backwards does not lead to the state at the beginning; the gradients would be wrong.
    """
    batch = Batch(model, input_ids, labels, chunk_size, attention_mask, num_items_in_batch)
    layers, dtype = batch.layers(), torch.promote_types(model.dtype, torch.float32)
    rewindable = [layer for layer in layers if isinstance(layer, RewindableLayer)]
    others = [layer for layer in layers if not isinstance(layer, RewindableLayer)]
    for layer in rewindable:
        layer.words = Words()
    total = torch.zeros((), device=input_ids.device)
    with contextlib.ExitStack() as stack:
        boundaries = Boundaries(Path(stack.enter_context(TemporaryDirectory())) if offload else None)
        with torch.no_grad():
            for start in batch.pieces(batch.starts, "forwards"):
                boundaries.push([layer.state for layer in others])
                total += batch.read(start, layers)
        gradients: list[torch.Tensor | None] = [None] * len(layers)
        for layer in rewindable:
            layer.backwards = True
        for start in batch.pieces(batch.starts[::-1], "backwards"):
            before = [None if state is None else state.requires_grad_() for state in boundaries.pop()]
            for layer, state in zip(others, before, strict=True):
                layer.state = state
            for layer in rewindable:
                layer.carrier = torch.zeros_like(layer.state[:, :, 0], dtype=dtype, requires_grad=True)
            before += [layer.carrier for layer in rewindable]
            loss = batch.read(start, layers)
            after = [layer.state for layer in others] + [layer.carrier for layer in rewindable]
            known = [(z, gradient) for z, gradient in zip(after, gradients, strict=True) if gradient is not None]
            torch.autograd.backward([loss, *(z for z, _ in known)], [None, *(gradient for _, gradient in known)])
            gradients = [None if z is None else z.grad for z in before]
    if any(layer.state[:, :, 0].any() or (layer.state[:, :, 1:] != LOWEST).any() for layer in rewindable):
        raise RuntimeError(
            "Running backwards did not lead to the empty state that the documents began with: something was not "
            "computed again as it was the first time. The gradients are wrong; do not change the number of threads "
            "meanwhile."
        )
    return total


def truncated_backward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """States go on from piece to piece, gradients do not: what people do today. Arguments: `backward_through_time`."""
    batch = Batch(model, input_ids, labels, chunk_size, attention_mask, num_items_in_batch)
    layers = batch.layers()
    total = torch.zeros((), device=input_ids.device)
    for start in batch.pieces(batch.starts, "truncated"):
        loss = batch.read(start, layers)
        loss.backward()
        total += loss.detach()
        for layer in layers:
            layer.state = layer.state.detach()
            layer.carrier = None
    return total


CONTEXTS = {"unbounded": backward_through_time, "truncated": truncated_backward}


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


class WholeDocuments:
    """Mixed into a Trainer: a step is one over whole documents, read in pieces of `chunk_size`; see `CONTEXTS`."""

    def __init__(self, *args, context: str = "unbounded", chunk_size: int = 1024, **kwargs):
        super().__init__(*args, **kwargs)
        self.context, self.chunk_size = context, chunk_size
        check_recurrent(self.model)  # type: ignore[attr-defined]
        arguments = self.args  # type: ignore[attr-defined]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        if sharded or arguments.fp16 or arguments.n_gpu > 1:
            raise ValueError(
                "Whole documents are not trained on with FSDP, DeepSpeed, fp16 or several GPUs a process; use DDP, "
                "fp32 or bf16."
            )
        other_loss = arguments.label_smoothing_factor or self.compute_loss_func  # type: ignore[attr-defined]
        if other_loss or arguments.gradient_checkpointing or not arguments.average_tokens_across_devices:
            raise ValueError(
                "Whole documents are trained on with the mean loss over all tokens: leave out label_smoothing_factor, "
                "compute_loss_func, gradient_checkpointing and average_tokens_across_devices=False."
            )

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Leaves gradients as Trainer's own does: of the tokens' mean loss over accumulated batches and processes."""
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        whole = accelerator.unwrap_model(model)
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            loss = CONTEXTS[self.context](
                whole, chunk_size=self.chunk_size, num_items_in_batch=num_items_in_batch, **inputs
            )
        if accelerator.num_processes > 1 and accelerator.sync_gradients:
            for parameter in whole.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad = accelerator.reduce(parameter.grad, "sum")
        # Trainer takes the mean over the processes of what it logs.
        return loss * accelerator.num_processes
