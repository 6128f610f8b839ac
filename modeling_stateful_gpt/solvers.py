"""Ways to evaluate `h_t = f(fuse(e_t, h_{t-1}), history)` over a sequence.

A solver sees a `Recurrence`: the equation of one batch, which can be applied to one position (`step`), to all positions
at once given a guess of all states (`sweep`), or to groups of positions one after the other (`sweep_groups`). It knows
nothing of models.

A new solver is one function below and one entry in `SOLVERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

State = tuple[torch.Tensor, torch.Tensor]
"""The states in force, `[B, D]`, and whether there is one, `[B]`."""

PATIENCE = 8
"""Where the residual has not halved in so many passes, the recurrence does not contract, and is stepped instead."""

RUN_COST = {"cpu": 32}
"""What a run of the language model costs besides its tokens, in tokens that take as long: the weights are read once.
`training/benchmark_backbone.py --measure solvers` shows what follows from it."""
RUN_COST_OF_AN_ACCELERATOR = 4096
"""An estimate, not measured: an H100 reads the bf16 weights of a large model in the time of some 300 tokens, and
starts the kernels of a small one in that of 10,000."""


class Recurrence(Protocol):
    length: int
    """T, the number of positions to solve for."""
    real: torch.Tensor
    """`[B, T]`, False where a position is padding."""

    @property
    def has_groups(self) -> bool:
        """Whether it can be applied to some positions only (`begin_at`); if not, `sweep_groups` is a `sweep`."""

    def initial_state(self) -> State: ...

    def step(self, position: int, state: State) -> tuple[torch.Tensor, State]:
        """The hidden state `[B, D]` at `position` and the state in force after it. Positions are visited in order."""

    def begin_at(self, position: int, states: torch.Tensor) -> State:
        """After `sweep_groups`: makes ready to step from `position` on, as the states `[B, T, D]` before it are right.
        Returns the one in force."""

    def sweep(self, states: torch.Tensor | None) -> torch.Tensor:
        """The hidden states `[B, T, D]` of all positions at once, each reading the previous position's entry of
        `states` (`[B, T, D]`; None: the first guess, which may be that only states from before the sequence are
        known). May be called again and again."""

    def sweep_groups(self, states: torch.Tensor | None, start: int, num_groups: int) -> torch.Tensor:
        """`states` with those of the positions from `start` on computed anew, in `groups(start, T, num_groups)`, each
        of which reads what the ones before it have just computed. The first call is for all positions in one group."""


def groups(start: int, length: int, num_groups: int) -> list[slice]:
    """The positions from `start` on, split by `position % num_groups`.

    Where the groups begin does not depend on `start`: a position that moved to another group could read the same old
    state twice, and would seem to have settled.
    """
    firsts = (start + (remainder - start) % num_groups for remainder in range(num_groups))
    return [slice(first, length, num_groups) for first in firsts if first < length]


@dataclass
class Solution:
    hidden_states: torch.Tensor
    """`[B, T, D]`"""
    passes: int
    """How many times the language model went over the sequence."""
    residual: float | None = None
    """The largest change in the last pass of an element of a real position's state that is not exact yet, in units of
    the root mean square of that state; None where it was not asked for, and for a single token. NaN where a real
    position's state is not finite; all states that are, are solved all the same."""
    stepped_from: int | None = None
    """The position from which on the solver stepped, if it did."""
    rounding_floor: float | None = None
    """How far rounding moves a state of this model, in the same units (see `Probe`), where there was a tolerance."""
    pass_hidden_states: tuple[torch.Tensor, ...] = ()
    """The result of every pass through which gradients flow, where their number was fixed beforehand; of stepping."""


def step(recurrence: Recurrence, position: int, state: State) -> tuple[torch.Tensor, State]:
    """One token from the state before it: exact. Returns the hidden state `[B, D]` and the next state."""
    return recurrence.step(position, state)


def sequential(recurrence: Recurrence, passes: int | None = None, **unused) -> Solution:
    """Steps over the whole sequence: exact, slow, and the reference for every other solver.

    Backpropagation goes through time, token by token. `passes` and the other solvers' arguments are ignored.
    """
    states = steps_from(recurrence, 0, None)
    # Not for a token that is decoded: looking at its state would make an accelerator wait at every step.
    residual = unless_lost(0.0, states, recurrence.real) if recurrence.length > 1 else None
    return Solution(states, passes=1, residual=residual, stepped_from=0, pass_hidden_states=(states,))


def steps_from(recurrence: Recurrence, position: int, states: torch.Tensor | None) -> torch.Tensor:
    """The states `[B, T, D]`: those before `position` from `states`, the others stepped."""
    state = recurrence.initial_state() if position == 0 else recurrence.begin_at(position, states)
    stepped = []
    for here in range(position, recurrence.length):
        hidden_state, state = step(recurrence, here, state)
        stepped.append(hidden_state)
    steps = torch.stack(stepped, dim=1)
    return steps if position == 0 else torch.cat([states[:, :position], steps], dim=1)


def cyclic(
    recurrence: Recurrence,
    passes: int | None = None,
    tolerance: float = 1e-4,
    num_groups: int = 8,
    num_no_grad_passes: int = 0,
    adapt: bool = False,
) -> Solution:
    """Gauss–Seidel over positions split by `i mod num_groups` (arXiv 2608.18486); one group is Jacobi.

    The first pass takes all positions at once, from the first guess. In each further pass the groups run in order, and
    each reads the freshest states, keys and values of all earlier positions: those of the groups before it are of this
    pass. So a state travels `num_groups` positions in a pass, and the first `num_groups · (k - 1)` positions are exact
    after k passes. (To a tolerance, the second pass takes all positions at once, too: one pass later.)

    With `passes=None`, it goes on until no element will change by more than `tolerance` times its state's root mean
    square, as estimated from how fast the changes shrink. A prefix for which that is so already is not computed again.
    Where the residual does not halve in `PATIENCE` passes, the rest is stepped. A state that is not finite, computed
    from settled ones, will not become so, and keeps nothing going.

    Args:
        passes: a fixed number of passes with gradients.
        num_no_grad_passes: how many passes without gradients come before those.
        adapt: whether to go over all positions at once as long as two passes halve the residual. The rest is
            stepped as soon as that is expected to take less time (`steps_are_faster`).

    Raises:
        ValueError: if a search for the fixed point is exported: its length depends on the data.
    """
    if num_groups > 1 and not recurrence.has_groups:
        num_groups = 1
    if passes is not None:
        return fixed_passes(recurrence, passes, num_groups, num_no_grad_passes)
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export cannot follow a solver that stops at a tolerance, after a number of passes that depends on "
            "the text. Fix it by num_passes, with solver='jacobi' for any length, or with 'cyclic' for one; or use "
            "solver='sequential' (exact, for one length)."
        )
    return to_tolerance(recurrence, tolerance, num_groups, adapt)


def jacobi(recurrence: Recurrence, *args, **kwargs) -> Solution:
    """Sweeps over all positions; each sweep reads the states of the one before, shifted by one. After k passes the
    first k positions are exact. Arguments as in `cyclic`, of which it is the case of one group."""
    return cyclic(recurrence, *args, **{**kwargs, "num_groups": 1})


def forget_casts() -> None:
    """In older versions of torch (seen: 2.8), autocast keeps weights that it has cast without gradient. What comes next
    with gradient would get them, and leave the weights without."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def fixed_passes(recurrence: Recurrence, passes: int, num_groups: int, num_no_grad_passes: int) -> Solution:
    states: torch.Tensor | None = None
    every_pass: list[torch.Tensor] = []
    with_gradients = torch.is_grad_enabled()
    for number in range(num_no_grad_passes + passes):
        if number == num_no_grad_passes:
            forget_casts()
        with torch.set_grad_enabled(with_gradients and number >= num_no_grad_passes):
            if num_groups == 1:
                states = recurrence.sweep(states)
            else:
                states = recurrence.sweep_groups(states, 0, num_groups if number > 0 else 1)
        if number >= num_no_grad_passes:
            every_pass.append(states)
    return Solution(states, num_no_grad_passes + passes, pass_hidden_states=tuple(every_pass))


def to_tolerance(recurrence: Recurrence, tolerance: float, num_groups: int, adapt: bool) -> Solution:
    states: torch.Tensor | None = None
    passes, settled, split = 0, 0, 1
    residuals: list[float] = []
    while settled < recurrence.length:
        contracts = halves(residuals, 2)
        if passes > 1 and not (adapt and contracts):
            split = num_groups
        begin = settled if recurrence.has_groups else 0
        left = passes_left(residuals, tolerance) if contracts or split > 1 else math.inf
        faster = adapt and steps_are_faster(recurrence.real, settled, begin, split, left)
        if faster or not halves(residuals, PATIENCE):
            states = steps_from(recurrence, begin, states)
            return Solution(states, passes + 1, unless_lost(0.0, states, recurrence.real), stepped_from=begin)
        # The second pass is over all positions at once, as the first: it takes less time than one in groups.
        start = settled if passes > 1 else 0
        previous, states = states, recurrence.sweep_groups(states, start, split)
        passes += 1
        if previous is None:
            settled = 1
            continue
        # Whatever has changed there, the positions up to where the first group comes round again were computed from
        # settled ones.
        settled = min((settled // split + 1) * split, recurrence.length)
        change = relative_change(states[:, settled:], previous[:, settled:], recurrence.real[:, settled:])
        lost = lost_states(states, recurrence.real)
        # Without a settled one before it, a state that is not finite may have been computed from a wrong one.
        may_return = lost[:, settled:] & ~lost[:, :settled].any(1, keepdim=True)
        change = change.masked_fill(may_return, torch.inf)
        measured = change[change.isfinite()]
        residuals.append(measured.max().item() if len(measured) else math.inf if change.numel() else 0.0)
        unsettled = torch.nonzero((change > allowed_change(tolerance, residuals)).any(0))
        settled += int(unsettled[0]) if len(unsettled) else change.shape[1]
    return Solution(states, passes, unless_lost(residuals[-1] if residuals else 0.0, states, recurrence.real))


def halves(residuals: list[float], passes: int) -> bool:
    """Whether the last `passes` passes have halved the residual. Until there were so many, they are taken to."""
    return len(residuals) <= passes or residuals[-1] <= residuals[-1 - passes] / 2


def passes_left(residuals: list[float], tolerance: float) -> float:
    """How many more passes it takes, if each halves the residual: two at least, of which the second finds no change."""
    if not residuals:
        return 2
    if residuals[-1] <= tolerance:
        return 1
    return math.inf if tolerance == 0 else 1 + math.log2(residuals[-1]) - math.log2(tolerance)


def steps_are_faster(real: torch.Tensor, settled: int, begin: int, num_groups: int, left: float) -> bool:
    """Whether to step from `begin` on is expected to take less time than `left` passes from `settled` on, in
    `num_groups` groups, over positions `real` `[B, T]`. The unit is the time of a token; a run of the language model
    takes that of `RUN_COST` tokens more."""
    batch, length = real.shape
    run = RUN_COST.get(real.device.type, RUN_COST_OF_AN_ACCELERATOR)
    rest = length - begin  # Without groups, a pass is over all positions.
    left = min(left, math.ceil((length - settled) / num_groups))  # After so many, all is exact in any case.
    return rest * (run + batch) < left * (min(num_groups, rest) * run + rest * batch)


def allowed_change(tolerance: float, residuals: list[float]) -> float:
    """The change in the last pass after which all further changes will add up to no more than `tolerance`.

    Residuals that shrink by a factor ρ with each pass add up to ρ / (1 - ρ) times the last one. As ρ is an estimate,
    from the last two, and what settled before passes on its own error, only half the tolerance is planned for; and no
    more than that is allowed, however fast they shrink.
    """
    *_, before, last = [2 * residuals[0], *residuals]
    if math.isinf(last):  # Nothing could be measured.
        return 0.0
    return tolerance / 2 * min(max(before - last, 0.0) / last, 1.0) if last > 0 else tolerance / 2


@torch.no_grad()
def relative_change(states: torch.Tensor, previous: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """`[B, T]`: the largest change of an element at each position, in units of its state's root mean square; 0 between
    states that are not finite, ∞ between such a one and another."""
    wide = torch.promote_types(states.dtype, torch.float32)  # In fp16, squares overflow.
    states, previous = states.to(wide), previous.to(wide)
    # Of the largest element, as squares overflow in fp32 as well.
    tiny = torch.finfo(wide).tiny
    largest = states.abs().amax(-1).clamp(min=tiny)
    scale = (largest * (states / largest[..., None]).square().mean(-1).sqrt()).clamp(min=tiny)
    change = (states - previous).abs().amax(-1) / scale
    lost, were_lost = lost_states(states, real), lost_states(previous, real)
    return change.masked_fill(lost ^ were_lost, torch.inf).masked_fill(lost & were_lost | ~real, 0)


def lost_states(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """`[B, T]`: which real positions' states are not finite."""
    return real & ~states.isfinite().all(-1)


@torch.no_grad()
def unless_lost(residual: float, states: torch.Tensor, real: torch.Tensor) -> float:
    """`residual`, or NaN where the state of a real position is not finite. (A graph cannot look.)"""
    if torch.compiler.is_compiling():
        return residual
    return math.nan if lost_states(states, real).any() else residual


SOLVERS: dict[str, Callable[..., Solution]] = {"cyclic": cyclic, "jacobi": jacobi, "sequential": sequential}
