"""The state that `generate()` carries from one step to the next, as cache layers.

Only what lives in a cache layer is reordered by beam search, repeated for several return sequences and cropped by
assisted decoding; keyword arguments are not.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from .cache_layers import RECURRENT_LAYERS, LastHiddenStateLayer, RecurrentStateLayer, ScatteredLayer, clone_value, put
from .compat import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)


class AllOrNothingCache(Cache):
    """Where one layer refuses, none is changed.

    Transformers' own methods go from layer to layer: those before the one that refuses have then done their part.
    """

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens; if there are fewer, all of them.

        A number above 0 is how many tokens remain, as transformers up to 5.16 asks for.
        """
        if any(any(layer.is_recurrent_states_initialized.values()) for layer in linear_layers_of(self)):
            raise RuntimeError(
                "Cannot remove tokens: the cache holds states of linear attention, which have read them."
            )
        length = int(self.get_seq_length())
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - length, 0)
        with unchanged_if_refused(self.layers):
            super().crop(max(tokens_to_remove, -length))

    def batch_repeat_interleave(self, repeats: int) -> None:
        with unchanged_if_refused(self.layers):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with unchanged_if_refused(self.layers):
            super().batch_select_indices(indices)


@contextmanager
def unchanged_if_refused(layers: list[CacheLayerMixin]) -> Iterator[None]:
    """Puts the layers back on an error inside, which may replace their tensors but write only to counts."""
    before = [dict(vars(layer)) for layer in layers]
    tensors = [z for contents in before for z in contents.values() if isinstance(z, torch.Tensor)]
    counts = [(z, z.clone()) for z in tensors if z.ndim == 0]
    try:
        yield
    except BaseException:
        for layer, contents in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(contents)
        for count, number in counts:
            count.copy_(number)
        raise


class StatefulDynamicCache(AllOrNothingCache, DynamicCache): ...


class StatefulStaticCache(AllOrNothingCache, StaticCache): ...


STATEFUL_CACHES = {DynamicCache: StatefulDynamicCache, StaticCache: StatefulStaticCache}


@functools.cache
def all_or_nothing(kind: type[Cache]) -> type[Cache]:
    """The class of caches of this kind that refuse as one."""
    # By name: it may be that of another copy of the code.
    if any(base.__name__ == AllOrNothingCache.__name__ for base in kind.__mro__):
        return kind
    if kind in STATEFUL_CACHES:
        return STATEFUL_CACHES[kind]
    # A class that is made here cannot be found by its name, by which pickle would look for it.
    again = {"__reduce__": lambda cache: (rebuild, (kind, vars(cache))), "__module__": __name__}
    return type(f"Stateful{kind.__name__}", (AllOrNothingCache, kind), again)


def rebuild(kind: type[Cache], contents: dict[str, Any]) -> Cache:
    cache = Cache.__new__(all_or_nothing(kind))  # type: ignore[arg-type]
    vars(cache).update(contents)
    return cache


def past_length(cache: Cache | None) -> int:
    """How many tokens are in the cache; 0 for one of linear attention alone, which does not say it."""
    if cache is None or all(type(layer) is LinearAttentionLayer for layer in cache.layers):
        return 0
    return cache.get_seq_length()


def linear_layers_of(cache: Cache) -> list[LinearAttentionCacheLayerMixin]:
    """The layers of transformers' own that hold states (of convolutions, of linear attention) in place of a past."""
    return [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


STATES = ("conv_states", "recurrent_states")


def copy_states(cache: Cache) -> list[dict[str, dict]]:
    """What the linear layers hold now."""
    return [{name: clone_value(getattr(layer, name)) for name in STATES} for layer in linear_layers_of(cache)]


def keep_states(cache: Cache, before: list[dict[str, dict]], advance: torch.Tensor) -> None:
    """Puts the states of linear layers back to those of `before` in the rows where `advance` `[B]` is False. They are
    zero where there was none."""
    for layer, earlier in zip(linear_layers_of(cache), before, strict=True):
        for name in STATES:
            for number, state in getattr(layer, name).items():
                old = earlier[name][number]
                # Those of recorded tokens grow; none of them is padding.
                if state is None or (old is not None and old.shape != state.shape):
                    continue
                rows = advance.to(state.device).view(-1, *[1] * (state.ndim - 1))
                state.copy_(torch.where(rows, state, torch.zeros_like(state) if old is None else old))


def can_scatter(cache: Cache) -> bool:
    """Whether every layer of the language model holds the keys and values of the past, or of a window of it, as plain
    tensors."""
    return not cache.offloading and layers_are(cache, (DynamicLayer, StaticLayer, DynamicSlidingWindowLayer))


def can_reorder(cache: Cache) -> bool:
    """Whether every layer of the language model that holds keys and values holds them all, as plain tensors."""
    kinds = (DynamicLayer, StaticLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
    return not cache.offloading and layers_are(cache, kinds)


def layers_are(cache: Cache, kinds: tuple[type[CacheLayerMixin], ...]) -> bool:
    return all(type(layer) in kinds for layer in cache.layers if not holds_last_hidden_state(layer))


def scatter(cache: Cache) -> Cache:
    """A cache of `ScatteredLayer`s that begins with what `cache` holds."""
    past = int(past_length(cache))
    layers = (layer for layer in cache.layers if not holds_last_hidden_state(layer))
    return Cache(layers=[ScatteredLayer(layer, past) for layer in layers])


def append(cache: Cache, scattered: Cache, length: int | None = None) -> None:
    """Appends the keys and values of the sequence in `scattered`, or of its first `length` positions, to `cache`."""
    for number, layer in enumerate(scattered.layers):
        where = slice(layer.past, None if length is None else layer.past + length)
        cache.update(layer.keys[:, :, where], layer.values[:, :, where], number)


def gather_slots(z: torch.Tensor, slots: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """`z` with its dimension `dim` in the order `slots` `[B, T]` of each row."""
    shape = [1] * z.ndim
    shape[0], shape[dim] = slots.shape
    return torch.take_along_dim(z, slots.view(shape), dim)


def reorder_slots(cache: Cache, slots: torch.Tensor, past: int) -> None:
    """Puts the T keys and values after the first `past` of every layer of the language model in the order `slots`
    `[B, T]` of each row. They are plain tensors (see `can_reorder`), or scattered."""
    for layer in cache.layers:
        if isinstance(layer, (DynamicLayer, StaticLayer)):
            before = layer.past if isinstance(layer, ScatteredLayer) else past
            filled = slice(before, before + slots.shape[1])
            keys, values = (gather_slots(z[:, :, filled], slots, dim=2) for z in (layer.keys, layer.values))
            layer.keys, layer.values = put(layer.keys, keys, filled, dim=2), put(layer.values, values, filled, dim=2)


def has_recurrent_layers(config: PreTrainedConfig) -> bool:
    return any(layer_type in RECURRENT_LAYERS for layer_type in getattr(config, "layer_types", None) or [])


def fill_in_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """Gives a cache that was made without a configuration, and is empty, the layers that `config` asks for. Empty
    layers with a state become those of the same code: transformers makes them from the code that was imported last.

    Raises:
        ValueError: for a cache with other layers than those.
    """
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    layers = [layer for layer in cache.layers if not holds_last_hidden_state(layer)]
    # For a draft by early exit, transformers before 5.17 makes layers that stay empty.
    for layer in layers[config.num_hidden_layers :]:
        if not isinstance(layer, LinearAttentionCacheLayerMixin) and layer.get_seq_length() == 0:
            layers.remove(layer)
            cache.layers.remove(layer)
    # In older versions of transformers, layers that share keys and values with others have none of their own.
    if len(layers) != config.num_hidden_layers and len(layers) != len(DynamicCache(config=config).layers):
        raise ValueError(
            f"The cache has {len(layers)} layers, the model {config.num_hidden_layers}: it is another model's. Make "
            f"one by DynamicCache(config=model.config)."
        )
    if not torch.compiler.is_compiling() and int(past_length(cache)) == 0:
        refuse_windows(layers, config)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    for number, (layer_type, layer) in enumerate(zip(layer_types, layers, strict=False)):
        # Not isinstance: loaded as remote code, this file may be imported twice.
        held = getattr(layer, "_layer_type", None)
        if layer_type in RECURRENT_LAYERS and held != layer_type:
            raise ValueError(
                f"The cache holds keys and values for layer {number}, a {layer_type} layer, whose past is a state. "
                f"Make it by DynamicCache(config=model.config). A prefix of keys and values (PrefixTuningConfig) "
                f"cannot be given to such a model; PromptTuningConfig, PromptEncoderConfig and LoraConfig can."
            )
        if held in RECURRENT_LAYERS and held != layer_type:
            raise ValueError(
                f"The cache holds the state of a {held} layer for layer {number}, which is a {layer_type} layer: it is "
                f"another model's. Make one by DynamicCache(config=model.config)."
            )
        if layer_type in RECURRENT_LAYERS and not isinstance(layer, RecurrentStateLayer) and layer.seen == 0:
            cache.layers[number] = RECURRENT_LAYERS[layer_type]()
            cache.layers[number].record_past = layer.record_past
    if has_recurrent_layers(config):
        let_refuse_as_one(cache)


def refuse_windows(layers: list[CacheLayerMixin], config: PreTrainedConfig) -> None:
    """Raises a ValueError for layers that keep a window of a past of which the model reads all."""
    for number, (own, layer) in enumerate(zip(DynamicCache(config=config).layers, layers, strict=False)):
        if getattr(layer, "is_sliding", False) and not getattr(own, "is_sliding", False):
            raise ValueError(
                f"The cache keeps a window of keys and values for layer {number}, which attends to all of the past: it "
                f"is another model's. Make one by DynamicCache(config=model.config)."
            )


def let_refuse_as_one(cache: Cache) -> None:
    """The cache is the caller's, and is to stay the same object."""
    if not torch.compiler.is_compiling():  # Which cannot follow this, and crops nothing.
        cache.__class__ = all_or_nothing(type(cache))  # type: ignore[arg-type]


def holds_last_hidden_state(layer: CacheLayerMixin) -> bool:
    # Not isinstance: loaded as remote code, this file may be imported twice.
    return type(layer).__name__ == LastHiddenStateLayer.__name__


def last_hidden_state_layer(cache: Cache, text_config: PreTrainedConfig) -> LastHiddenStateLayer:
    """The state's layer of `cache`; appended behind the layers of the language model `text_config` if it is missing.

    Raises:
        ValueError: for a cache that another model has filled.
    """
    fill_in_layers(cache, text_config)
    if not holds_last_hidden_state(cache.layers[-1]):
        past = int(past_length(cache))
        if past > 0 or any(any(layer.has_previous_state.values()) for layer in linear_layers_of(cache)):
            held = f"keys and values of {past} tokens" if past > 0 else "states of a text"
            raise ValueError(
                f"The cache holds {held}, and no last hidden state to feed back: a model without feedback has filled "
                f"it. Begin with an empty one: DynamicCache(config=model.config)."
            )
        layer = LastHiddenStateLayer()
        layer.record_past = any(getattr(other, "record_past", False) for other in cache.layers)
        cache.layers.append(layer)
    let_refuse_as_one(cache)
    layer = cache.layers[-1]
    if layer.is_initialized and layer.keys.shape[-1] != text_config.hidden_size:
        raise ValueError(
            f"The cache holds a state of {layer.keys.shape[-1]} elements, the model's have {text_config.hidden_size}: "
            f"it is another model's. Make one by DynamicCache(config=model.config)."
        )
    return layer


def refuse_last_hidden_state(cache: Cache | None) -> None:
    """Raises a ValueError for a cache with a state that a model without feedback would not read."""
    if cache is not None and any(holds_last_hidden_state(layer) and layer.is_initialized for layer in cache.layers):
        raise ValueError(
            "The cache holds a last hidden state to feed back, but this model has no feedback: a stateful model has "
            "filled it. Begin with an empty one: DynamicCache(config=model.config)."
        )


def snapshot(cache: Cache) -> Cache:
    """A copy that a solver may write to: same contents, own tensors (some layers write in place)."""
    scratch = copy.copy(cache)
    scratch.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in scratch.layers:
        vars(layer).update({name: clone_value(value) for name, value in vars(layer).items()})
    return scratch
