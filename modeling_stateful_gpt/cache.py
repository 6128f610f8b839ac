"""The state that `generate()` carries from one step to the next, as cache layers.

Only what lives in a cache layer is reordered by beam search, repeated for several return sequences and cropped by
assisted decoding; keyword arguments are not.
"""

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer


class LastHiddenStateLayer(DynamicSlidingWindowLayer):
    """The state that the next step feeds back, as one more layer behind the language model's own.

    It is a sliding window over one token, which gives it everything `generate()` asks of a layer, exact cropping while
    past recording is on included. `keys` holds the states `[B, 1, T, D]` and `values`, `[B, 1, T, 1]`, whether there
    is one: a sequence that so far is only left padding has none.
    """

    # The masks of a language model with sliding attention are built from the layers that say True here.
    is_sliding = False
    # A static cache is static only if all of its layers say so, and its masks depend on it.
    is_compileable = True

    def __init__(self) -> None:
        super().__init__(sliding_window=2)

    def get_max_length(self) -> int:
        return -1

    def write(self, states: torch.Tensor, exists: torch.Tensor) -> None:
        """Appends the states `[B, T, D]` in force after each of T tokens, and whether there is one, `[B, T]`."""
        self.update(states[:, None], exists[:, None, :, None].to(states.dtype))

    def read(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The state `[B, D]` in force after the last token and whether there is one, `[B]`; None if never written."""
        if self.get_seq_length() == 0:
            return None
        return self.keys[:, 0, -1], self.values[:, 0, -1, 0].bool()


def last_hidden_state_layer(cache: Cache, text_config: PreTrainedConfig) -> LastHiddenStateLayer:
    """The state's layer of `cache`; appended behind the layers of the language model `text_config` if it is missing."""
    for layer in cache.layers:
        if isinstance(layer, LastHiddenStateLayer):
            return layer
    if not cache.layers:
        # A cache made without a config grows by index, so the language model's layers must stand first.
        cache.layers = DynamicCache(config=text_config).layers
    layer = LastHiddenStateLayer()
    cache.layers.append(layer)
    return layer


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
