"""The GateLoop layer (Katsch 2023, arXiv 2311.01927), its transitions, its token mixer, and the simple layer."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Cache
from transformers import initialization as init

from .cache_layers import RecurrentStateLayer
from .gate_loop import gate_loop
from .inputs import create_state_mask, look_up
from .linear import FullPrecisionLinear, residual_projection
from .linear_scan import linear_scan

if TYPE_CHECKING:
    from .configuration_gateloop import GateLoopConfig


class Magnitude(FullPrecisionLinear):
    """The projection to the logits of the transitions' magnitudes `|a|`, one for each of H heads.

    Its biases spread the memory horizons, the numbers of steps `-1 / log|a|` after which 1/e of a state is left,
    evenly on a logarithmic scale between 1 and `LONGEST_HORIZON`, as text depends on its past at every scale. Longer
    ones are learned where they are needed; starting with them (up to 1024) made the first million tokens cost more.
    """

    LONGEST_HORIZON = 32

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.initialize()

    @torch.no_grad()
    def initialize(self, std: float | None = None) -> None:
        places = (torch.arange(self.out_features, dtype=torch.float64) + 0.5) / self.out_features
        # logit(exp(-1/τ)) without rounding 1 - exp(-1/τ).
        init.copy_(self.bias, -torch.expm1(self.LONGEST_HORIZON**-places).log())


class Phase(FullPrecisionLinear):
    """The projection to the transitions' phases. Its biases are spread over the circle, so that every head starts out
    listening to another frequency; around 0, all would start as the same slow rotation."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.initialize()

    def initialize(self, std: float | None = None) -> None:
        init.uniform_(self.bias, -math.pi, math.pi)


class PositiveTransition(nn.Module):
    """`a = σ(magnitude(x))`: heads `[B, T, H]` of the log magnitude, and no phase."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.magnitude = Magnitude(hidden_size, num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return nn.functional.logsigmoid(self.magnitude(x)), None


class ComplexTransition(PositiveTransition):
    """`a = σ(magnitude(x)) exp(i·phase(x))`, the paper's."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads)
        self.phase = Phase(hidden_size, num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, _ = super().forward(x)
        return g, self.phase(x)


class SignedTransition(ComplexTransition):
    """`a = σ(magnitude(x)) cos(phase(x))`, the real part of the complex transition."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, phase = super().forward(x)
        cos = phase.cos()
        return g + cos.abs().clamp(min=torch.finfo(cos.dtype).tiny).log(), cos < 0


class CartesianTransition(nn.Module):
    """`a = σ(|z|) z/|z|` with `z(x)` complex, the transition of the package gateloop-transformer. Its magnitude is at
    least 1/2: it cannot forget quickly."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.z = FullPrecisionLinear(hidden_size, 2 * num_heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.view_as_complex(self.z(x).unflatten(-1, (-1, 2)))
        return nn.functional.logsigmoid(z.abs()), z.angle()


TRANSITIONS: dict[str, type[nn.Module]] = {
    "complex": ComplexTransition,
    "signed": SignedTransition,
    "positive": PositiveTransition,
    "cartesian": CartesianTransition,
}


class GateLoopLayer(nn.Module):
    """The GateLoop recurrence between projections (Katsch 2023, arXiv 2311.01927, section 3), for any network.

    Its past is a state of fixed size, so that a sequence can be processed in pieces, and one token costs the same
    however many came before.

    Args:
        hidden_size: D, the width of input and output.
        num_heads: H, a divisor of D; as many as channels by default. Each head has its own transition and a state of
            `(D/H)²` numbers.
        state_transition: `"complex"`, `"signed"`, `"positive"` or `"cartesian"`; see `TRANSITIONS`.
        output_norm: a LayerNorm over what is read from the states, before the gate.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        state_transition: str = "complex",
        output_norm: bool = True,
    ):
        super().__init__()
        self.num_heads = hidden_size if num_heads is None else num_heads
        if self.num_heads < 1 or hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads}).")
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.transition = look_up(TRANSITIONS, state_transition, "state_transition")(hidden_size, self.num_heads)
        self.norm = nn.LayerNorm(hidden_size) if output_norm else nn.Identity()
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = residual_projection(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: `[B, T, D]`.
            initial_state: the state after what came before, `[B, H, D/H, D/H]`, as an earlier call returned it.
            output_final_state: whether to return the state after the last position; None is returned otherwise.
            real: `[B, T]`, False on padding, which leaves the state as it is.
            starts: `[B, T]`, True where a new sequence begins, from an empty state.

        Returns:
            The output `[B, T, D]` and the state.
        """
        y, state = gate_loop(
            *self.project(x, real, starts), initial_state=initial_state, output_final_state=output_final_state
        )
        return self.read(x, y), state

    def project(
        self, x: torch.Tensor, real: torch.Tensor | None, starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k, v, g and phase of the recurrence."""
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        g, phase = self.transition(x)
        if real is not None:
            padding = ~real.bool()[..., None]
            k, g = k.masked_fill(padding[..., None], 0), g.masked_fill(padding, 0)
            phase = None if phase is None else phase.masked_fill(padding, 0)
        if starts is not None:
            g = g.masked_fill(starts.bool()[..., None], -torch.inf)
        return q, k, v, g, phase

    def read(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.o_proj(nn.functional.silu(self.gate_proj(x)) * self.norm(y.flatten(-2)))


class GateLoopStateLayer(RecurrentStateLayer):
    _layer_type = "gateloop"


class GateLoopMixer(GateLoopLayer):
    """The layer as a token mixer of the decoder, its state in the cache."""

    create_mask = staticmethod(create_state_mask)
    keep_in_fp32 = ".*transition"

    def __init__(self, config: "GateLoopConfig", layer_idx: int):
        super().__init__(
            config.hidden_size, config.gateloop_num_heads, config.state_transition, config.gateloop_output_norm
        )
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        mask: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, D]` → the mixed `[B, T, D]`; there are no attention weights."""
        q, k, v, g, phase = self.project(hidden_states, *mask)
        if past_key_values is None:
            y, _ = gate_loop(q, k, v, g, phase)
        else:
            y, _ = past_key_values.update(k, self.recur, self.layer_idx, v=v, q=q, g=g, phase=phase)
        return self.read(hidden_states, y), None

    @staticmethod
    def recur(
        state: torch.Tensor | None, x: torch.Tensor, v: torch.Tensor, q: torch.Tensor, g: torch.Tensor, phase=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return gate_loop(q, x, v, g, phase, initial_state=state, output_final_state=True)


class SimpleGateLoopLayer(nn.Module):
    """The recurrence reduced to `h_t = a_t h_{t-1} + kv_t`, `y_t = q_t h_t` in every channel, with `a = σ(a_proj(x))`.

    One real number of state and three projections for each channel: a light companion to attention (the
    `SimpleGateLoopLayer` of gateloop-transformer, which it computes). The caller adds the residual.

    Args:
        hidden_size: D, the width of input and output.
        reverse: run backwards in time. The state then travels backwards too; the final one is at the first position.
        eps: of the RMSNorm before the projections.
    """

    def __init__(self, hidden_size: int, reverse: bool = False, eps: float = 1e-6):
        super().__init__()
        self.reverse = reverse
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.a_proj = FullPrecisionLinear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` `[B, T, D]` → `y` `[B, T, D]` and, if asked for, the final state `[B, D]`; `real` `[B, T]` is False on
        padding, which leaves the state as it is."""
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"x is {list(x.shape)}; it must be [B, T, D] with T at least 1.")
        normed = self.norm(x)
        a, kv = self.a_proj(normed).sigmoid(), self.kv_proj(normed)
        if real is not None:
            padding = ~real.bool()[..., None]
            a, kv = a.masked_fill(padding, 1), kv.masked_fill(padding, 0)
        if self.reverse:
            a, kv = a.flip(1), kv.flip(1)
        if initial_state is None:
            initial_state = torch.zeros_like(a[:, 0])
        h = linear_scan(a, kv.to(a.dtype), initial_state.to(a.dtype))
        final_state = h[:, -1].clone() if output_final_state else None
        if self.reverse:
            h = h.flip(1)
        return self.q_proj(normed) * h.to(x.dtype), final_state
