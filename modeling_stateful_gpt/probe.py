"""What a short text shows of a language model: how far rounding moves its states, and how it can be run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .solvers import Recurrence, relative_change, sequential

PROBE_LENGTH = 16
"""Tokens of the text, taken from all over the vocabulary."""


@dataclass(frozen=True)
class Probe:
    """`rounding_floor`: the median over positions of the relative change (see `relative_change`) of a state whose input
    moves by one unit in the last place; two evaluations in another order differ by as much. `refused`: why the language
    model cannot be run on some positions at a time, None if it can."""

    rounding_floor: float = 0.0
    refused: str | None = None


@torch.no_grad()
def probe_recurrence(recurrence: Callable[[torch.Tensor], Recurrence], embeds: torch.Tensor, eps: float) -> Probe:
    """
    Args:
        recurrence: makes the recurrence of the embeddings it is given, in which no position reads a state.
        embeds: `[B, T, D]`.
        eps: one unit in the last place of the data type in which the language model computes.
    """
    signs = (torch.arange(embeds.numel(), device=embeds.device) % 2 * 2 - 1).view_as(embeds)
    plain = recurrence(embeds)
    states = plain.sweep(None)
    if not states.isfinite().all():
        return Probe(refused="its states are not finite")
    moved = relative_change(recurrence(embeds * (1 + eps * signs).to(embeds.dtype)).sweep(None), states, plain.real)
    floor = moved.median().item()
    try:
        in_groups = recurrence(embeds)
        whole = in_groups.sweep_groups(None, 0, 1)
        change = relative_change(in_groups.sweep_groups(whole, 0, 3), states, plain.real)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return Probe(floor, refused=f"{type(error).__name__}: {error}")
    least = 16 * eps
    differs = change.max() > 8 * moved.max().clamp(min=least) or change.median() > 4 * max(floor, least)
    return Probe(floor, refused="it makes masks of its own" if differs else None)


@torch.no_grad()
def steps_apart(recurrence: Callable[[torch.Tensor], Recurrence], embeds: torch.Tensor) -> float:
    """How far the states of stepping with a cache are from those of reading all at once, at three positions of four: no
    further than rounding goes, if both compute one function. Arguments as for `probe_recurrence`."""
    plain = recurrence(embeds)
    states = plain.sweep(None)
    change = relative_change(sequential(recurrence(embeds)).hidden_states, states, plain.real)
    return change.quantile(0.75).item()
