"""Language models whose hidden state lives on from one token to the next, as a Hugging Face plugin.

Importing this package registers its models with transformers' Auto classes.
"""

# Before all else: it says what is too old.
from .compat import OLDEST  # noqa: F401

# isort: split
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .agreement import Agreement, verify_agreement
from .configuration_gateloop import GateLoopConfig
from .configuration_stateful_gpt import StatefulGPTConfig
from .conversion import convert_gateloop_transformer, convert_simple_gate_loop_layer
from .gateloop_layer import GateLoopLayer, SimpleGateLoopLayer
from .modeling_gateloop import (
    GateLoopForCausalLM,
    GateLoopForSequenceClassification,
    GateLoopForTokenClassification,
    GateLoopModel,
)
from .modeling_stateful_gpt import (
    StatefulGPTForCausalLM,
    StatefulGPTForSequenceClassification,
    StatefulGPTForTokenClassification,
    StatefulGPTModel,
)
from .state_adapter import save_state, without_state

__all__ = [
    "Agreement",
    "GateLoopConfig",
    "GateLoopForCausalLM",
    "GateLoopForSequenceClassification",
    "GateLoopForTokenClassification",
    "GateLoopLayer",
    "GateLoopModel",
    "SimpleGateLoopLayer",
    "StatefulGPTConfig",
    "StatefulGPTForCausalLM",
    "StatefulGPTForSequenceClassification",
    "StatefulGPTForTokenClassification",
    "StatefulGPTModel",
    "convert_gateloop_transformer",
    "convert_simple_gate_loop_layer",
    "save_state",
    "verify_agreement",
    "without_state",
]


def register(config_class: type[PreTrainedConfig], models: dict[Any, type[PreTrainedModel]]) -> None:
    """Makes the Auto classes know a configuration and its models, as they know transformers' own: with
    `trust_remote_code=True`, the code beside a checkpoint's weights comes first."""

    def make(cls, *args, **kwargs) -> PreTrainedConfig:
        return config_class(*args, **kwargs)

    # For AutoConfig, a registered class comes first even where a checkpoint's code is trusted, unless its module is in
    # transformers. So a stand-in is registered that says so, and makes instances of the real class.
    stand_in = type(config_class.__name__, (config_class,), {"__module__": AutoConfig.__module__, "__new__": make})
    AutoConfig.register(config_class.model_type, stand_in, exist_ok=True)
    for auto_class, model_class in models.items():
        auto_class.register(config_class, model_class, exist_ok=True)


register(
    GateLoopConfig,
    {
        AutoModel: GateLoopModel,
        AutoModelForCausalLM: GateLoopForCausalLM,
        AutoModelForSequenceClassification: GateLoopForSequenceClassification,
        AutoModelForTokenClassification: GateLoopForTokenClassification,
    },
)
register(
    StatefulGPTConfig,
    {
        AutoModel: StatefulGPTModel,
        AutoModelForCausalLM: StatefulGPTForCausalLM,
        AutoModelForSequenceClassification: StatefulGPTForSequenceClassification,
        AutoModelForTokenClassification: StatefulGPTForTokenClassification,
    },
)
