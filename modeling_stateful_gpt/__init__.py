"""Language models whose hidden state lives on from one token to the next, as a Hugging Face plugin.

Importing this package registers its models with transformers' Auto classes.
"""

from .configuration_gateloop import GateLoopConfig
from .configuration_stateful_gpt import StatefulGPTConfig
from .conversion import convert_gateloop_transformer, convert_simple_gate_loop_layer
from .modeling_gateloop import (
    GateLoopForCausalLM,
    GateLoopForSequenceClassification,
    GateLoopForTokenClassification,
    GateLoopLayer,
    GateLoopModel,
    SimpleGateLoopLayer,
)
from .modeling_stateful_gpt import (
    StatefulGPTForCausalLM,
    StatefulGPTForSequenceClassification,
    StatefulGPTForTokenClassification,
    StatefulGPTModel,
)

__all__ = [
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
]
