"""What `generate()` needs to know of a model whose last hidden state travels from step to step."""

import copy
from functools import partial
from typing import Any

from transformers import Cache

from .cache import last_hidden_state_layer
from .compat import CACHE, GenerationMode, UnbatchedClassifierFreeGuidanceLogitsProcessor
from .generation_gateloop import RecurrentGenerationMixin, check_rotary

EVALUATION = ("decode_mode", "num_passes", "solver")
"""The arguments of `forward` that say how the recurrence is evaluated."""


class StatefulGenerationMixin(RecurrentGenerationMixin):
    """The state is a layer of the cache that `generate()` builds; all decoding methods then carry it along."""

    def carries_state(self) -> bool:
        return self.config.feedback is not None or super().carries_state()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache: Cache | None = model_kwargs.get(CACHE)
        decode_mode = model_kwargs.get("decode_mode") or self.config.decode_mode
        if self.config.feedback is not None and decode_mode != "no_feedback":
            check_rotary(self.config.text_config, max_cache_length + 1)
        cut = generation_config.prefill_chunk_size is not None or generation_config.use_cache is False
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        num_passes = model_kwargs.get("num_passes") or 1
        how = f"num_passes={num_passes}" if num_passes > 1 else f"decode_mode={decode_mode!r}"
        if (cut or assisted) and (num_passes > 1 or decode_mode in ("passes", "plain_prompt")):
            raise ValueError(
                f"{how} computes several tokens at once otherwise than one by one. It needs the "
                f"prompt in one piece, a cache, and no drafts: use 'solved' or 'no_feedback' with prefill_chunk_size, "
                f"use_cache=False, assisted decoding and prompt lookup."
            )
        if cache is not None and self.config.feedback is not None:
            # The layer must exist before assisted decoding turns past recording on; for drafts, that was above.
            layer = last_hidden_state_layer(cache, self.config.text_config)
            if generation_config.is_assistant:
                layer.activate_past_recording()

    def _get_logits_processor(self, *args, model_kwargs: dict[str, Any] | None = None, **kwargs):
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        how = {name: value for name, value in (model_kwargs or {}).items() if name in EVALUATION}
        for number, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                # It calls the model itself, and is to have it evaluated as `generate()` does.
                processors[number] = copy.copy(processor)
                processors[number].model = partial(self, **how)
        return processors

    def _get_candidate_generator(self, **kwargs):
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type != self.config.model_type:
            # It knows nothing of how a recurrence is evaluated.
            given = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {name: value for name, value in given.items() if name not in EVALUATION}
        return super()._get_candidate_generator(**kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        if model_kwargs.get("initial_states") is not None:
            raise ValueError("initial_states are a first guess for one forward; generate() has no use for them.")
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask.any():
            raise ValueError(
                "attention_mask is zero everywhere: the prompts are all padding. Give each at least one token."
            )
