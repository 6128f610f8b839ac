"""Token mixers whose state is an exact one of integers: the reversible cell and RWKV's memory."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Cache

from .cache_layers import RecurrentStateLayer
from .inputs import create_state_mask
from .linear import residual_projection
from .reversible import ReversibleCell
from .rwkv_memory import KeyValueMemory

if TYPE_CHECKING:
    from .configuration_gateloop import GateLoopConfig


class ReversibleStateLayer(RecurrentStateLayer):
    """As an exact state of integers has no gradient, the one that comes back from later tokens goes through `carrier`,
    `[B, 2, S]` (see `ReversibleCell.forward`)."""

    _layer_type = "reversible"
    gradient_carrier = "carrier"

    def reset(self) -> None:
        super().reset()
        self.carrier: torch.Tensor | None = None

    def advance(self, recur: Callable[..., tuple], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        y, self.state, carrier = recur(self.state, **inputs, carrier=self.carrier)
        self.carrier = carrier if carrier.requires_grad else None
        return y

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().each(change)
        self.carrier = None if self.carrier is None else change(self.carrier)


class RWKVStateLayer(ReversibleStateLayer):
    _layer_type = "rwkv"


class FixedPointMixer(nn.Module):
    """A token mixer whose state is an exact one of integers (`reversible.py`), written by `cell` and read after that.

    The cell reads the residual stream and its own state, not its own output, so that a stack of such layers can be run
    backwards given the tokens.
    """

    create_mask = staticmethod(create_state_mask)
    keep_in_fp32 = ".*cell"
    cell: nn.Module
    layer_idx: int

    def mix(
        self,
        x: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """What the cell gives for its inputs `x` `[B, T, …]`."""
        real, starts = mask
        if past_key_values is None:
            return self.recur(None, x, real, starts)[0]
        return past_key_values.update(x, self.recur, self.layer_idx, real=real, starts=starts)[0]

    def recur(
        self,
        state: torch.Tensor | None,
        x: torch.Tensor,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        **more,
    ) -> tuple[torch.Tensor, ...]:
        return self.cell(x, state, real, starts, **more)


class ReversibleMixer(FixedPointMixer):
    """A reversible cell as a token mixer: its state is normed, gated and projected."""

    def __init__(self, config: "GateLoopConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.cell = ReversibleCell(config.hidden_size, config.hidden_size // 2, config.reversible_form)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = residual_projection(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        y = self.norm(self.mix(hidden_states, mask, past_key_values).to(hidden_states.dtype))
        return self.o_proj(nn.functional.silu(self.gate_proj(hidden_states)) * y), None


class RWKVMixer(FixedPointMixer):
    """RWKV's time mixing (Peng et al. 2023, arXiv 2305.13048, section 3.1) without its token shift: what a token is to
    know of its predecessor, a layer with feedback below has to say."""

    def __init__(self, config: "GateLoopConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.cell = KeyValueMemory(config.hidden_size)
        self.r_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = residual_projection(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        keys_and_values = torch.cat([self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)
        wkv = self.mix(keys_and_values, mask, past_key_values).to(hidden_states.dtype)
        return self.o_proj(self.r_proj(hidden_states).sigmoid() * wkv), None
