"""Which slots of a batch hold tokens, where sequences begin, and which slot holds the previous token."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache

from .cache import past_length


def of_new_tokens(columns: torch.Tensor, past: int | torch.Tensor, length: int) -> torch.Tensor:
    """Of `[B, past + length]`, or of more columns, those of the new tokens: `[B, length]`."""
    return columns.index_select(1, torch.arange(length, device=columns.device) + past)


def first_of_sequence(position_ids: torch.Tensor) -> torch.Tensor:
    """`[B, T]`: where a packed sequence begins. Whatever does not follow its predecessor is another sequence."""
    return (position_ids == 0) | nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0))


def find_tokens(attention_mask: torch.Tensor | None, cache: Cache | None, length: int) -> torch.Tensor | None:
    """`[B, T]`: which of the new slots hold a token; None where nothing says that one does not (no mask, or a 4-D
    one)."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return of_new_tokens(attention_mask, past_length(cache), length).bool()


def find_packed(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor | None:
    """`[B or 1, T]`: where packed sequences begin; None where nothing is packed.

    As in transformers, positions say so where there is neither a mask nor a cache. With a 4-D mask, position 0 does.
    """
    if position_ids is None:
        return None
    if attention_mask is None:
        return first_of_sequence(position_ids) if cache is None else None
    return position_ids == 0 if attention_mask.ndim == 4 else None


@dataclass(frozen=True)
class Timeline:
    """Slots are counted from the one before the sequence: that is slot 0, and position t is slot t + 1."""

    is_token: torch.Tensor
    """`[B, T]`, False on padding."""
    is_first: torch.Tensor | None
    """`[B or 1, T]`, True where a packed sequence begins; None where nothing is packed."""
    last_slot: torch.Tensor
    """`[B, T]`: the slot of the last token up to each position, itself included."""
    previous_slot: torch.Tensor
    """`[B, T]`: the slot of the last token before each position."""

    def has_previous(self, initial: torch.Tensor) -> torch.Tensor:
        """`[B, T]`: whether there is a token before, given for which rows there is one before the sequence, `[B]`."""
        has_previous = (self.previous_slot > 0) | initial[:, None]
        return has_previous if self.is_first is None else has_previous & ~self.is_first


def make_timeline(
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    device: torch.device,
) -> Timeline:
    """The timeline of `[batch, length]` new slots. Arguments as those of a forward."""
    is_token = find_tokens(attention_mask, cache, length)
    if is_token is None:
        is_token = torch.ones(batch, length, dtype=torch.bool, device=device)
    slots = torch.arange(1, length + 1, device=device).expand(batch, -1)
    last_slot = torch.where(is_token, slots, 0).cummax(dim=1).values
    previous_slot = nn.functional.pad(last_slot[:, :-1], (1, 0))
    return Timeline(is_token, find_packed(attention_mask, position_ids, cache), last_slot, previous_slot)
