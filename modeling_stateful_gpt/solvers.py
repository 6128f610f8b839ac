"""Ways to evaluate `h_t = f(fuse(e_t, h_{t-1}), history)` over a sequence.

A solver sees a `Recurrence`: the equation of one batch, which can be applied to one position (`step`) or to all
positions at once given a guess of all states (`sweep`). It knows nothing of models.

A new solver is one function below and one entry in `SOLVERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

State = tuple[torch.Tensor, torch.Tensor]
"""The states in force, `[B, D]`, and whether there is one, `[B]`."""


class Recurrence(Protocol):
    length: int
    """T, the number of positions to solve for."""
    real: torch.Tensor
    """`[B, T]`, False where a position is padding."""

    def initial_state(self) -> State: ...

    def step(self, position: int, state: State) -> tuple[torch.Tensor, State]:
        """The hidden state `[B, D]` at `position` and the state in force after it. Positions are visited in order."""

    def sweep(self, states: torch.Tensor | None) -> torch.Tensor:
        """The hidden states `[B, T, D]` of all positions at once, each reading the previous position's entry of
        `states` (`[B, T, D]`; None: only states from before the sequence are known). May be called again and again."""


@dataclass
class Solution:
    hidden_states: torch.Tensor
    """`[B, T, D]`"""
    passes: int
    """How many times the language model went over the sequence."""
    residual: float | None = None
    """max|Δh| over real positions between the last two passes; None where it was not asked for."""
    pass_hidden_states: tuple[torch.Tensor, ...] = ()
    """The result of every pass, where their number was fixed beforehand."""


def step(recurrence: Recurrence, position: int, state: State) -> tuple[torch.Tensor, State]:
    """One token from the state before it: exact. Returns the hidden state `[B, D]` and the next state."""
    return recurrence.step(position, state)


def sequential(recurrence: Recurrence, passes: int | None = None, tolerance: float = 0.0) -> Solution:
    """Steps over the whole sequence: exact, slow, and the reference for every other solver. Ignores `passes` and
    `tolerance`."""
    state = recurrence.initial_state()
    hidden_states = []
    for position in range(recurrence.length):
        hidden_state, state = step(recurrence, position, state)
        hidden_states.append(hidden_state)
    return Solution(torch.stack(hidden_states, dim=1), passes=1, residual=0.0)


def jacobi(recurrence: Recurrence, passes: int | None = None, tolerance: float = 1e-4) -> Solution:
    """Sweeps over all positions; each sweep reads the states of the one before, shifted by one.

    After k passes the first k positions are exact. With `passes=None` it sweeps until max|Δh| ≤ `tolerance`, at most
    T times, by which the result is exact.

    Raises:
        ValueError: if such a search for the fixed point is exported: its length depends on the data.
    """
    if passes is None and torch.compiler.is_exporting():
        raise ValueError(
            "torch.export cannot follow a solver that stops at a tolerance, after a number of passes that depends on "
            "the text. Set config.prefill_passes or the argument num_passes to fix it, or use solver='sequential' "
            "(exact, for one length only)."
        )
    states: torch.Tensor | None = None
    every_pass: list[torch.Tensor] = []
    residual = None
    done = 0
    while done < (passes or recurrence.length):
        done += 1
        previous, states = states, recurrence.sweep(states)
        if passes is not None:
            every_pass.append(states)
        elif previous is not None:
            change = (states.detach() - previous.detach()).abs().amax(-1)
            residual = torch.where(recurrence.real, change, 0).max().item()
            if residual <= tolerance:
                break
    return Solution(states, done, residual, tuple(every_pass))


SOLVERS: dict[str, Callable[..., Solution]] = {"jacobi": jacobi, "sequential": sequential}
