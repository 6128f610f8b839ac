"""The versions that this code works with, and all that it takes from inside transformers.

Modules of transformers that its own guide for custom models imports are imported where they are used. Names that a
release may move or rename are looked up here, and nowhere else. A checkpoint's code runs where no `pyproject.toml` is
read, so this file comes first and says what is too old.
"""

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, get_args

import torch
import transformers
from packaging.version import Version
from torch import distributed as dist
from torch import nn

OLDEST = {"torch": "2.8", "transformers": "5.14"}
NEWEST = {"torch": "2.14", "transformers": "5.24"}
"""The newest that the tests were run on."""


def check_versions(installed: dict[str, str]) -> None:
    """Raises an ImportError that names the first of the `installed` versions that is too old."""
    for package, oldest in OLDEST.items():
        if Version(installed[package]).release < Version(oldest).release:
            raise ImportError(
                f"This model's code needs {package} {oldest} or newer, and {installed[package]} is installed: "
                f'pip install --upgrade "{package}>={oldest}"'
            )


check_versions({"torch": torch.__version__, "transformers": transformers.__version__})

# ruff: noqa: E402
from transformers import (
    Cache,
    GenerationMixin,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    cache_utils,
    configuration_utils,
)
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # An older version does not look for it either.

    class DummyLayer:  # type: ignore[no-redef]
        """A layer that says nothing of how long the masks of attention are."""


HOOKS = {
    GenerationMixin: (
        "_assisted_decoding",
        "_get_logits_processor",
        "_prepare_cache_for_generation",
        "_prepare_position_ids_for_generation",
        "_validate_model_kwargs",
    ),
    nn.Module: ("_get_name", "_replicate_for_data_parallel"),
}
"""What our classes override that is not public: where it has another name, ours would never be called."""


def check_hooks(hooks: dict[type, tuple[str, ...]]) -> None:
    """Raises an ImportError where one of the `hooks` of a class is gone."""
    for cls, names in hooks.items():
        if missing := [name for name in names if not hasattr(cls, name)]:
            package = cls.__module__.partition(".")[0]
            raise ImportError(
                f"This model's code changes {cls.__name__}.{missing[0]}, which {package} {version(package)} does not "
                f'have: it is too new. Install one that was tested: pip install "{package}<={NEWEST[package]}.99"'
            )


check_hooks(HOOKS)

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the cache of a model, as an argument and in its output: `cache` since 5.24."""

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE",
    "ROPE_INIT_FUNCTIONS",
    "CacheLayerMixin",
    "DummyLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMode",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "LlamaRotaryEmbedding",
    "RopeParameters",
    "StaticLayer",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "accept_cache",
    "allow_layer_types",
    "apply_rotary_pos_emb",
    "cache_argument",
    "capture_outputs",
    "checkpointing",
    "create_mask",
    "create_masks",
    "custom_object_save",
    "is_sharded",
    "maybe_autocast",
    "merge_with_config_defaults",
    "per_layer_inputs",
    "register_static_layers",
    "slice_logits_to_keep",
]


def accept_cache(forward: Callable) -> Callable:
    """Lets `forward`, whose cache is `past_key_values`, be called by either of its names, whatever the version."""

    @functools.wraps(forward)
    def by_either_name(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.setdefault("past_key_values", cache) is None:
                kwargs["past_key_values"] = cache
            elif cache is not None and kwargs["past_key_values"] is not cache:
                raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
        return forward(*args, **kwargs)

    return by_either_name


def cache_argument(forward: Callable) -> str | None:
    """By which name the forward of a model takes a `Cache`; None if it takes none."""
    parameters = inspect.signature(forward).parameters
    if "cache_params" in parameters and Cache not in get_args(parameters["cache_params"].annotation):
        return None  # xLSTM has a cache of its own.
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)


def per_layer_inputs(language_model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What each layer of Gemma 3n and 4 reads of the tokens. Transformers 5.14 asks for embeddings as well, and does
    not look at them."""
    read: Any = language_model.get_per_layer_inputs
    unused = {"inputs_embeds": None} if "inputs_embeds" in inspect.signature(read).parameters else {}
    return read(input_ids, **unused)


def create_mask(past_key_values: Cache | None, **kwargs) -> Any:
    """The mask of causal attention, in the form that the attention's implementation takes; None where it needs none."""
    return create_causal_mask(**{CACHE: past_key_values}, **kwargs)


def create_masks(past_key_values: Cache | None, **kwargs) -> Any:
    """The masks of a decoder's layers, by their types; one where it has no types of layers. In place of a mask, None
    where the implementation of attention needs none."""
    return create_masks_for_generate(**{CACHE: past_key_values}, **kwargs)


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


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a share of the weights alone (FSDP), so that all must run a layer together."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    shards = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, shards) for module in model.modules())


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
