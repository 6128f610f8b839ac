"""A state as an adapter: what feedback adds to a language model, in a folder of its own, without the language model.

    save_state(model, "my-state")
    model = StatefulGPTForCausalLM.from_backbone("HuggingFaceTB/SmolLM2-135M-Instruct", state="my-state")
    with without_state(model):
        ...

The folder has a few megabytes, with LoRA weights if the model has any. Inside `without_state`, the model is the
language model alone, bit for bit.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from .backbone import evaluation_mode
from .compat import custom_object_save
from .configuration_stateful_gpt import OWN_FIELDS

if TYPE_CHECKING:
    from .modeling_stateful_gpt import StatefulGPTForCausalLM

STATE_CONFIG, STATE_WEIGHTS = "state_config.json", "state.safetensors"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""peft's own files, beside the state's."""

NO_PART = {
    "_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version",
    "use_cache", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "problem_type",
}  # fmt: skip
"""Fields of a language model's configuration that change nothing of what it computes."""


def describe_base(config: PreTrainedConfig) -> dict[str, Any]:
    fields = json.loads(config.to_json_string(use_diff=False))
    kept = {name: value for name, value in fields.items() if name not in NO_PART}
    return {name: value for name, value in kept.items() if not name.endswith(("dropout", "_token_id"))}


def save_state(model: Any, folder: str | Path) -> None:
    """Writes the fusion of a Stateful GPT, how it is used, which language model it is for, and the code.

    Args:
        model: a `StatefulGPTForCausalLM`, or a `PeftModel` around one, whose adapter is saved beside it.

    Raises:
        ValueError: for a model without feedback.
    """
    adapted = hasattr(model, "get_base_model")
    stateful = model.get_base_model() if adapted else model
    if stateful.config.feedback is None:
        raise ValueError("The model has no feedback (config.feedback is None): there is no state to save.")
    folder, text_config = Path(folder), stateful.config.text_config
    folder.mkdir(parents=True, exist_ok=True)
    fusion = stateful.model.feedback
    if hasattr(fusion, "modules_to_save"):  # peft has put a copy in its place.
        fusion = fusion.modules_to_save[model.active_adapter]
    for name in LORA_FILES:  # Of an adapter that the model no longer has.
        (folder / name).unlink(missing_ok=True)
    if adapted:
        has_card = (folder / "README.md").exists()
        model.save_pretrained(folder)
        if not has_card:  # A form that nobody has filled in.
            (folder / "README.md").unlink()
    fields = json.loads(stateful.config.to_json_string())
    kept = {name: value for name, value in fields.items() if name in OWN_FIELDS - NO_PART}
    description = {
        "stateful_gpt": {"feedback": stateful.config.feedback, **kept},
        "base_model": text_config._name_or_path or None,
        "base_revision": getattr(stateful, "base_revision", None),
        "base_config": describe_base(text_config),
        "hidden_size": stateful.config.hidden_size,
    }
    # The LoRA weights of a fusion's own layers are in peft's file.
    plain = {name: z for name, z in fusion.state_dict().items() if ".lora_" not in name}
    weights = {name.replace(".base_layer", ""): z.contiguous() for name, z in plain.items()}
    save_file(weights, folder / STATE_WEIGHTS)
    custom_object_save(stateful, folder)
    (folder / STATE_CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def find_state(state: str | os.PathLike, **hub: Any) -> Path:
    """The folder of a state, which may be on the Hub.

    Args:
        hub: `revision`, `token`, `cache_dir` and what else `snapshot_download` takes.
    """
    folder = Path(state)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(state), allow_patterns=[STATE_CONFIG, STATE_WEIGHTS, *LORA_FILES], **hub))
    if not (folder / STATE_CONFIG).exists():
        raise ValueError(
            f"{state} holds no state: there is no {STATE_CONFIG}. save_state writes one; a whole model is loaded by "
            f"from_pretrained."
        )
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_CONFIG).read_text())


def check_base(description: dict[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raises a ValueError for a language model of another kind or size than the one that the state was trained on."""
    wanted, given = description["base_config"], describe_base(config)
    # Other versions of transformers may have other fields.
    differing = [field for field in wanted if field in given and wanted[field] != given[field]]
    if differing:
        shown = "; ".join(f"{field} is {given[field]!r}, there {wanted[field]!r}" for field in differing[:3])
        base = description["base_model"] or "another language model"
        raise ValueError(f"This state belongs to {base}, and does not fit {name}: {shown}.")


def load_state(model: "StatefulGPTForCausalLM", folder: Path) -> Any:
    """`model` with the fusion that `save_state` wrote; with an adapter beside it, the `PeftModel`."""
    weights = load_file(folder / STATE_WEIGHTS)
    fusion: nn.Module = model.model.feedback
    fusion.load_state_dict(weights)
    if not (folder / LORA_FILES[0]).exists():
        return model
    try:  # In one, transformers does not ask for peft where remote code is loaded.
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{folder} has LoRA weights, which need peft: pip install peft") from error
    return PeftModel.from_pretrained(model, folder)


@contextmanager
def without_state(model: Any) -> Iterator[None]:
    """Inside, `model` is its language model alone, in evaluation: no feedback, and no adapter."""
    adapted = hasattr(model, "disable_adapter")
    config = (model.get_base_model() if adapted else model).config
    before = config.decode_mode
    config.decode_mode = "no_feedback"
    try:
        with model.disable_adapter() if adapted else contextlib.nullcontext(), evaluation_mode(model):
            yield
    finally:
        config.decode_mode = before
