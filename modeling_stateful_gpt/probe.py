"""What a short text shows of a language model: how far rounding moves its states, and how it can be run."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache

from .backbone import Backbone, Probe, evaluation_mode
from .cache import can_scatter
from .compat import is_sharded
from .recurrence import LanguageModelRecurrence
from .solvers import Recurrence, relative_change, sequential

PROBE_LENGTH = 16
"""Tokens of the text, taken from all over the vocabulary."""


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
        return Probe(floor, refused=f"on some of them it raises {type(error).__name__}: {error}")
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


@torch.compiler.disable
def probe(backbone: Backbone, batch: int = 1, device: torch.device | None = None) -> Probe:
    """What a short text shows of the language model in the data type and attention at hand, found once for each.

    Args:
        batch: rows of the text, as adapters may be named for each row.
        device: where the embeddings of a text are; by default that of their weights.
    """
    language_model, dtype = backbone.language_model, backbone.language_model.dtype
    device = device or backbone.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    key = (language_model.config._attn_implementation, dtype)
    if key not in backbone.traits.probed:
        with evaluation_mode(language_model):
            seen = probe_recurrence(*probe_text(backbone, batch, device), torch.finfo(dtype).eps)
        backbone.traits.probed[key] = seen
    return backbone.traits.probed[key]


@torch.no_grad()
def probe_text(
    backbone: Backbone, batch: int, device: torch.device
) -> tuple[Callable[[torch.Tensor], LanguageModelRecurrence], torch.Tensor]:
    """The recurrence of a short text, from its embeddings, in which no state is read; and these, `[B, T, D]`."""
    ids = torch.linspace(0, backbone.text_config.vocab_size - 1, PROBE_LENGTH).long().to(device).expand(batch, -1)
    recurrence = partial(plain_recurrence, backbone, **backbone.inputs_of_tokens(ids, {}))
    return recurrence, backbone.language_model.get_input_embeddings()(ids)


def plain_recurrence(backbone: Backbone, embeds: torch.Tensor, **kwargs) -> LanguageModelRecurrence:
    recurrence = LanguageModelRecurrence(backbone, torch.nn.Identity(), embeds, **kwargs)
    recurrence.fuse = lambda e, h, has_previous: e  # type: ignore[method-assign]
    recurrence.split = True
    recurrence.in_lockstep = recurrence.sharded
    return recurrence


def steps_differ(backbone: Backbone) -> bool:
    """Whether the language model, by itself, steps with a cache to other states than it reads a text to."""
    floor = max(probe(backbone, 2).rounding_floor, torch.finfo(backbone.language_model.dtype).eps)
    with evaluation_mode(backbone.language_model):
        return steps_apart(*probe_text(backbone, 2, backbone.device)) > 64 * floor


@torch.compiler.disable
def takes_in_padding(backbone: Backbone, batch: int) -> bool:
    """Whether padding before a text changes the states of a language model with layers that have one: a bias on what
    they read gets in, though the mask hides the rest. (Older versions of transformers do not mask a batch of one.)"""
    key = ("padding", batch > 1, backbone.language_model.dtype, backbone.language_model.config._attn_implementation)
    if key not in backbone.traits.probed:
        with evaluation_mode(backbone.language_model), torch.no_grad():
            _, embeds = probe_text(backbone, batch, backbone.device)
            padded = torch.cat([embeds[:, :4], embeds], dim=1)
            mask = torch.ones(padded.shape[:2], dtype=torch.long, device=padded.device)
            mask[:, :4] = 0
            alone = backbone.run(embeds, None, torch.ones_like(mask[:, 4:]), None).last_hidden_state
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            after = backbone.run(padded, None, mask, positions).last_hidden_state[:, 4:]
        change = relative_change(after, alone, torch.ones_like(mask[:, 4:]).bool())
        floor = max(probe(backbone, batch).rounding_floor, torch.finfo(backbone.language_model.dtype).eps)
        backbone.traits.probed[key] = bool(change.median() > 64 * floor)
    return backbone.traits.probed[key]


@torch.compiler.disable
def refuse_padding(backbone: Backbone, attention_mask: torch.Tensor | None) -> None:
    """Raises a ValueError for padding that the language model would take in."""
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.all():
        return
    # Where the weights are sharded, a probe takes all processes, and only this one may have padding.
    if not is_sharded(backbone.language_model) and takes_in_padding(backbone, len(attention_mask)):
        raise ValueError(
            f"{type(backbone.language_model).__name__} takes padding into its state here, as it does without feedback: "
            f"a bias on what it reads gets past the mask. Give it texts without padding, one by one."
        )


def why_no_groups(backbone: Backbone, batch: int = 1, device: torch.device | None = None) -> str | None:
    """Why the language model cannot be run on some positions at a time, over keys and values written before; None where
    it can. Arguments as in `probe`."""
    config = backbone.language_model.config
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"{config._attn_implementation} attention takes no such mask; eager and sdpa do"
    if named := [name for name in ("alibi", "window_size") if getattr(config, name, None)]:
        return f"its {named[0]} makes masks of its own"
    if getattr(config, "attn_temperature_tuning", None) and hasattr(config, "floor_scale"):
        return "its attn_temperature_tuning counts the tokens it is given"
    if not can_scatter(DynamicCache(config=config)):
        return "not every layer attends to the past"
    return probe(backbone, batch, device).refused
