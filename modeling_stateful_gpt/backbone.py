"""The language model around which feedback is put: how it is run, and which ones feedback cannot be put around."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .compat import (
    CACHE,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    cache_argument,
    checkpointing,
    per_layer_inputs,
)

ROUTED = "output_router_logits"
"""Asks a mixture of experts for its load-balancing loss, as a field of its configuration or an argument."""

UNSUPPORTED = {
    "git": "it counts the patches of an image that is not there",
    "minimax": "it takes no other cache than its own",
    "recurrent_gemma": "it keeps its state in the modules, not in a cache",
}
"""Types of language models that take the arguments, and around which the recurrence would be wrong or fail."""


@dataclass(frozen=True)
class Probe:
    """`rounding_floor`: the median over positions of the relative change (see `relative_change`) of a state whose input
    moves by one unit in the last place; two evaluations in another order differ by as much. `refused`: why the language
    model cannot be run on some positions at a time, None if it can."""

    rounding_floor: float = 0.0
    refused: str | None = None


@dataclass
class Traits:
    """What is read once of a language model, before anything is wrapped around its forward."""

    cache_argument: str
    """What its forward calls the cache."""
    takes_positions: bool
    has_linear_attention: bool
    """Whether it has layers with a state, which has read all that is behind it."""
    reads_own_mask_only: bool
    """Whether its mask is that of the tokens given: no layer attends to the past."""
    probed: dict[Any, Any] = field(default_factory=dict)
    """What a short text has shown (see `probe.py`)."""


def read_traits(language_model: PreTrainedModel, text_config: PreTrainedConfig) -> Traits:
    parameters = inspect.signature(language_model.forward).parameters
    layers = DynamicCache(config=text_config).layers
    return Traits(
        cache_argument=cache_argument(language_model.forward) or CACHE,
        takes_positions="position_ids" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values()),
        has_linear_attention=any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers),
        reads_own_mask_only=all(type(layer) is LinearAttentionLayer for layer in layers),
    )


@dataclass
class Backbone:
    language_model: PreTrainedModel
    text_config: PreTrainedConfig
    traits: Traits

    def run(
        self,
        inputs: torch.Tensor,
        cache: Cache | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> ModelOutput:
        """The language model's output for embeddings `inputs` `[B, T, D]`."""
        if self.traits.reads_own_mask_only and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs.shape[1] :]  # type: ignore[index]
        if self.traits.takes_positions:
            kwargs["position_ids"] = position_ids
        return self.language_model(
            inputs_embeds=inputs,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **{self.traits.cache_argument: cache},
            **kwargs,
        )

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed; weights that are offloaded do not say."""
        device = self.language_model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def inputs_of_tokens(self, input_ids: torch.Tensor | None, given: dict) -> dict[str, torch.Tensor]:
        """What the language model reads of the tokens besides their embeddings: in Gemma 3n and 4, an input for each
        layer."""
        if not getattr(self.text_config, "hidden_size_per_layer_input", 0) or "per_layer_inputs" in given:
            return {}
        if input_ids is None:
            raise ValueError(
                f"{type(self.language_model).__name__} reads the tokens themselves, not their embeddings alone: pass "
                f"input_ids, or per_layer_inputs beside inputs_embeds."
            )
        return {"per_layer_inputs": per_layer_inputs(self.language_model, input_ids)}

    def make_cache(self) -> DynamicCache:
        return DynamicCache(config=self.text_config)


@contextmanager
def without_checkpointing(language_model: PreTrainedModel) -> Iterator[None]:
    modules = checkpointing(language_model)
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


def refuse_unsupported(language_model: PreTrainedModel) -> None:
    """Raises a ValueError for a language model around which the recurrence could not be evaluated correctly."""
    config, name = language_model.config, type(language_model).__name__
    if config.model_type in UNSUPPORTED:
        raise ValueError(f"{name} cannot take feedback: {UNSUPPORTED[config.model_type]}.")
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or []):
        raise ValueError(f"{name} cannot take feedback: it chooses experts by the tokens, not by their embeddings.")
    needed = {cache_argument(language_model.forward), "inputs_embeds", "attention_mask"}
    if not needed <= set(inspect.signature(language_model.forward).parameters):
        raise ValueError(f"{name} cannot take feedback: its forward needs inputs_embeds, attention_mask and a Cache.")
    # Some decoders have this field and do not read it.
    if getattr(config, "is_decoder", None) is False and any(hasattr(m, "is_decoder") for m in language_model.modules()):
        raise ValueError(f"{name} is an encoder (config.is_decoder is False); feedback needs a decoder.")
    width = language_model.get_input_embeddings().weight.shape[-1]
    if width != config.hidden_size:
        raise ValueError(f"{name} embeds tokens {width} wide; feedback needs its hidden_size, {config.hidden_size}.")


def not_finite(model: PreTrainedModel) -> str:
    """Why its logits are not numbers."""
    named = [(name, z) for name, z in model.named_parameters() if not z.is_meta]
    names = [name for name, z in named if not z.isfinite().all()]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{type(model).__name__} has weights that are not finite: {shown}. Load or train it again."
    return (
        f"{type(model).__name__} gives logits that are not numbers, though its weights are finite: something overflows "
        f"in {model.dtype}. Load it with dtype=torch.float32 or torch.bfloat16."
    )


@torch.no_grad()
def probe_logits(model: PreTrainedModel, **kwargs) -> torch.Tensor:
    """The logits of four tokens, in evaluation mode."""
    with evaluation_mode(model):
        return model(torch.arange(4, device=model.device)[None], **kwargs).logits
