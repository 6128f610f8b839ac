"""A decoder-only language model from scratch, whose layers each choose their token mixer.

Read from the bottom for the whole and from the top for the parts: token mixers, MLPs, the block, the model, the head.
A new layer type is one class with the interface of `Attention` and one entry in `TOKEN_MIXERS`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache import fill_in_layers, has_recurrent_layers, past_length, refuse_last_hidden_state
from .compat import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE,
    LlamaRotaryEmbedding,
    StaticLayer,
    accept_cache,
    apply_rotary_pos_emb,
    capture_outputs,
    create_mask,
    merge_with_config_defaults,
    slice_logits_to_keep,
)
from .configuration_gateloop import GateLoopConfig
from .gate_loop import gate_loop, linear_scan
from .generation_gateloop import RecurrentGenerationMixin, position_limit
from .hub import HubModel
from .precision import FullPrecisionLinear
from .ranges import check_name
from .reversible import KeyValueMemory, ReversibleCell

T = TypeVar("T")


def residual_projection(width: int, hidden_size: int, bias: bool) -> nn.Linear:
    """The last layer of a branch of a block. Starts smaller, so that the sum over depth does not grow (GPT-2). A plain
    one with a mark: quantisers and adapters leave out a class of its own."""
    linear = nn.Linear(width, hidden_size, bias=bias)
    linear.closes_branch = True  # type: ignore[assignment]
    return linear


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

    @staticmethod
    def create_mask(config: GateLoopConfig, **kwargs) -> torch.Tensor | None:
        """What this mixer needs to know of padding, packing and the past, made once per forward and layer type."""
        return create_mask(config=config, layer_idx=config.layer_types.index("full_attention"), **kwargs)

    def __init__(self, config: GateLoopConfig, layer_idx: int):
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


class Magnitude(FullPrecisionLinear):
    """The projection to the logits of the transitions' magnitudes `|a|`, one for each of H heads.

    Its biases spread the memory horizons, the numbers of steps `-1 / log|a|` after which 1/e of a state is left,
    evenly on a logarithmic scale between 1 and `LONGEST_HORIZON`, as text depends on its past at every scale. Longer
    ones are learned where they are needed; starting with them (up to 1024) made the first million tokens cost more.
    """

    LONGEST_HORIZON = 32

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.spread()

    @torch.no_grad()
    def spread(self) -> None:
        places = (torch.arange(self.out_features, dtype=torch.float64) + 0.5) / self.out_features
        # logit(exp(-1/τ)) without rounding 1 - exp(-1/τ).
        init.copy_(self.bias, -torch.expm1(self.LONGEST_HORIZON**-places).log())


class Phase(FullPrecisionLinear):
    """The projection to the transitions' phases. Its biases are spread over the circle, so that every head starts out
    listening to another frequency; around 0, all would start as the same slow rotation."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.spread()

    def spread(self) -> None:
        init.uniform_(self.bias, -math.pi, math.pi)


class PositiveTransition(nn.Module):
    """`a = σ(magnitude(x))`: heads `[B, T, H]` of the log magnitude, and no phase."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.magnitude = Magnitude(hidden_size, num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return nn.functional.logsigmoid(self.magnitude(x)), None


class ComplexTransition(PositiveTransition):
    """`a = σ(magnitude(x)) exp(i·phase(x))`, the paper's."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        self.phase = Phase(hidden_size, num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, _ = super().forward(x)
        return g, self.phase(x)


class SignedTransition(ComplexTransition):
    """`a = σ(magnitude(x)) cos(phase(x))`, the real part of the complex transition."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, phase = super().forward(x)
        cos = phase.cos()
        return g + cos.abs().clamp(min=torch.finfo(cos.dtype).tiny).log(), cos < 0


class CartesianTransition(nn.Module):
    """`a = σ(|z|) z/|z|` with `z(x)` complex, the transition of the package gateloop-transformer. Its magnitude is at
    least 1/2: it cannot forget quickly."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.z = FullPrecisionLinear(hidden_size, 2 * num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.view_as_complex(self.z(x).unflatten(-1, (-1, 2)))
        return nn.functional.logsigmoid(z.abs()), z.angle()


TRANSITIONS: dict[str, type[nn.Module]] = {
    "complex": ComplexTransition,
    "signed": SignedTransition,
    "positive": PositiveTransition,
    "cartesian": CartesianTransition,
}


class GateLoopLayer(nn.Module):
    """The GateLoop recurrence between projections (Katsch 2023, arXiv 2311.01927, section 3), for any network.

    Its past is a state of fixed size, so that a sequence can be processed in pieces, and one token costs the same
    however many came before.

    Args:
        hidden_size: D, the width of input and output.
        num_heads: H, a divisor of D; as many as channels by default. Each head has its own transition and a state of
            `(D/H)²` numbers.
        state_transition: `"complex"`, `"signed"`, `"positive"` or `"cartesian"`; see `TRANSITIONS`.
        output_norm: a LayerNorm over what is read from the states, before the gate.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        state_transition: str = "complex",
        output_norm: bool = True,
    ):
        super().__init__()
        self.num_heads = hidden_size if num_heads is None else num_heads
        if self.num_heads < 1 or hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads}).")
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.transition = look_up(TRANSITIONS, state_transition, "state_transition")(hidden_size, self.num_heads)
        self.norm = nn.LayerNorm(hidden_size) if output_norm else nn.Identity()
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = residual_projection(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: `[B, T, D]`.
            initial_state: the state after what came before, `[B, H, D/H, D/H]`, as an earlier call returned it.
            output_final_state: whether to return the state after the last position; None is returned otherwise.
            real: `[B, T]`, False on padding, which leaves the state as it is.
            starts: `[B, T]`, True where a new sequence begins, from an empty state.

        Returns:
            The output `[B, T, D]` and the state.
        """
        y, state = gate_loop(
            *self.project(x, real, starts), initial_state=initial_state, output_final_state=output_final_state
        )
        return self.read(x, y), state

    def project(
        self, x: torch.Tensor, real: torch.Tensor | None, starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k, v, g and phase of the recurrence."""
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        g, phase = self.transition(x)
        if real is not None:
            padding = ~real.bool()[..., None]
            k, g = k.masked_fill(padding[..., None], 0), g.masked_fill(padding, 0)
            phase = None if phase is None else phase.masked_fill(padding, 0)
        if starts is not None:
            g = g.masked_fill(starts.bool()[..., None], -torch.inf)
        return q, k, v, g, phase

    def read(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.o_proj(nn.functional.silu(self.gate_proj(x)) * self.norm(y.flatten(-2)))


def create_state_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`real` and `starts` `[B, T]` (see `GateLoopLayer.forward`), None where they would change nothing.

    A token begins a sequence if the mask hides all tokens before it, or, without a mask and a cache, if its
    position does not follow its predecessor's.
    """
    batch, length, _ = inputs_embeds.shape
    if attention_mask is not None:
        past = past_length(past_key_values)
        compiling = torch.compiler.is_compiling()
        if not compiling and attention_mask.all():
            return None, None
        real = of_new_tokens(attention_mask, past, length).bool()
        if not compiling and past == 0:  # Padding leaves the empty state as it is.
            return real, None
        return real, real & (of_new_tokens(attention_mask.cumsum(-1), past, length) == 1)
    if position_ids is not None and past_key_values is None:
        return None, nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0)).expand(batch, -1)
    return None, None


class GateLoopMixer(GateLoopLayer):
    """The layer as a token mixer of the decoder, its state in the cache."""

    create_mask = staticmethod(create_state_mask)

    def __init__(self, config: GateLoopConfig, layer_idx: int):
        super().__init__(
            config.hidden_size, config.gateloop_num_heads, config.state_transition, config.gateloop_output_norm
        )
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        q, k, v, g, phase = self.project(hidden_states, *mask)
        if past_key_values is None:
            y, _ = gate_loop(q, k, v, g, phase)
        else:
            y, _ = past_key_values.update(k, self.recur, self.layer_idx, v=v, q=q, g=g, phase=phase)
        return self.read(hidden_states, y), None

    @staticmethod
    def recur(
        state: torch.Tensor | None, x: torch.Tensor, v: torch.Tensor, q: torch.Tensor, g: torch.Tensor, phase=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return gate_loop(q, x, v, g, phase, initial_state=state, output_final_state=True)


class FixedPointMixer(nn.Module):
    """A token mixer whose state is an exact one of integers (`reversible.py`), written by `cell` and read after that.

    The cell reads the residual stream and its own state, not its own output, so that a stack of such layers can be run
    backwards given the tokens.
    """

    create_mask = staticmethod(create_state_mask)
    cell: nn.Module
    layer_idx: int

    def mix(
        self,
        x: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """What the cell gives for its inputs `x` `[B, T, …]`."""
        real, starts = mask
        if past_key_values is None:
            return self.recur(None, x, real, starts)[0]
        return past_key_values.update(x, self.recur, self.layer_idx, real=real, starts=starts)[0]

    def recur(
        self,
        state: torch.Tensor | None,
        x: torch.Tensor,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        **more,
    ) -> tuple[torch.Tensor, ...]:
        return self.cell(x, state, real, starts, **more)


class ReversibleMixer(FixedPointMixer):
    """A reversible cell as a token mixer: its state is normed, gated and projected."""

    def __init__(self, config: GateLoopConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.cell = ReversibleCell(config.hidden_size, config.hidden_size // 2, config.reversible_form)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = residual_projection(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        y = self.norm(self.mix(hidden_states, mask, past_key_values).to(hidden_states.dtype))
        return self.o_proj(nn.functional.silu(self.gate_proj(hidden_states)) * y), None


class RWKVMixer(FixedPointMixer):
    """RWKV's time mixing (Peng et al. 2023, arXiv 2305.13048, section 3.1) without its token shift: what a token is to
    know of its predecessor, a layer with feedback below has to say."""

    def __init__(self, config: GateLoopConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.cell = KeyValueMemory(config.hidden_size)
        self.r_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = residual_projection(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        keys_and_values = torch.cat([self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
        wkv = self.mix(keys_and_values, mask, past_key_values).to(hidden_states.dtype)
        return self.o_proj(self.r_proj(hidden_states).sigmoid() * wkv), None


class SimpleGateLoopLayer(nn.Module):
    """The recurrence reduced to `h_t = a_t h_{t-1} + kv_t`, `y_t = q_t h_t` in every channel, with `a = σ(a_proj(x))`.

    One real number of state and three projections for each channel: a light companion to attention (the
    `SimpleGateLoopLayer` of gateloop-transformer, which it computes). The caller adds the residual.

    Args:
        hidden_size: D, the width of input and output.
        reverse: run backwards in time. The state then travels backwards too; the final one is at the first position.
        eps: of the RMSNorm before the projections.
    """

    def __init__(self, hidden_size: int, reverse: bool = False, eps: float = 1e-6):
        super().__init__()
        self.reverse = reverse
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.a_proj = FullPrecisionLinear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` `[B, T, D]` → `y` `[B, T, D]` and, if asked for, the final state `[B, D]`; `real` `[B, T]` is False on
        padding, which leaves the state as it is."""
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"x is {list(x.shape)}; it must be [B, T, D] with T at least 1.")
        normed = self.norm(x)
        a, kv = self.a_proj(normed).sigmoid(), self.kv_proj(normed)
        if real is not None:
            padding = ~real.bool()[..., None]
            a, kv = a.masked_fill(padding, 1), kv.masked_fill(padding, 0)
        if self.reverse:
            a, kv = a.flip(1), kv.flip(1)
        if initial_state is None:
            initial_state = torch.zeros_like(a[:, 0])
        h = linear_scan(a, kv.to(a.dtype), initial_state.to(a.dtype))
        final_state = h[:, -1].clone() if output_final_state else None
        if self.reverse:
            h = h.flip(1)
        return self.q_proj(normed) * h.to(x.dtype), final_state


TOKEN_MIXERS: dict[str, Any] = {
    "full_attention": Attention,
    "gateloop": GateLoopMixer,
    "reversible": ReversibleMixer,
    "rwkv": RWKVMixer,
}


class GELUMLP(nn.Module):
    def __init__(self, config: GateLoopConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: GateLoopConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


MLPS = {"gelu": GELUMLP, "swiglu": SwiGLUMLP}


def look_up(table: Mapping[str, T], name: str, field: str) -> T:
    check_name(field, name, table)
    return table[name]


class GateLoopDecoderLayer(GradientCheckpointingLayer):
    """`x + mix(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: GateLoopConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = look_up(TOKEN_MIXERS, self.layer_type, "layer_types entry")(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = look_up(MLPS, config.mlp_type, "mlp_type")(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @accept_cache
    def forward(self, hidden_states: torch.Tensor, masks: dict, **kwargs) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), mask=masks[self.layer_type], **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class GateLoopPreTrainedModel(HubModel):
    config: GateLoopConfig
    config_class = GateLoopConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GateLoopDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GateLoopDecoderLayer, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "closes_branch", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (Magnitude, Phase)):
            module.spread()
        elif isinstance(module, ReversibleCell):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, KeyValueMemory):
            module.reset_parameters()


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


def of_new_tokens(columns: torch.Tensor, past: int | torch.Tensor, length: int) -> torch.Tensor:
    """Of `[B, past + length]`, or of more columns, those of the new tokens: `[B, length]`."""
    return columns.index_select(1, torch.arange(length, device=columns.device) + past)


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


class GateLoopModel(GateLoopPreTrainedModel):
    def __init__(self, config: GateLoopConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        rotary = config.position_embedding_type == "rope" and "full_attention" in config.layer_types
        self.rotary_emb = LlamaRotaryEmbedding(config) if rotary else None
        self.layers = nn.ModuleList(GateLoopDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Loaded in fp16, these stay as they are, and quantizers leave them alone (see FullPrecisionLinear).
        precise = {"gateloop": ".*transition", "reversible": ".*cell", "rwkv": ".*cell"}
        self._keep_in_fp32_modules = sorted({precise[kind] for kind in config.layer_types if kind in precise})
        self.post_init()

    @accept_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, past + T]`, 0 on padding; if all layers attend, what `read_mask` takes.
            position_ids: `[B, T]`; by default the tokens counted without padding. Without a mask and a cache, a
                position that does not follow its predecessor starts a new packed sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(self.embed_tokens, input_ids)
        length = inputs_embeds.shape[1]
        check_inputs(self.config, length, attention_mask, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            fill_in_layers(past_key_values, self.config)
        attention_mask = read_mask(self.config, inputs_embeds, attention_mask, past_key_values)
        masks = {
            layer_type: TOKEN_MIXERS[layer_type].create_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type in set(self.config.layer_types)
        }
        if position_ids is None:
            position_ids = default_position_ids(length, attention_mask, past_key_values, inputs_embeds.device)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids) if self.rotary_emb is not None else None
        hidden_states = self.dropout(inputs_embeds)
        # Early exit in assisted decoding lowers the number for a while.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                masks=masks,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **{CACHE: past_key_values},  # By this name it is left out where activations are checkpointed.
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})


class NextTokenLabels:
    """Has Trainer shift the labels that it smooths: token by token they are those of the next position. It does so for
    the causal language models in a table of its own, where it looks up what `_get_name` says."""

    def _get_name(self) -> str:
        return "LlamaForCausalLM"

    def __repr__(self) -> str:
        # Which otherwise begins with that name.
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())


class GateLoopForCausalLM(NextTokenLabels, RecurrentGenerationMixin, GateLoopPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GateLoopConfig):
        super().__init__(config)
        self.model = GateLoopModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @accept_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`labels` `[B, T]` are the `input_ids` themselves (they are shifted here), −100 where there is no loss."""
        refuse_last_hidden_state(past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SequenceClassificationHead(GenericForSequenceClassification):
    """Transformers' head on a base model of the same code: `AutoModel`, where it looks its base model up, may know
    another copy of the code, or none."""

    base_model_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.num_labels = config.num_labels
        self.model = self.base_model_class(config)
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        self.post_init()  # type: ignore[attr-defined]


class TokenClassificationHead(GenericForTokenClassification):
    """The same for the label of each token."""

    base_model_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.num_labels = config.num_labels
        self.model = self.base_model_class(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout", 0.1) if dropout is None else dropout)
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels)
        self.post_init()  # type: ignore[attr-defined]


class GateLoopForSequenceClassification(SequenceClassificationHead, GateLoopPreTrainedModel):
    base_model_class = GateLoopModel


class GateLoopForTokenClassification(TokenClassificationHead, GateLoopPreTrainedModel):
    base_model_class = GateLoopModel


# For saving to copy the code. The Auto classes know what the package registers; a checkpoint's own code registers
# nothing, or the next checkpoint would be taken for one of the same code.
GateLoopModel.register_for_auto_class("AutoModel")
GateLoopForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GateLoopForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GateLoopForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
