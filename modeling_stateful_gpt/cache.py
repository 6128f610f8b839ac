"""The state that `generate()` carries from one step to the next, as cache layers.

Only what lives in a cache layer is reordered by beam search, repeated for several return sequences and cropped by
assisted decoding; keyword arguments are not.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from .compat import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    register_static_layers,
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


def check_crop(tokens_to_remove: int, recorded: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError("Say how many tokens to remove as a negative number.")
    if -tokens_to_remove > recorded:
        raise RuntimeError(
            f"Cannot remove {-tokens_to_remove} tokens: {recorded} were recorded since the last crop. Call "
            f"`activate_past_recording` on a cache that the model has returned, before the tokens that may have to be "
            f"removed."
        )


class StateLayer(CacheLayerMixin):
    """A state, which has the batch first and does not grow with the sequence.

    While the past is recorded, what `crop` needs to take tokens back is kept as well.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.seen = 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, *args, **kwargs) -> None:
        """There is nothing to allocate: the first update brings the state."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        self.each(lambda z: z.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.seen > 0:
            self.each(lambda z: z.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.each(lambda z: z.index_select(0, beam_idx.to(z.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.each(lambda z: z.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.each(lambda z: z[indices])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Changes every tensor, all of which have the batch first."""
        raise NotImplementedError


class LastHiddenStateLayer(StateLayer, DummyLayer):
    """The state that the next step feeds back, as one more layer behind the language model's own. To transformers it is
    a `DummyLayer`: one that says nothing of how long the masks of attention are.

    `keys` holds the states `[B, 1, T, D]` and `values`, `[B, 1, T, 1]`, whether there is one: a sequence that so far is
    only left padding has none. T is 1, or more while the past is recorded.
    """

    # The masks of a language model with sliding attention are built from the layers that say True here.
    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends what comes after T tokens, `[B, 1, T, …]`."""
        self.seen += key_states.shape[2]
        self.device, self.is_initialized = key_states.device, True
        if not self.record_past:
            key_states, value_states = key_states[:, :, -1:], value_states[:, :, -1:]
        elif self.keys is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        # Not a view, which would keep all T of them, and be laid out otherwise after a prompt than after a step.
        self.keys = key_states.clone(memory_format=torch.contiguous_format)
        self.values = value_states.clone(memory_format=torch.contiguous_format)
        return self.keys, self.values

    def write(self, states: torch.Tensor, exists: torch.Tensor) -> None:
        """Appends the states `[B, T, D]` in force after each of T tokens, and whether there is one, `[B, T]`."""
        self.update(states[:, None], exists[:, None, :, None].to(states.dtype))

    def read(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The state `[B, D]` in force after the last token and whether there is one, `[B]`; None if never written."""
        if self.keys is None:
            return None
        return self.keys[:, 0, -1], self.values[:, 0, -1, 0].bool()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens: all, or at most those recorded since the last crop."""
        if -tokens_to_remove >= self.seen:
            self.reset()
            return
        last = self.keys.shape[-2] - 1
        check_crop(tokens_to_remove, recorded=last)
        kept = slice(last + tokens_to_remove, last + tokens_to_remove + 1)
        self.keys, self.values = self.keys[:, :, kept], self.values[:, :, kept]
        self.seen += tokens_to_remove

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.keys, self.values = (None if z is None else change(z) for z in (self.keys, self.values))


class ScatteredLayer(DynamicLayer):
    """The keys and values of a whole sequence, of which every update writes some positions and reads all.

    To the language model it looks empty: what each position may read, the mask must say.

    Args:
        layer: what holds the keys and values from before the sequence.
        past: how many; of them, a layer with a window holds the last ones.
    """

    def __init__(self, layer: DynamicLayer | StaticLayer, past: int):
        super().__init__()
        window = getattr(layer, "sliding_window", None)
        self.past = past if window is None else min(past, window - 1)
        if self.past > 0:
            held = slice(past) if window is None else slice(-self.past, None)
            self.keys, self.values = layer.keys[:, :, held], layer.values[:, :, held]
            self.is_initialized = True
        self.positions = slice(None)
        self.complete = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[B, H, |positions|, d]` to `positions` of the sequence; the first time, to all of it."""
        if not self.complete:
            self.complete = True
            return super().update(key_states, value_states)
        where = slice(self.past + (self.positions.start or 0), None, self.positions.step)
        self.keys = put(self.keys, key_states, where, dim=2)
        self.values = put(self.values, value_states, where, dim=2)
        return self.keys, self.values

    def load(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes over what another layer holds that the whole sequence was written to."""
        self.keys, self.values = keys, values
        self.complete = self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0


def put(whole: torch.Tensor, part: torch.Tensor, where: slice, dim: int) -> torch.Tensor:
    """`whole` with `part` in the places `where` of dimension `dim`, in place unless a gradient may need the old."""
    if torch.is_grad_enabled():
        return whole.slice_scatter(part, dim, where.start, where.stop, where.step or 1)
    whole[(slice(None),) * dim + (where,)] = part
    return whole


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
    return [{name: _clone(getattr(layer, name)) for name in STATES} for layer in linear_layers_of(cache)]


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
    `[B, T]` of each row. They are plain tensors (see `can_reorder`)."""
    for layer in cache.layers:
        if isinstance(layer, (DynamicLayer, StaticLayer)):
            filled = slice(past, past + slots.shape[1])
            keys, values = (gather_slots(z[:, :, filled], slots, dim=2) for z in (layer.keys, layer.values))
            layer.keys, layer.values = put(layer.keys, keys, filled, dim=2), put(layer.values, values, filled, dim=2)


class RecurrentStateLayer(StateLayer):
    """The state of a recurrent layer.

    While the past is recorded, it also keeps the inputs of the tokens since the last `crop`, so that `crop` can run the
    recurrence again over those that remain.
    """

    def reset(self) -> None:
        super().reset()
        self.state: torch.Tensor | None = None
        self.state_before: torch.Tensor | None = None
        self.recur: Callable[..., tuple] | None = None
        self.recorded: list[dict[str, torch.Tensor]] = []

    def update(  # type: ignore[override]
        self, x: torch.Tensor, recur: Callable[..., tuple], **inputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the recurrence on from the state, None at first: `recur(state, x=x, **inputs)` gives first the output
        and the new state, which are returned. All inputs are `[B, T, …]`."""
        if self.state is not None and len(self.state) != len(x):
            raise ValueError(f"The cache holds {len(self.state)} sequences, the input {len(x)}; they must be the same.")
        inputs = {"x": x, **{name: z for name, z in inputs.items() if z is not None}}
        before, y = self.state, self.advance(recur, inputs)
        self.device = x.device
        self.seen += x.shape[1]
        if self.record_past:
            if not self.recorded:
                self.state_before = before
            self.recur = recur
            self.recorded.append(inputs)
        return y, self.state

    def __deepcopy__(self, memo: dict) -> "RecurrentStateLayer":
        copied = copy.copy(self)
        # `recur` is a method of the model's layer, which is not to be copied along.
        copied.__dict__ |= {name: copy.deepcopy(z, memo) for name, z in vars(self).items() if name != "recur"}
        return copied

    def advance(self, recur: Callable[..., tuple], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        y, self.state = recur(self.state, **inputs)
        return y

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens: all, or at most those recorded since the last crop."""
        if -tokens_to_remove >= self.seen:
            self.reset()
            return
        recorded = sum(inputs["x"].shape[1] for inputs in self.recorded)
        check_crop(tokens_to_remove, recorded)
        keep = recorded + tokens_to_remove
        if tokens_to_remove < 0:
            self.seen += tokens_to_remove
            self.state = self.state_before
            for inputs in self.recorded:
                if keep > 0:
                    self.advance(self.recur, {name: z[:, :keep] for name, z in inputs.items()})
                keep -= inputs["x"].shape[1]
        self.recorded, self.state_before, self.recur = [], None, None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.state, self.state_before = (None if z is None else change(z) for z in (self.state, self.state_before))
        self.recorded = [{name: change(z) for name, z in inputs.items()} for inputs in self.recorded]


class GateLoopStateLayer(RecurrentStateLayer):
    _layer_type = "gateloop"


class ReversibleStateLayer(RecurrentStateLayer):
    """As an exact state of integers has no gradient, the one that comes back from later tokens goes through `carrier`,
    `[B, 2, S]` (see `ReversibleCell.forward`)."""

    _layer_type = "reversible"

    def reset(self) -> None:
        super().reset()
        self.carrier: torch.Tensor | None = None

    def advance(self, recur: Callable[..., tuple], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        y, self.state, carrier = recur(self.state, **inputs, carrier=self.carrier)
        self.carrier = carrier if carrier.requires_grad else None
        return y

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().each(change)
        self.carrier = None if self.carrier is None else change(self.carrier)


class RWKVStateLayer(ReversibleStateLayer):
    _layer_type = "rwkv"


RECURRENT_LAYERS = {layer._layer_type: layer for layer in (GateLoopStateLayer, ReversibleStateLayer, RWKVStateLayer)}
# As they never grow, they serve a static cache as well.
register_static_layers(RECURRENT_LAYERS)


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
    if len(layers) != config.num_hidden_layers:
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
        vars(layer).update({name: _clone(value) for name, value in vars(layer).items()})
    return scratch


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clone(item) for item in value]
    return value
