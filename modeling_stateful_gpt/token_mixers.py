"""The table of token mixers: what a layer of the decoder may be made of."""

from typing import Any

from .attention import Attention
from .gateloop_layer import GateLoopMixer
from .reversible_layers import ReversibleMixer, RWKVMixer

TOKEN_MIXERS: dict[str, Any] = {
    "full_attention": Attention,
    "gateloop": GateLoopMixer,
    "reversible": ReversibleMixer,
    "rwkv": RWKVMixer,
}
