"""Language models whose hidden state lives on from one token to the next, as a Hugging Face plugin.

Importing this package registers its models with transformers' Auto classes.
"""

from .configuration_gateloop import GateLoopConfig
from .configuration_stateful_gpt import StatefulGPTConfig
from .modeling_gateloop import GateLoopForCausalLM, GateLoopModel
from .modeling_stateful_gpt import StatefulGPTForCausalLM, StatefulGPTModel

__all__ = [
    "GateLoopConfig",
    "GateLoopForCausalLM",
    "GateLoopModel",
    "StatefulGPTConfig",
    "StatefulGPTForCausalLM",
    "StatefulGPTModel",
]
