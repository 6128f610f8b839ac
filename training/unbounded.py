"""Backpropagation through documents of any length, in the memory of a piece of them.

    loss = backward_through_time(model, input_ids, labels, chunk_size=1024)   # as loss.backward() would, into .grad

The document is read once, keeping of each layer only its last state; then once more from its end, piece by piece: what
each layer's state was at the beginning of a piece is rebuilt, the piece is computed again, with gradients, and the
gradient of that state is passed on to the piece before. Reversible layers rebuild their states by running backwards
(with the lost bits, if they forget); those of GateLoop layers, which are small, are kept for the beginning of each piece.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DynamicCache, PreTrainedModel

from modeling_stateful_gpt.cache import GateLoopStateLayer, ReversibleStateLayer
from modeling_stateful_gpt.reversible import Words


class RewindableLayer(ReversibleStateLayer):
    """A reversible layer's state in the course of one document: first forwards, then, with gradients, backwards."""

    _layer_type = "rewindable"  # A class by which transformers would make caches, if it had the type of its parent.

    def __init__(self) -> None:
        super().__init__()
        self._layer_type = "reversible"
        self.words, self.backwards = Words(), False

    def update(self, x, recur, **inputs):
        self.carrier_before = x.new_zeros(len(x), 2, x.shape[-1] // 2, requires_grad=self.backwards)
        y, self.state, self.carrier = recur(
            self.state, x, **inputs, carrier=self.carrier_before, words=self.words, backwards=self.backwards
        )
        return y, self.state


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
    wrong = [f"{number} ({kind})" for number, kind in enumerate(layer_types) if kind not in ("gateloop", "reversible")]
    if wrong:
        raise ValueError(
            f"Unbounded context needs layers whose past is a state of fixed size, gateloop or reversible. These look "
            f"back at every token, or are unknown: layers {', '.join(wrong)}. Train this model on blocks of text."
        )
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
        ValueError: for a model with other layers, an empty document, or a `chunk_size` below 1.
        RuntimeError: if the states at the beginning are not found again, so that the gradients would be wrong.
    """
    check_recurrent(model)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
    if input_ids.numel() == 0:
        raise ValueError("The documents have no tokens.")
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if num_items_in_batch is None:
        num_items_in_batch = max(int((targets != -100).sum()), 1)
    seed = int(torch.randint(2**62, ()))
    starts = range(0, input_ids.shape[1], chunk_size)

    def read(start: int, layers: list) -> torch.Tensor:
        """The loss of a piece; leaves the states after it in `layers`."""
        piece = slice(start, start + chunk_size)
        # Fresh counts of tokens: a mask is then of this piece only.
        for layer in layers:
            layer.seen = 0
        cache = DynamicCache()
        cache.layers = layers
        with same_dropout(seed + start):
            return model(
                input_ids=input_ids[:, piece],
                attention_mask=None if attention_mask is None else attention_mask[:, piece],
                labels=labels[:, piece],
                shift_labels=targets[:, piece].contiguous(),
                num_items_in_batch=num_items_in_batch,
                past_key_values=cache,
                use_cache=True,
            ).loss

    kinds = {"gateloop": GateLoopStateLayer, "reversible": RewindableLayer}
    layers = [kinds[kind]() for kind in model.config.layer_types]
    rewindable = [layer for layer in layers if isinstance(layer, RewindableLayer)]
    others = [layer for layer in layers if not isinstance(layer, RewindableLayer)]
    total = torch.zeros((), device=input_ids.device)
    with contextlib.ExitStack() as stack:
        boundaries = Boundaries(Path(stack.enter_context(TemporaryDirectory())) if offload else None)
        with torch.no_grad():
            for start in starts:
                boundaries.push([layer.state for layer in others])
                total += read(start, layers)
        gradients: list[torch.Tensor | None] = [None] * len(layers)
        for layer in rewindable:
            layer.backwards = True
        for start in reversed(starts):
            for layer, state in zip(others, boundaries.pop(), strict=True):
                layer.state = None if state is None else state.requires_grad_()
            before = [layer.state for layer in others]
            loss = read(start, layers)
            after = [layer.carrier for layer in rewindable] + [layer.state for layer in others]
            known = [(z, gradient) for z, gradient in zip(after, gradients, strict=True) if gradient is not None]
            torch.autograd.backward([loss, *(z for z, _ in known)], [None, *(gradient for _, gradient in known)])
            gradients = [layer.carrier_before.grad for layer in rewindable]
            gradients += [None if state is None else state.grad for state in before]
    for layer in rewindable:
        if layer.words.number or layer.state[:, :, 0].any():
            raise RuntimeError(
                "Running backwards did not lead to the empty state that the document began with: something was not "
                "computed again as it was the first time. The gradients are wrong; use another chunk_size, and one "
                "number of threads throughout."
            )
    return total
