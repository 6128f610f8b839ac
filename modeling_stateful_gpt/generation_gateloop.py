"""What `generate()` needs to know of a decoder whose layers may carry a state."""

from functools import wraps

import torch
from transformers import Cache, GenerationMixin, PreTrainedConfig

from .cache import has_recurrent_layers
from .compat import CACHE


def position_limit(config: PreTrainedConfig) -> int | None:
    """How many positions the model of `config` can tell apart; None where no layer attends, so that none are told."""
    if not any("attention" in layer_type for layer_type in getattr(config, "layer_types", None) or ["attention"]):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        # Where RoPE is scaled, positions reach further, by a factor that the limit may or may not contain already.
        rope = getattr(config, "rope_parameters", None) or {}
        limit = max(limit, int((rope.get("factor") or 1) * rope.get("original_max_position_embeddings", limit)))
    return limit


def check_rotary(config: PreTrainedConfig, length: int) -> None:
    """Raises a ValueError for a text so long that its rotary positions are others than those of its beginning alone.
    What was computed for the beginning would then be wrong.

    Args:
        length: of the text, with what is in the cache.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            limit = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            limit = rope.get("original_max_position_embeddings") or limit
            if length > limit:
                raise ValueError(
                    f"The sequence has or may get {length} tokens. Its rotary positions ({kind}) change at {limit}, "
                    f"and with them the states of all tokens, so feedback needs shorter ones. Shorten the input, or "
                    f"lower max_new_tokens."
                )


class RecurrentGenerationMixin(GenerationMixin):
    """Says at once what cannot be generated, instead of half-way or never."""

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """For a static cache transformers would make the 4-D mask of attention here, but the language model makes its
        own, and only the 2-D mask tells what is padding."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Transformers would count halves as nothing and twos as two tokens.
        if (mask := model_kwargs.get("attention_mask")) is not None:
            model_kwargs["attention_mask"] = (mask != 0).long()
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def carries_state(self) -> bool:
        """Whether there is more to carry from step to step than keys and values."""
        return has_recurrent_layers(self.config.get_text_config())

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        limit = position_limit(self.config.get_text_config())
        if limit is not None and max_cache_length > limit:
            raise ValueError(
                f"Prompt and new tokens together may become {max_cache_length + 1} tokens; the model's "
                f"max_position_embeddings is {limit}. Shorten the prompt or lower max_new_tokens."
            )
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        # As transformers does since 5.17.
        if generation_config.is_assistant and isinstance(cache := model_kwargs.get(CACHE), Cache):
            cache.activate_past_recording()

    @wraps(GenerationMixin._assisted_decoding)  # Whose parameters `generate()` reads.
    def _assisted_decoding(self, *args, **kwargs):
        config = self.config.get_text_config()
        layers = config.num_hidden_layers
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            # Early exit lowers the number while it drafts, and leaves it so on an error.
            config.num_hidden_layers = layers

    def init_continuous_batching(self, *args, **kwargs):
        self._refuse_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        self._refuse_continuous_batching()
        return super().generate_batch(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        if self.carries_state():
            raise NotImplementedError(
                "Continuous batching (generate_batch, cache_implementation='paged') keeps only keys and values in its "
                "paged cache and cannot carry the model's state from step to step. Use generate(), left-padded."
            )
