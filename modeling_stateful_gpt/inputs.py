"""What a forward is given: look-ups in tables, checks, masks and positions."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from .cache import has_recurrent_layers, past_length
from .compat import StaticLayer
from .generation_gateloop import position_limit
from .ranges import check_name
from .timeline import find_packed, find_tokens, of_new_tokens

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, field: str) -> T:
    check_name(field, name, table)
    return table[name]


def embed_tokens(embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """`embedding(input_ids)`; on the CPU, a token id outside the vocabulary raises an error that names it."""
    try:
        return embedding(input_ids)
    except IndexError as error:
        raise IndexError(
            f"input_ids contains {int(input_ids.max())} (smallest: {int(input_ids.min())}), but the model's vocabulary "
            f"has {embedding.num_embeddings} tokens. Use the tokenizer saved with the checkpoint, or enlarge the "
            f"vocabulary with model.resize_token_embeddings(len(tokenizer))."
        ) from error


def check_inputs(
    config: PreTrainedConfig,
    length: int,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Refuses an empty sequence, one longer than the model's positions, and a batch that is all padding.

    With a cache, a piece of a prompt may rightly be all padding. What is no cache, or a full one, is refused as well.
    """
    if length == 0:
        raise ValueError("The input has no tokens; give each text at least one (e.g. the tokenizer's bos token).")
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"attention_mask is of type {type(attention_mask).__name__}; it must be a tensor [B, past + T], 0 on "
            f"padding. Masks for each type of layer, and BlockMasks, are made from it."
        )
    if past_key_values is not None and not hasattr(past_key_values, "layers"):
        raise ValueError(
            f"past_key_values is of type {type(past_key_values).__name__}; it must be a DynamicCache, a StaticCache or "
            f"another transformers.Cache of one layer for each of the model's."
        )
    if torch.compiler.is_compiling():
        return
    past = int(past_length(past_key_values))
    static = (layer for layer in getattr(past_key_values, "layers", ()) if type(layer) is StaticLayer)
    room = min((layer.max_cache_len for layer in static), default=None)
    if room is not None and past + length > room:
        raise ValueError(
            f"The static cache has room for {room} tokens; {past} are in it, and {length} more do not fit. Make it "
            f"with a larger max_cache_len."
        )
    limit = position_limit(config)
    if limit is not None and past + length > limit:
        raise ValueError(
            f"The sequence has {past + length} tokens; the model's max_position_embeddings is {limit}. Shorten the "
            f"input, or, where the model has no learned positions, raise config.max_position_embeddings."
        )
    if past_key_values is None and attention_mask is not None and not attention_mask.any():
        raise ValueError(
            "attention_mask is zero everywhere: the batch is all padding. Leave out empty texts, or give each at "
            "least one token (e.g. the tokenizer's bos token)."
        )


def default_position_ids(
    length: int, attention_mask: torch.Tensor | None, past_key_values: Cache | None, device: torch.device
) -> torch.Tensor:
    """Positions `[B or 1, length]` of the tokens after the cached ones, counted without padding."""
    past = past_length(past_key_values)
    if attention_mask is not None and attention_mask.ndim == 2:
        return of_new_tokens((attention_mask.cumsum(-1) - 1).clamp(min=0), past, length)
    return (torch.arange(length, device=device) + past).unsqueeze(0)


def read_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> torch.Tensor | None:
    """The mask as transformers' own models read it: of a 2-D one, all that is not zero is a token.

    Columns after the last new token say nothing. A mask that is made once for all steps has them, with a static cache
    above all. What is 2-D comes back as zeros and ones.

    Raises:
        ValueError: for a mask of another shape or type.
    """
    if attention_mask is None:
        return None
    batch, length, _ = inputs_embeds.shape
    stateful = has_recurrent_layers(config)
    past, shape = past_length(past_key_values), list(attention_mask.shape)
    fits = shape[0] == batch if len(shape) == 2 else len(shape) == 4 and shape[2] == length and not stateful
    if fits and not torch.compiler.is_compiling():
        unused = shape[-1] - int(past) - length
        fits = unused == 0 or (unused > 0 and past_key_values is not None and not stateful)
    if not fits:
        who = "layers with a state need" if stateful else "it must be"
        raise ValueError(
            f"attention_mask is {shape}; {who} [batch, past + new tokens], here [{batch}, {past} + {length}], 0 on "
            f"padding."
        )
    if attention_mask.ndim == 2:
        return (attention_mask != 0).long()
    if not attention_mask.is_floating_point() and (
        attention_mask.dtype != torch.bool or config._attn_implementation == "eager"
    ):
        raise ValueError(
            f"A 4-D attention_mask cannot be of type {attention_mask.dtype} here. It must be of a floating-point type, "
            f"0 where a token is read; with attention other than eager, it may be torch.bool, True where it is read."
        )
    return attention_mask


def create_state_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`is_token` and `is_first` `[B, T]` (see `GateLoopLayer.forward`), None where they would change nothing.

    A token is the first of its sequence if the mask hides all tokens before it, or where packed sequences begin.
    """
    batch, length, _ = inputs_embeds.shape
    is_first = find_packed(attention_mask, position_ids, past_key_values)
    if is_first is not None:
        is_first = is_first.expand(batch, -1)
    compiling = torch.compiler.is_compiling()
    if attention_mask is None or (not compiling and attention_mask.all()):
        return None, is_first
    is_token, past = find_tokens(attention_mask, past_key_values, length), past_length(past_key_values)
    if not compiling and past == 0:  # Padding leaves the empty state as it is.
        return is_token, None
    return is_token, is_token & (of_new_tokens(attention_mask.cumsum(-1), past, length) == 1)
