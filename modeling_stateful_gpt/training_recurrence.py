"""The recurrence of a batch with what training adds to it."""

import copy

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from .backbone import without_checkpointing
from .compat import checkpointing
from .recurrence import RECORDED, LanguageModelRecurrence


class TrainingRecurrence(LanguageModelRecurrence):
    """Adds noise to the states that are read, and checkpoints activations where the language model does.

    Args:
        noise: its standard deviation.
    """

    def __init__(self, *args, noise: float = 0.0, **kwargs):
        self.noise = noise
        super().__init__(*args, **kwargs)

    def fuse(self, e: torch.Tensor, h: torch.Tensor, has_previous: torch.Tensor) -> torch.Tensor:
        if self.noise > 0:
            h = h + self.noise * torch.randn_like(h)
        return super().fuse(e, h, has_previous)

    def for_evaluation(self) -> LanguageModelRecurrence:
        """The same one without what training adds."""
        known = self.attention_mask is not None or self.may_be_packed
        kwargs = {name: value for name, value in self.kwargs.items() if name not in RECORDED}
        return LanguageModelRecurrence(
            self.backbone,
            self.fusion,
            self.embeds,
            self.attention_mask,
            self.position_ids if known else None,
            initial_states=self.guess,
            fed_back=self.fed_back,
            can_be_split=self.can_be_split,
            **kwargs,
        )

    def run(self, inputs, cache: Cache | None, *where) -> torch.Tensor:
        """A run whose keys and values are kept where the layers would checkpoint their activations."""
        if cache is None or not checkpointing(self.backbone.language_model):
            return super().run(inputs, cache, *where)
        if torch.is_grad_enabled():
            return self.run_checkpointed(inputs, cache, *where)
        with without_checkpointing(self.backbone.language_model):
            return super().run(inputs, cache, *where)

    def run_checkpointed(self, inputs, cache: Cache, *where) -> torch.Tensor:
        """Checkpoints the run as a whole, so that the keys and values are kept, which the layers would throw away."""
        before = [copy.copy(layer) for layer in cache.layers]

        def run(inputs: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scratch = Cache(layers=[copy.copy(layer) for layer in before])
            for layer, keys, values in zip(scratch.layers, tensors[::2], tensors[1::2], strict=False):
                layer.keys, layer.values = keys, values
            with without_checkpointing(self.backbone.language_model):
                hidden_states = super(TrainingRecurrence, self).run(inputs, scratch, *where)
            return hidden_states, *(z for layer in scratch.layers for z in (layer.keys, layer.values))

        tensors = [z for layer in before if layer.is_initialized for z in (layer.keys, layer.values)]
        hidden_states, *tensors = checkpoint(run, inputs, *tensors, use_reentrant=False)
        for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.load(keys, values)
        return hidden_states
