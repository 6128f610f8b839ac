"""The versions that this code works with, and all that it takes from inside transformers.

Modules of transformers that its own guide for custom models imports are imported where they are used. Names that a
release may move or rename are looked up here, and nowhere else. A checkpoint's code runs where no `pyproject.toml` is
read, so this file comes first and says what is too old.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

OLDEST = {"torch": "2.8", "transformers": "5.14"}


def check_versions(installed: dict[str, str]) -> None:
    """Raises an ImportError that names the first of the `installed` versions that is too old."""
    for package, oldest in OLDEST.items():
        if Version(installed[package]) < Version(oldest):
            raise ImportError(
                f"This model's code needs {package} {oldest} or newer, and {installed[package]} is installed: "
                f'pip install --upgrade "{package}>={oldest}"'
            )


check_versions({"torch": torch.__version__, "transformers": transformers.__version__})

# ruff: noqa: E402
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor, cache_utils, configuration_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ROPE_INIT_FUNCTIONS",
    "CacheLayerMixin",
    "DynamicLayer",
    "GenerationMode",
    "LinearAttentionCacheLayerMixin",
    "LlamaRotaryEmbedding",
    "RopeParameters",
    "StaticLayer",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "allow_layer_types",
    "apply_rotary_pos_emb",
    "capture_outputs",
    "checkpointing",
    "maybe_autocast",
    "merge_with_config_defaults",
    "register_static_layers",
    "slice_logits_to_keep",
]


def allow_layer_types(names: tuple[str, ...]) -> None:
    """Lets a bare `PreTrainedConfig` have these `layer_types`: Trainer reads config.json as one when it resumes."""
    allowed = "ALLOWED_ATTN_LAYER_TYPES"  # since transformers 5.16
    if not hasattr(configuration_utils, allowed):
        allowed = "ALLOWED_LAYER_TYPES"
    known = getattr(configuration_utils, allowed)
    setattr(configuration_utils, allowed, known + tuple(name for name in names if name not in known))


def register_static_layers(layers: dict[str, type[CacheLayerMixin]]) -> None:
    """Makes `StaticCache` hold these layers for their types of layer."""
    cache_utils.STATIC_LAYER_TYPE_MAPPING.update(layers)


def checkpointing(model: nn.Module) -> list[Any]:
    """The modules that checkpoint their activations in training mode, and then keep no keys and values. (What a model
    says of itself has had several names.)"""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states `[B, T, D]` of the last `logits_to_keep` positions (all for 0), of positions `[N]` or `[B, N]`,
    or of those that a mask `[B, T]` marks."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
