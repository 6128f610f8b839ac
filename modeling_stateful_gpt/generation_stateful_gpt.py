"""What `generate()` needs to know of a model whose state travels from step to step."""

from typing import Any

from transformers import Cache, GenerationMixin

from .cache import last_hidden_state_layer
from .modeling_gateloop import GateLoopForCausalLM, position_limit


class StatefulGenerationMixin(GenerationMixin):
    """The state is a layer of the cache that `generate()` builds; all decoding methods then carry it along."""

    create_masks_for_generate = staticmethod(GateLoopForCausalLM.create_masks_for_generate)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        limit = position_limit(self.config.text_config)
        if limit is not None and max_cache_length > limit:
            raise ValueError(
                f"Prompt and new tokens together may become {max_cache_length + 1} tokens; the model's "
                f"max_position_embeddings is {limit}. Shorten the prompt or lower max_new_tokens."
            )
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache: Cache | None = model_kwargs.get("past_key_values")
        if cache is not None and self.config.feedback is not None:
            # The layer must exist before assisted decoding turns past recording on, which it does for drafts above.
            layer = last_hidden_state_layer(cache, self.config.text_config)
            if generation_config.is_assistant:
                layer.activate_past_recording()

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask.any():
            raise ValueError(
                "attention_mask is zero everywhere: the prompts are all padding. Give each at least one token."
            )

    def init_continuous_batching(self, *args, **kwargs):
        self._refuse_continuous_batching()
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        self._refuse_continuous_batching()
        return super().generate_batch(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        if self.config.feedback is not None:
            raise NotImplementedError(
                "Continuous batching (generate_batch, cache_implementation='paged') keeps only keys and values in its "
                "paged cache and cannot carry the hidden state from step to step. Use generate(), left-padded."
            )
