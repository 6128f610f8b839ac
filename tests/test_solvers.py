"""The solvers on a recurrence that is small enough to be written out: h_t = tanh(W h_{t-1} + x_t)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_stateful_gpt.solvers import jacobi, sequential


class TanhRecurrence:
    def __init__(self, batch, length, gain, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.real = torch.ones(batch, length, dtype=torch.bool)
        self.x = torch.randn(batch, length, 4, generator=generator, dtype=torch.float64)
        self.w = gain * torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
        self.sweeps = 0

    def initial_state(self):
        return torch.zeros_like(self.x[:, 0]), torch.zeros(len(self.x), dtype=torch.bool)

    def step(self, position, state):
        h = torch.tanh(state[0] @ self.w + self.x[:, position])
        return h, (h, torch.ones_like(state[1]))

    def sweep(self, states):
        self.sweeps += 1
        previous = torch.zeros_like(self.x)
        if states is not None:
            previous = torch.cat([previous[:, :1], states[:, :-1]], dim=1)
        return torch.tanh(previous @ self.w + self.x)


recurrences = st.builds(
    TanhRecurrence, st.integers(1, 3), st.integers(1, 9), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 99)
)


@given(recurrences, st.integers(1, 12))
def test_after_k_passes_the_first_k_positions_are_exact(recurrence, passes):
    exact = sequential(recurrence).hidden_states
    solution = jacobi(recurrence, passes)
    assert solution.passes == passes == len(solution.pass_hidden_states)
    torch.testing.assert_close(solution.hidden_states[:, :passes], exact[:, :passes], atol=1e-12, rtol=0)


@given(recurrences)
def test_without_a_number_of_passes_jacobi_solves_the_recurrence_in_at_most_t(recurrence):
    exact = sequential(recurrence).hidden_states
    solution = jacobi(recurrence, tolerance=0.0)
    torch.testing.assert_close(solution.hidden_states, exact, atol=1e-12, rtol=0)
    assert solution.passes == recurrence.sweeps <= recurrence.length
    exact_gradient, gradient = (
        torch.autograd.grad(h.square().sum(), recurrence.w)[0] for h in (exact, solution.hidden_states)
    )
    torch.testing.assert_close(gradient, exact_gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_jacobi_stops_as_soon_as_the_states_change_by_no_more_than_the_tolerance(tolerance):
    recurrence = TanhRecurrence(2, 200, gain=0.2)
    solution = jacobi(recurrence, tolerance=tolerance)
    assert solution.residual <= tolerance
    before = jacobi(recurrence, solution.passes - 1).pass_hidden_states
    assert (before[-1] - before[-2]).abs().max() > tolerance
    assert solution.passes < 50


def test_padding_does_not_keep_jacobi_going():
    recurrence = TanhRecurrence(1, 50, gain=3.0)
    recurrence.real[:, 5:] = False
    assert jacobi(recurrence, tolerance=1e-9).passes <= 7
