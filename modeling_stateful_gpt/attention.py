"""Causal softmax attention as a token mixer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Cache

from .compat import ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb, create_mask
from .linear import residual_projection

if TYPE_CHECKING:
    from .configuration_gateloop import GateLoopConfig


def eager_attention(
    module: "Attention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q kᵀ / √d + mask) v` (Vaswani et al. 2017, eq. 1), the reference for the fused implementations.

    `query` is `[B, H, T, d]`, `key` and `value` are `[B, H_kv, S, d]` with H a multiple of H_kv. Returns the output
    `[B, T, H, d]` and the weights `[B, H, T, S]`. Without 1/√d, the variance of a product of d terms would grow with
    d and saturate the softmax. The mask is −∞ (its smallest finite stand-in) on the future and on padding.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Causal softmax attention with grouped key/value heads: each token reads every earlier token and itself.

    This is how a transformer handles time: nothing is carried from step to step, every step looks at all of the past,
    and during training all steps are computed at once.
    """

    keep_in_fp32: str | None = None
    """The modules, as a regular expression, that stay in fp32 in a model of another type."""

    @staticmethod
    def create_mask(config: "GateLoopConfig", **kwargs) -> torch.Tensor | None:
        """What this mixer needs to know of padding, packing and the past, made once per forward and layer type."""
        return create_mask(config=config, layer_idx=config.layer_types.index("full_attention"), **kwargs)

    def __init__(self, config: "GateLoopConfig", layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = residual_projection(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]` and the attention weights, where they are computed."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights
