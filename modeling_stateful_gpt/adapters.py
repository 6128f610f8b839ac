"""What peft's methods (LoRA, IA³, …) change in a model unless they are told which modules: our rows of its tables.

peft looks a model's type up in the table of the method, right after it has asked the model's configuration for its
dictionary. So that is when the rows are written: it does not matter which of the two was imported first, peft is not
imported for those who do not use it, and a model around another one can have the rows of the one that it is around.
"""

import sys

import torch
from transformers import DynamicCache

from .cache_layers import LastHiddenStateLayer


def write_gateloop_rows(model_type: str) -> None:
    """Those of Llama, as the projections have the same names; only the norms have others."""
    for name, table in tables().items():
        if "llama" in table:
            table[model_type] = ["mixer_norm", "mlp_norm", "norm"] if "LNTUNING" in name else table["llama"]


def write_stateful_rows(model_type: str, text_model_type: str, fusion: list[str]) -> None:
    """Those of the language model, if it has any, and the linear layers of the fusion where something is added to
    weights: around a trained model it starts at zero, and would stay there."""
    for name, table in tables().items():
        table.pop(model_type, None)
        if text_model_type in table:
            row = table[text_model_type]
            adds = isinstance(row, list) and not any(method in name for method in ("LNTUNING", "IA3"))
            table[model_type] = row + fusion if adds else row
    if (constants := sys.modules.get("peft.utils.constants")) is not None:
        constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING[model_type] = prefix_without_state


def prefix_without_state(keys_and_values: tuple[torch.Tensor, ...]) -> DynamicCache:
    """The cache that begins with a prefix (PrefixTuningConfig), `[2, B, H, T, d]` for each layer. It says that there is
    no last hidden state to feed back yet; without that, the cache would be one that a plain model has filled."""
    cache = DynamicCache(keys_and_values)
    cache.layers.append(LastHiddenStateLayer())
    return cache


def tables() -> dict[str, dict]:
    """For each method the modules by type of model; nothing where peft has not been imported."""
    constants = sys.modules.get("peft.utils.constants")
    every = {} if constants is None else vars(constants)
    return {name: table for name, table in every.items() if name.endswith("_MODULES_MAPPING")}
