"""Puts feedback around a trained language model."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .backbone import ROUTED, not_finite, probe_logits, read_traits, refuse_unsupported
from .configuration_stateful_gpt import OWN_FIELDS, StatefulGPTConfig
from .feedback import FUSIONS
from .language_modeling import find_decoder, take_head
from .probe import steps_differ
from .state_adapter import check_base, find_state, load_state, read_description

HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
"""What says how to reach the Hub, for the language model and for a state alike."""
QUANTIZED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit from which a model of the Hub was just loaded; None for a folder."""
    if os.path.isdir(name):
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


class WrappingMixin:
    @classmethod
    def from_backbone(
        cls: Any,
        backbone: str | os.PathLike | PreTrainedModel,
        feedback: str | None = "correction",
        state: str | os.PathLike | None = None,
        state_revision: str | None = None,
        **options,
    ) -> Any:
        """Puts feedback around a trained causal language model, whose modules are taken over, not copied.

        Args:
            backbone: the model, or a name or path for `AutoModelForCausalLM.from_pretrained`.
            feedback: `"correction"` and `"gated_add"` start out computing exactly what the backbone computes; `"glu"`
                cannot.
            state: what `save_state` has written for this language model: a folder, or a name on the Hub. It says what
                the feedback is. With an adapter of peft beside it, the `PeftModel` is returned.
            state_revision: the branch, tag or commit of the state on the Hub. `revision` is the language model's.
            options: further fields of `StatefulGPTConfig`; with a name or path, also what `from_pretrained` takes
                (`dtype`, `device_map`, `quantization_config`, `revision`, …).

        Raises:
            ValueError: if it is no decoder with a head on it that takes feedback, if its weights are not finite, or if
                the state is another model's.
        """
        config = {name: value for name, value in options.items() if name in OWN_FIELDS}
        others = {name: value for name, value in options.items() if name not in OWN_FIELDS}
        if isinstance(backbone, (str, os.PathLike)):
            name, backbone = backbone, AutoModelForCausalLM.from_pretrained(backbone, **others)
            backbone.base_revision = commit_of(str(name), others.get("revision"))
        elif others:
            raise ValueError(
                f"{', '.join(others)}: no field of StatefulGPTConfig. What from_pretrained takes goes with the name of "
                f"a model, not with a model."
            )
        if state is not None:
            hub = {name: options[name] for name in HUB_OPTIONS if name in options}
            folder = find_state(state, revision=state_revision, **hub)
            description = read_description(folder)
            check_base(description, backbone.config, backbone.name_or_path or type(backbone).__name__)
            return load_state(cls.from_backbone(backbone, **{**description["stateful_gpt"], **config}), folder)
        if backbone.config.is_encoder_decoder:
            raise ValueError(f"{type(backbone).__name__} is an encoder-decoder model; feedback needs a decoder alone.")
        head = backbone.get_output_embeddings()
        if head is None or backbone.config.model_type == StatefulGPTConfig.model_type:
            raise ValueError(f"{type(backbone).__name__} is not a plain language model with a head (…ForCausalLM).")
        _, decoder = find_decoder(backbone)
        if feedback is not None:
            refuse_unsupported(decoder)
        logits = probe_logits(backbone)
        if logits.isnan().any():
            raise ValueError(not_finite(backbone))
        linear = type(head) is nn.Linear and head.bias is None and not getattr(backbone.config, ROUTED, False)
        # One linear layer where that is the same, as most tools know it.
        kinds = [config.pop("head")] if "head" in config else ["linear"] * linear + ["language_model"]
        for kind in kinds:
            model = cls.assemble(backbone, feedback=feedback, head=kind, **config)
            if torch.equal(probe_logits(model, num_passes=1), logits):
                break
        else:
            raise ValueError(
                f"{type(backbone).__name__} computes other logits than its decoder does with embeddings and a head of "
                f"the kind {' or '.join(map(repr, kinds))}. Leave head to from_backbone, if you gave it. If not, "
                f"feedback cannot be put around this model."
            )
        if feedback is not None and steps_differ(model.model.backbone):
            raise ValueError(
                f"{type(backbone).__name__} steps with a cache to other states than it reads a text to. Feedback "
                f"cannot be put around it: what is trained on texts would not be what generates."
            )
        return model.train(backbone.training)

    @classmethod
    def assemble(cls: Any, backbone: PreTrainedModel, **config) -> Any:
        """A model of the modules of `backbone`, unchecked."""
        _, decoder = find_decoder(backbone)
        with torch.device("meta"):
            # Unless it is told otherwise, a composite configuration resets how its parts attend.
            attention = backbone.config._attn_implementation
            model = cls(StatefulGPTConfig(text_config=backbone.config, attn_implementation=attention, **config))
        model.lm_head = backbone.get_output_embeddings() if model.config.head == "linear" else take_head(backbone)
        model.model.language_model = decoder
        if model.lm_head is backbone.get_output_embeddings():
            # What the configuration says, not every model does.
            model.config.tie_word_embeddings = model.lm_head.weight is decoder.get_input_embeddings().weight
        model.model.traits = read_traits(decoder, model.config.text_config)
        model.read_generation()
        if model.config.feedback is not None:
            fusion = FUSIONS[model.config.feedback](model.config.hidden_size)
            fusion.start_at_identity()
            model.model.feedback = fusion.to(backbone.device, backbone.dtype)
        model.generation_config = backbone.generation_config
        model.base_revision = getattr(backbone, "base_revision", None)
        # What saving quantised weights needs.
        vars(model).update({name: value for name, value in vars(backbone).items() if name in QUANTIZED})
        if hasattr(backbone.config, "quantization_config"):
            model.config.quantization_config = backbone.config.quantization_config
        return model
