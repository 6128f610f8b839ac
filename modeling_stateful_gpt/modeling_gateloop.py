"""A decoder-only language model from scratch, whose layers each choose their token mixer.

Read from the bottom for the whole and from the top for the parts: token mixers, MLPs, the block, the model, the head.
A new layer type is one class with the interface of `Attention` and one entry in `TOKEN_MIXERS`.
"""

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

from .attention import Attention
from .cache import fill_in_layers, refuse_last_hidden_state
from .compat import (
    CACHE,
    LlamaRotaryEmbedding,
    accept_cache,
    capture_outputs,
    merge_with_config_defaults,
    slice_logits_to_keep,
)
from .configuration_gateloop import GateLoopConfig
from .generation_gateloop import RecurrentGenerationMixin
from .hub import HubModel
from .inputs import check_inputs, default_position_ids, embed_tokens, look_up, read_mask
from .mlp import MLPS
from .token_mixers import TOKEN_MIXERS


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
        elif (initialize := getattr(module, "initialize", None)) is not None:
            initialize(self.config.initializer_range)


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
        mixers = [TOKEN_MIXERS[layer_type] for layer_type in config.layer_types]
        # Loaded in fp16, these stay as they are, and quantizers leave them alone (see FullPrecisionLinear).
        self._keep_in_fp32_modules = sorted({mixer.keep_in_fp32 for mixer in mixers if mixer.keep_in_fp32})
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
