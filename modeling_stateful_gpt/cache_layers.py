"""Layers of a cache that hold a state in place of keys and values, and one that is filled in any order."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from .compat import CacheLayerMixin, DummyLayer, DynamicLayer, StaticLayer, register_static_layers


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
    gradient_carrier: str
    """The attribute through which gradients go on into the piece of a text before."""

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

    gradient_carrier = "keys"
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


RECURRENT_LAYERS: dict[str, type["RecurrentStateLayer"]] = {}
"""By layer type; each class below `RecurrentStateLayer` that names one enters itself."""


class RecurrentStateLayer(StateLayer):
    """The state of a recurrent layer.

    While the past is recorded, it also keeps the inputs of the tokens since the last `crop`, so that `crop` can run the
    recurrence again over those that remain.
    """

    gradient_carrier = "state"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "_layer_type" in vars(cls):
            RECURRENT_LAYERS[cls._layer_type] = cls
            # As it never grows, it serves a static cache as well.
            register_static_layers({cls._layer_type: cls})

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


def clone_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clone_value(item) for item in value]
    return value
