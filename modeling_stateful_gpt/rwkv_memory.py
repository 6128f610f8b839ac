"""RWKV's memory of keys and values (Peng et al. 2023, arXiv 2305.13048), reversible."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .compat import maybe_autocast
from .fixed_point import (
    GATE_BITS,
    Words,
    divide,
    fixed_point,
    floating_point,
    gate,
    multiply,
    renormalize,
    undo_renormalize,
)
from .reversible import check_direction, empty_where


@torch.no_grad()
def accumulate(
    u: torch.Tensor,
    z: torch.Tensor,
    state: torch.Tensor,
    real: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    words: Words | None = None,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`s_t = z s_{t-1} + u_t` over T steps.

    Args:
        u: `[T, B, 2, S]`, what is written.
        z: `[S]`, a gate for each channel (see `gate`).
        state, real, starts, words, backwards: as those of `run`, with R = 2.

    Returns:
        As `run`.
    """
    check_direction(backwards, starts, words, rows=2)
    values, buffer = state.unbind(2)
    states, increments = torch.empty_like(u), fixed_point(u)
    if real is not None:
        increments.masked_fill_(~real[..., None], 0)
    for t in reversed(range(len(u))) if backwards else range(len(u)):
        gates = z if real is None else torch.where(real[t][..., None], z, 1 << GATE_BITS)
        if backwards:
            buffer = undo_renormalize(buffer.flatten(1), words).view_as(values)
            states[t] = floating_point(values, u.dtype)
            values, buffer = divide(values - increments[t], buffer, gates)
            continue
        if starts is not None:
            values, buffer = empty_where(starts[t][:, None, None], (values, buffer))
        values, buffer = multiply(values, buffer, gates)
        buffer = renormalize(buffer.flatten(1), words).view_as(values)
        values += increments[t]
        states[t] = floating_point(values, u.dtype)
    return states, torch.stack([values, buffer], 2)


class Accumulation(torch.autograd.Function):
    """`accumulate` with gradients, for gates `z` `[S]` in floating point."""

    @staticmethod
    def forward(ctx, u, z, carrier, state, real, starts, words, backwards):
        gates = gate(z)
        states, other = accumulate(u, gates, state, real, starts, words, backwards)
        initial = floating_point((other if backwards else state)[:, :, 0], u.dtype)
        ctx.save_for_backward(states, initial, gates.to(u.dtype) * 2.0**-GATE_BITS, real, starts)
        ctx.mark_non_differentiable(other)
        return states, other, states[-1].clone()

    @staticmethod
    def backward(ctx, states_gradient, _, final_gradient):
        states, initial, z, real, starts = ctx.saved_tensors
        before, u_gradient = torch.cat([initial[None], states[:-1]]), torch.empty_like(states)
        z_gradient, total = torch.zeros_like(z), final_gradient
        for t in reversed(range(len(states))):
            u_gradient[t] = total = total + states_gradient[t]
            kept = total if starts is None else total.masked_fill(starts[t][:, None, None], 0)
            total = kept * z if real is None else torch.where(real[t][..., None], kept * z, kept)
            if real is not None:
                kept = kept.masked_fill(~real[t][..., None], 0)
            z_gradient += (kept * before[t]).sum((0, 1))
        if real is not None:
            u_gradient.masked_fill_(~real[..., None], 0)
        return u_gradient, z_gradient, total, *[None] * 5


class KeyValueMemory(nn.Module):
    """RWKV's memory (Peng et al. 2023, arXiv 2305.13048, section 3.1.2), rewritten so that it is read after it has been
    written. In each channel, with a decay `z = exp(-exp(time_decay))` and a bonus `b = exp(time_first)` for the token
    itself, for a key k and a value v:

        num' = z num + e^k v        den' = z den + e^k

        wkv = (num + b e^k v) / (den + b e^k) = (num' + (z b - 1) e^k v) / (den' + (z b - 1) e^k)

    In fixed point, e^k has a largest and a smallest value: keys are limited to ±`LARGEST_KEY`, values to
    ±`LARGEST_VALUE`, and z to 1 - 2^-`GATE_BITS`, so that no sum can overflow. As what has just been written is taken
    away again in the reading, digits are lost where z b is small: z is at least 1/16, b at least e^-3. Beyond these
    limits there is no gradient. As what comes out of the buffers (`multiply`) adds up to
    2^(`GATE_BITS` - `FRACTION_BITS`), about 1e-6, to a state, it is e^k times `SCALE` that is added up: the quotient is
    the same.

    Args:
        size: S, the number of channels.
    """

    LARGEST_KEY = 6
    LARGEST_VALUE = 1000
    SCALE = 16

    def __init__(self, size: int):
        super().__init__()
        self.time_decay = nn.Parameter(torch.empty(size))
        self.time_first = nn.Parameter(torch.empty(size))
        self.initialize()

    @torch.no_grad()
    def initialize(self, std: float | None = None) -> None:
        # Horizons from 150 steps, as in RWKV, to a third of one.
        init.copy_(self.time_decay, torch.linspace(-5, 1, len(self.time_decay)))
        init.constant_(self.time_first, math.log(0.3))

    def initial_state(self, batch: int) -> torch.Tensor:
        """The empty state `[B, 2, 2, S]`: numerators and denominators."""
        size, device = len(self.time_decay), self.time_decay.device
        return torch.zeros(batch, 2, 2, size, dtype=torch.int64, device=device)

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        carrier: torch.Tensor | None = None,
        words: Words | None = None,
        backwards: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x` `[B, T, 2 S]`, keys and values → wkv `[B, T, S]`, the state, the carrier. The rest: see
        `ReversibleCell.forward`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with maybe_autocast(x.device.type, enabled=False):
            k, v = x.to(dtype).chunk(2, -1)
            e = self.SCALE * k.clamp(-self.LARGEST_KEY, self.LARGEST_KEY).exp()
            u = torch.stack([e * v.clamp(-self.LARGEST_VALUE, self.LARGEST_VALUE), e], 2)
            z = torch.exp(-torch.exp(self.time_decay.to(dtype))).clamp(1 / 16, 1 - 2.0**-GATE_BITS)
            z = z + (gate(z).to(dtype) * 2.0**-GATE_BITS - z).detach()
            if state is None:
                state = self.initial_state(len(x))
            if carrier is None:
                carrier = u.new_zeros(len(x), 2, u.shape[-1])
            if real is not None:
                real = real.bool()
            states, other, carrier = Accumulation.apply(
                u.transpose(0, 1),
                z,
                carrier,
                state,
                None if real is None else real.T[..., None],
                None if starts is None else starts.bool().T,
                words,
                backwards,
            )
            num, den = (states.transpose(0, 1) + (z * self.time_first.to(dtype).clamp(min=-3).exp() - 1) * u).unbind(2)
            if real is not None:
                den = den.masked_fill(~real[..., None], 1)  # Nothing may have been written yet.
        return num / den, other, carrier
