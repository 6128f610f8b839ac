"""Orders of a row's positions in which the group of a token depends on its own sequence alone.

The cyclic solver splits a row by `slot % num_groups`, and a fixed number of its passes gives each group other states.
Padding before a sequence, or another sequence packed before it, must not move a token to another group.
"""

import torch
from torch import nn
from transformers import Cache

from .cache import can_reorder, can_scatter, gather_slots, past_length
from .cache_layers import LastHiddenStateLayer
from .timeline import first_of_sequence, of_new_tokens


class Alignment:
    """Puts the T positions of each row in another order, and what comes of it back.

    Args:
        order: `[B, T']`, the position that each place takes its token from.
        places: `[B, T]`, the place of each position.
    """

    def __init__(self, order: torch.Tensor, places: torch.Tensor):
        self.order, self.places = order, places

    def align(self, z: torch.Tensor) -> torch.Tensor:
        """`z` `[B or 1, T, …]` in the order of this alignment, `[B, T', …]`."""
        return gather_slots(z, self.order)

    def restore(self, z: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`z` `[B, …, T', …]`, T' being its dimension `dim`, in the order of the row."""
        return gather_slots(z, self.places, dim)

    def align_mask(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        return attention_mask

    def restore_states(self, layer: LastHiddenStateLayer) -> None:
        """There is no cache where sequences are packed."""

    def restore_output(self, output) -> None:
        """Restores what a forward returns."""
        output.last_hidden_state = self.restore(output.last_hidden_state)
        for name in ("pass_hidden_states", "hidden_states", "router_logits"):
            if output.get(name) is not None:
                output[name] = tuple(self.restore(h) for h in output[name])
        if output.attentions is not None:
            output.attentions = tuple(
                a if a is None else self.restore(self.restore(a, 2), 3) for a in output.attentions
            )


class PaddingAlignment(Alignment):
    """Puts each row's tokens first and its padding last, or the padding first.

    Args:
        attention_mask: `[B, past + T]`, 0 on padding.
        past: how many tokens are in the cache already.
        padding_first: for layers with a state, which has read all that is behind it.
    """

    def __init__(self, attention_mask: torch.Tensor, past: int, length: int, padding_first: bool = False):
        real = of_new_tokens(attention_mask, past, length).bool().long()
        order = real.argsort(dim=1, descending=not padding_first, stable=True)
        super().__init__(order, order.argsort(dim=1))
        self.places_read, self.past = real.cumsum(1), past
        if padding_first:
            self.places_read += (1 - real).sum(1, keepdim=True)

    def align_mask(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        new = of_new_tokens(attention_mask, self.past, self.order.shape[1])
        return torch.cat([attention_mask[:, : self.past], self.align(new)], dim=1)

    def restore_states(self, layer: LastHiddenStateLayer) -> None:
        """What a layer has recorded: after each slot, the state of the last token up to there."""
        length = self.order.shape[1]
        if layer.keys.shape[2] < length:  # It keeps the last one alone, which is the same in any order.
            return
        for name in ("keys", "values"):
            held = getattr(layer, name)
            earlier, recorded = held[:, :, :-length], held[:, :, -length:]
            before = earlier[:, :, -1:] if earlier.shape[2] > 0 else torch.zeros_like(recorded[:, :, :1])
            after = gather_slots(torch.cat([before, recorded], dim=2), self.places_read, dim=2)
            setattr(layer, name, torch.cat([earlier, after], dim=2))


class PackingAlignment(Alignment):
    """Lets each packed sequence begin at a multiple of `num_groups`.

    The places between two sequences, fewer than `num_groups`, are taken by copies of the next token. No token follows
    itself, so each is a sequence of its own, which nobody reads.

    Args:
        position_ids: `[B, T]`.
    """

    def __init__(self, position_ids: torch.Tensor, num_groups: int):
        first = first_of_sequence(position_ids)
        slots = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        lengths = slots - torch.where(first, slots, 0).cummax(dim=1).values + 1
        gaps = nn.functional.pad((-lengths[:, :-1]) % num_groups, (1, 0)) * first
        places = slots + gaps.cumsum(dim=1)
        every_place = torch.arange(int(places.max()) + 1, device=places.device).expand(len(places), -1)
        following = torch.searchsorted(places, every_place.contiguous())
        super().__init__(following.clamp(max=slots.shape[1] - 1), places)


def find_group_alignment(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    shape: torch.Size,
    num_groups: int,
) -> Alignment | None:
    """The alignment that groups of positions need in a batch of `shape` `[B, T]`; None where the tokens of each row are
    one sequence from its first slot on, and where their order cannot be changed (a 4-D mask, another cache)."""
    length = shape[1]
    if num_groups == 1:
        return None
    if attention_mask is None:
        # A program of fixed shapes has no place for more positions.
        if position_ids is None or cache is not None or torch.compiler.is_exporting():
            return None
        return find_packing(position_ids.expand(shape), num_groups)
    if attention_mask.ndim != 2 or (cache is not None and not can_scatter(cache)):
        return None
    return find_padding(attention_mask, int(past_length(cache)), length, padding_first=False)


def find_padding(attention_mask: torch.Tensor, past: int, length: int, padding_first: bool) -> Alignment | None:
    # A graph cannot look at the mask.
    if not torch.compiler.is_compiling():
        turns = of_new_tokens(attention_mask, past, length).bool().long().diff(dim=1)
        if not (turns == (-1 if padding_first else 1)).any():
            return None
    return PaddingAlignment(attention_mask, past, length, padding_first)


@torch.compiler.disable
def find_packing(position_ids: torch.Tensor, num_groups: int) -> Alignment | None:
    """Not compiled: how many places it takes depends on where the sequences begin."""
    return PackingAlignment(position_ids, num_groups) if first_of_sequence(position_ids)[:, 1:].any() else None


def find_state_alignment(
    name: str,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    length: int,
) -> Alignment | None:
    """The alignment that a model of class `name` needs, whose layers with a state have read all that is behind them: no
    padding may be behind a token."""
    if attention_mask is None:
        if position_ids is not None and cache is None and first_of_sequence(position_ids)[:, 1:].any():
            raise ValueError(
                f"{name} has layers with a state, which packed sequences would share. Give each sequence a row."
            )
        return None
    if attention_mask.ndim != 2:
        return None
    alignment = find_padding(attention_mask, int(past_length(cache)), length, padding_first=True)
    if alignment is not None and cache is not None and not can_reorder(cache):
        raise ValueError(
            f"{name} has layers with a state, and others whose past cannot be put in another order. With a cache, "
            f"its padding must be on the left (tokenizer.padding_side='left')."
        )
    return alignment
