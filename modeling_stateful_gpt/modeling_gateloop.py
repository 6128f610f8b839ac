"""A decoder-only language model from scratch, whose layers each choose their token mixer.

Read from the bottom for the whole and from the top for the parts: token mixers, MLPs, the block, the model, the head.
A new layer type is one class with the interface of `Attention` and one entry in `TOKEN_MIXERS`.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gateloop import GateLoopConfig

T = TypeVar("T")


class ResidualProjection(nn.Linear):
    """The last layer of a branch of a block. Starts smaller, so that the sum over depth does not grow (GPT-2)."""


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

    create_mask = staticmethod(create_causal_mask)
    """What this mixer needs to know of padding, packing and the past, made once per forward and layer type."""

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
        self.o_proj = ResidualProjection(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

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


TOKEN_MIXERS = {"full_attention": Attention}


class GELUMLP(nn.Module):
    def __init__(self, config: GateLoopConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: GateLoopConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


MLPS = {"gelu": GELUMLP, "swiglu": SwiGLUMLP}


def look_up(table: Mapping[str, T], name: str, field: str) -> T:
    if name not in table:
        raise ValueError(f"{field} {name!r} does not exist; choose from {sorted(table)}.")
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

    def forward(self, hidden_states: torch.Tensor, masks: dict, **kwargs) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), mask=masks[self.layer_type], **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class GateLoopPreTrainedModel(PreTrainedModel):
    config: GateLoopConfig
    config_class = GateLoopConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GateLoopDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GateLoopDecoderLayer, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)


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
    config: GateLoopConfig,
    length: int,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Refuses an empty sequence, one longer than the model's positions, and a batch that is all padding.

    With a cache, a piece of a prompt may rightly be all padding.
    """
    if length == 0:
        raise ValueError("The input has no tokens; give each text at least one (e.g. the tokenizer's bos token).")
    if torch.compiler.is_compiling():
        return
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    limit = getattr(config, "max_position_embeddings", None)
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
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(length, device=device) + past).unsqueeze(0)


class GateLoopModel(GateLoopPreTrainedModel):
    def __init__(self, config: GateLoopConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList(GateLoopDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

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
            attention_mask: `[B, past + T]`, 0 on padding.
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
        if position_ids is None:
            position_ids = default_position_ids(length, attention_mask, past_key_values, inputs_embeds.device)

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
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids) if self.rotary_emb is not None else None
        hidden_states = self.dropout(inputs_embeds)
        # Early exit in assisted decoding lowers the number for a while.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                masks=masks,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class GateLoopForCausalLM(GateLoopPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GateLoopConfig):
        super().__init__(config)
        self.model = GateLoopModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


for auto, model in ((AutoModel, GateLoopModel), (AutoModelForCausalLM, GateLoopForCausalLM)):
    auto.register(GateLoopConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)
