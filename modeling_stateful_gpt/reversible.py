"""A recurrent cell whose past is computed again from its future, bit for bit, instead of stored.

The state has two halves, coupled in time so that it can be run backwards whatever `f1` and `f2` are:

    s1' = s1 + f1(s2, x)        s2 = s2' - f2(s1', x)
    s2' = s2 + f2(s1', x)       s1 = s1' - f1(s2, x)

(the coupling of Dinh et al. 2014, arXiv 1410.8516, over time: MacKay et al. 2018, arXiv 1810.10999). In floating point
`(s + u) - u` is not `s`, and the differences grow; so the state is held in fixed point, as int64 multiples of
2^-`FRACTION_BITS`, to which `f1` and `f2` are rounded. Gradients treat the rounding as the identity.

A memory that what it holds has no influence on what is written to it (`accumulate`: there is no feedback) needs no
coupling: `s' = z s + u` is undone by subtracting and dividing, where the bits that z has pushed out are kept.

A state is one tensor `[B, 2, R, S]`: two halves, S wide, of R rows (see `FORMS`).
"""

import torch
from torch import nn
from transformers import initialization as init

from .compat import maybe_autocast
from .fixed_point import (
    GATE_BITS,
    Rows,
    Words,
    divide,
    fixed_point,
    floating_point,
    gate,
    multiply,
    renormalize,
    undo_renormalize,
)
from .linear import FullPrecisionLinear


class Additive:
    """`s' = s + tanh(q) σ(p)`: nothing is ever forgotten, and nothing need be kept to undo it."""

    rows, parts = 1, 2
    """Of a half of the state, and of its pre-activations."""

    GATE_BIAS = -6
    """So what cannot be forgotten is added in steps of 1/400 at first, and an empty input moves an untrained state in
    hundreds of steps and not in a few. (The input gates of Tallec and Ollivier 2018, arXiv 1804.11188, start at -log T,
    with T spread up to the longest dependency; here T is 400 for all.)"""

    @classmethod
    def initial_bias(cls, size: int) -> torch.Tensor:
        """Of the pre-activations of a half, `[parts, S]`."""
        bias = torch.zeros(cls.parts, size, dtype=torch.float64)
        bias[1] = cls.GATE_BIAS
        return bias

    @staticmethod
    def increment(a: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        q, p = a.chunk(2, -1)
        return increment(q, p.sigmoid(), real)

    @classmethod
    def write(cls, half: Rows, a: torch.Tensor, real: torch.Tensor | None) -> Rows:
        """A half after the pre-activations `a` `[B, parts · S]`; as it is where `real` `[B, 1]` is False."""
        return (half[0] + cls.increment(a, real),)

    @classmethod
    def undo(cls, half: Rows, a: torch.Tensor, real: torch.Tensor | None) -> Rows:
        """The half before `write`."""
        return (half[0] - cls.increment(a, real),)

    @staticmethod
    def derivatives(
        half: torch.Tensor, a: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the new half by each part of `a`, `[..., parts, S]`, and by the old half `[..., S]` (None: 1 everywhere).
        `half` is the old one in floating point."""
        q, p = a.chunk(2, -1)
        candidate, opening = q.tanh(), p.sigmoid()
        by_a = torch.stack([opening * (1 - candidate.square()), candidate * opening * (1 - opening)], -2)
        return by_a if real is None else by_a.masked_fill(~real[..., None], 0), None


def increment(q: torch.Tensor, opening: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    u = fixed_point(q.tanh() * opening)
    return u if real is None else u.masked_fill(~real, 0)


class Forgetting:
    """`s' = z s + tanh(q) σ(p)` with a gate `z = σ(r)` (see `multiply`).

    Its rows are the values and the buffers.
    """

    rows, parts = 2, 3

    LONGEST_HORIZON = 32
    """The gates start out with horizons that are spread between 1 and this; see `Magnitude`."""

    @classmethod
    def initial_bias(cls, size: int) -> torch.Tensor:
        bias, places = torch.zeros(cls.parts, size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
        bias[2] = -torch.expm1(cls.LONGEST_HORIZON ** -((places + 0.5) / size)).log()
        return bias

    @staticmethod
    def gate_and_increment(a: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        size = a.shape[-1] // 3
        q, rest = a.split([size, 2 * size], -1)
        opening, z = rest.sigmoid().chunk(2, -1)
        z = gate(z)
        return z if real is None else z.masked_fill(~real, 1 << GATE_BITS), increment(q, opening, real)

    @classmethod
    def write(cls, half: Rows, a: torch.Tensor, real: torch.Tensor | None) -> Rows:
        z, u = cls.gate_and_increment(a, real)
        values, buffer = multiply(half[0], half[1], z)
        return values.add_(u), buffer

    @classmethod
    def undo(cls, half: Rows, a: torch.Tensor, real: torch.Tensor | None) -> Rows:
        z, u = cls.gate_and_increment(a, real)
        return divide(half[0] - u, half[1], z)

    @staticmethod
    def derivatives(
        half: torch.Tensor, a: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = a.shape[-1] // 3
        by_update, _ = Additive.derivatives(half, a[..., : 2 * size], real)
        z = a[..., 2 * size :].sigmoid()
        by_r, by_half = half * z * (1 - z), gate(z).to(half.dtype) * 2.0**-GATE_BITS
        if real is not None:
            by_r, by_half = by_r.masked_fill(~real, 0), by_half.masked_fill(~real, 1)
        return torch.cat([by_update, by_r[..., None, :]], -2), by_half


FORMS: dict[str, type[Additive] | type[Forgetting]] = {"additive": Additive, "forgetting": Forgetting}
"""How a half is changed. A new form is one class here."""


def soften(s: torch.Tensor) -> torch.Tensor:
    """`s / √(1 + mean s²)`: what `f1` and `f2` see of a half, `[..., S]`, so that a sum that grows does not drown x."""
    size = torch.linalg.vector_norm(s, dim=-1, keepdim=True) * s.shape[-1] ** -0.5
    return s / torch.hypot(size, torch.ones_like(size))


def soften_backward(s: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    r = (1 + s.square().mean(-1, keepdim=True)).rsqrt()
    return r * gradient - s * (r**3 * (s * gradient).mean(-1, keepdim=True))


def check_direction(backwards: bool, starts: torch.Tensor | None, words: Words | None, rows: int) -> None:
    if backwards and starts is not None:
        raise ValueError("A state cannot be run backwards over the start of a sequence, which has emptied it.")
    if backwards and rows > 1 and words is None:
        raise ValueError("A forgetting state cannot be run backwards without the words that it has lost.")


def empty_where(new: torch.Tensor, half: Rows) -> Rows:
    return tuple(row.masked_fill(new, 0) for row in half)


@torch.no_grad()
def run(
    form: type[Additive] | type[Forgetting],
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    real: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    words: Words | None = None,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence over T steps, one after the other.

    Args:
        x: `[T, B, 2, parts · S]`, what the inputs add to the pre-activations of the two halves.
        weight: `[2, parts · S, S]`: half i adds `weight[i] @ soften(other half)` to those.
        state: `[B, 2, R, S]` int64: the one before the first step or, `backwards`, after the last.
        real: `[T, B, 1]`, False on padding, which leaves the state as it is.
        starts: `[T, B]`, True where a new sequence begins, from an empty state.
        words: what leaves the buffers of forgetting states is pushed here; `backwards`, it is popped again.

    Returns:
        The states after each step in floating point, `[T, B, 2, S]`, and the final state or, `backwards`, the one
        before the first step, bit for bit.
    """
    check_direction(backwards, starts, words, form.rows)
    first, second = (half.unbind(1) for half in state.unbind(1))
    dtype = x.dtype
    w1, w2 = weight.mT.unbind(0)
    x1, x2 = (half.unbind() for half in x.unbind(2))
    states = torch.empty(*x.shape[:3], weight.shape[-1], dtype=dtype, device=x.device)
    second_seen = floating_point(second[0], dtype)
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        here = None if real is None else real[t]
        if backwards:
            if form.rows > 1:
                buffers = undo_renormalize(torch.cat([first[1], second[1]], -1), words).chunk(2, -1)
                first, second = (first[0], buffers[0]), (second[0], buffers[1])
            first_seen = floating_point(first[0], dtype)
            states[t, :, 0], states[t, :, 1] = first_seen, second_seen
            second = form.undo(second, torch.addmm(x2[t], soften(first_seen), w2), here)
            second_seen = floating_point(second[0], dtype)
            first = form.undo(first, torch.addmm(x1[t], soften(second_seen), w1), here)
            continue
        if starts is not None:
            new = starts[t][:, None]
            first, second = empty_where(new, first), empty_where(new, second)
            second_seen = floating_point(second[0], dtype)
        first = form.write(first, torch.addmm(x1[t], soften(second_seen), w1), here)
        first_seen = floating_point(first[0], dtype)
        second = form.write(second, torch.addmm(x2[t], soften(first_seen), w2), here)
        second_seen = floating_point(second[0], dtype)
        states[t, :, 0], states[t, :, 1] = first_seen, second_seen
        if form.rows > 1:
            buffers = renormalize(torch.cat([first[1], second[1]], -1), words).chunk(2, -1)
            first, second = (first[0], buffers[0]), (second[0], buffers[1])
    return states, torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)


class Scan(torch.autograd.Function):
    """`run` with gradients.

    Forwards, the states in floating point are all that is kept. From them, the gates of all steps are computed at once
    and only the gradients of the states go step by step.
    """

    @staticmethod
    def forward(ctx, x, weight, carrier, state, form, real, starts, words, backwards):
        states, other = run(form, x, weight, state, real, starts, words, backwards)
        initial = other if backwards else state
        ctx.save_for_backward(x, weight, states, floating_point(initial[:, :, 0], x.dtype), real, starts)
        ctx.form = form
        ctx.mark_non_differentiable(other)
        return states, other, states[-1].clone()

    @staticmethod
    def backward(ctx, states_gradient, _, final_gradient):
        with maybe_autocast(states_gradient.device.type, enabled=False):
            return Scan.gradients(ctx, states_gradient, final_gradient)

    @staticmethod
    def gradients(ctx, states_gradient, final_gradient):
        x, weight, states, initial, real, starts = ctx.saved_tensors
        before = torch.cat([initial[None], states[:-1]])
        if starts is not None:
            before = before.masked_fill(starts[..., None, None], 0)
        # Half 0 sees half 1 of the step before, half 1 sees half 0 of its own step.
        seen = torch.stack([before[:, :, 1], states[:, :, 0]])
        softened = soften(seen)
        a = x + torch.einsum("htbs,hps->tbhp", softened, weight)
        by_a, by_half = ctx.form.derivatives(before, a, None if real is None else real[:, :, None])
        w1, w2 = weight.unbind(0)
        a_gradient = torch.empty_like(a)
        g1, g2 = final_gradient.unbind(1)
        for t in reversed(range(len(x))):
            g1, g2 = g1 + states_gradient[t, :, 0], g2 + states_gradient[t, :, 1]
            a2 = (by_a[t, :, 1] * g2[:, None]).flatten(1)
            g1 = g1 + soften_backward(seen[1, t], a2 @ w2)
            a1 = (by_a[t, :, 0] * g1[:, None]).flatten(1)
            a_gradient[t, :, 0], a_gradient[t, :, 1] = a1, a2
            if by_half is not None:
                g1, g2 = by_half[t, :, 0] * g1, by_half[t, :, 1] * g2
            g2 = g2 + soften_backward(seen[0, t], a1 @ w1)
            if starts is not None:
                g1, g2 = (g.masked_fill(starts[t][:, None], 0) for g in (g1, g2))
        weight_gradient = torch.einsum("tbhp,htbs->hps", a_gradient, softened)
        return a_gradient, weight_gradient, torch.stack([g1, g2], 1), *[None] * 6


class ReversibleCell(nn.Module):
    """The coupled cell: `f1` and `f2` are `tanh(q) σ(p)`, where q and p are linear in x and in the other half, whose
    size is limited beforehand (`soften`).

    Args:
        input_size: D, the width of an input.
        state_size: S, the width of each half of the state.
        form: `"additive"` or `"forgetting"`; see `FORMS`.
    """

    def __init__(self, input_size: int, state_size: int, form: str = "additive"):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form {form!r} does not exist; choose from {sorted(FORMS)}.")
        self.form, self.state_size = FORMS[form], state_size
        self.x_proj = FullPrecisionLinear(input_size, 2 * self.form.parts * state_size)
        # No nn.Linear: adapters (peft) replace those, and this one is not called as a module.
        self.state_weight = nn.Parameter(torch.empty(2, self.form.parts * state_size, state_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.initialize(self.state_size**-0.5)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        init.normal_(self.state_weight, std=std)
        init.copy_(self.x_proj.bias, self.form.initial_bias(self.state_size).repeat(2, 1).flatten())

    def initial_state(self, batch: int) -> torch.Tensor:
        """The empty state `[B, 2, R, S]`."""
        shape, device = (batch, 2, self.form.rows, self.state_size), self.state_weight.device
        return torch.zeros(shape, dtype=torch.int64, device=device)

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
        """A whole sequence.

        Args:
            x: `[B, T, D]`.
            state: before the sequence (default: empty) or, `backwards`, after it; int64 `[B, 2, R, S]`.
            real: `[B, T]`, False on padding, which leaves the state as it is.
            starts: `[B, T]`, True where a new sequence begins, from an empty state.
            carrier: `[B, 2, S]`, to which the gradient of the values before the sequence goes; what it holds does not
                matter.
            words: what a forgetting state loses; needed to run `backwards`.
            backwards: from the state after the sequence; outputs and gradients are the same, bit for bit, if it is
                undone in the pieces in which it was run: the last bits of a matrix product depend on its shape.

        Returns:
            The states after each input in floating point `[B, T, 2 S]`, the state after the sequence (before it if
            `backwards`), and the carrier `[B, 2, S]` of its gradient after the sequence.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        # The last bits of a matrix product depend on how its operands are aligned: a copy is as every other. Time comes
        # first, so that a step's inputs lie together.
        inputs = self.x_proj(x.clone()).unflatten(-1, (2, -1)).transpose(0, 1).contiguous()
        if state is None:
            state = self.initial_state(len(x))
        if carrier is None:
            carrier = inputs.new_zeros(len(x), 2, self.state_size)
        with maybe_autocast(x.device.type, enabled=False):
            states, other, carrier = Scan.apply(
                inputs,
                self.state_weight.to(dtype),
                carrier,
                state,
                self.form,
                None if real is None else real.bool().T[..., None],
                None if starts is None else starts.bool().T,
                words,
                backwards,
            )
        return states.transpose(0, 1).flatten(2), other, carrier

    def step(
        self, state: torch.Tensor, x: torch.Tensor, words: Words | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`state` and `x` `[B, D]` → the next state, and it in floating point, `[B, 2 S]`."""
        states, state, _ = self(x[:, None], state, words=words)
        return state, states[:, 0]

    def unstep(
        self, state: torch.Tensor, x: torch.Tensor, words: Words | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undoes `step(state, x)`, not a token of a longer `forward` (see there): the next state → the state, bit for
        bit, and what that step gave, `[B, 2 S]`."""
        states, state, _ = self(x[:, None], state, words=words, backwards=True)
        return state, states[:, 0]
