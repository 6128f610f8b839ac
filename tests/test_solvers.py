"""The solvers on a recurrence that is small enough to be written out: the state before, and the mean of all the states
that the positions so far have read, through a matrix and tanh."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stateful_gpt.solvers import PATIENCE, RUN_COST, cyclic, groups, jacobi, relative_change, sequential


class TanhRecurrence:
    """Every position reads the state before it and, as with attention, what all earlier positions were computed from:
    `memory` holds for each position the state that it last read."""

    has_groups = True

    def __init__(self, batch, length, gain, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.real = torch.ones(batch, length, dtype=torch.bool)
        self.x = torch.randn(batch, length, 4, generator=generator, dtype=torch.float64)
        self.w = gain * torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
        self.computed = []

    def initial_state(self):
        self.memory = torch.zeros_like(self.x)
        return torch.zeros_like(self.x[:, 0]), torch.zeros(len(self.x), dtype=torch.bool)

    def apply(self, positions, before):
        """`before` `[B, |positions|, 4]`: the states that the positions read."""
        self.computed.append(positions.tolist())
        self.memory = self.memory.index_copy(1, positions, before)
        history = self.memory.cumsum(1)[:, positions] / (positions + 1)[:, None]
        return torch.tanh((before + 0.3 * history) @ self.w + self.x[:, positions])

    def step(self, position, state):
        h = self.apply(torch.tensor([position]), state[0][:, None])[:, 0]
        return h, (h, torch.ones_like(state[1]))

    def begin_at(self, position, states):
        return states[:, position - 1], torch.ones(len(states), dtype=torch.bool)

    def sweep(self, states):
        if states is None:
            self.initial_state()
            states = torch.zeros_like(self.x)
        return self.sweep_groups(states, 0, 1)

    def sweep_groups(self, states, start, num_groups):
        if states is None:
            return self.sweep(None)
        for group in groups(start, self.length, num_groups):
            positions = torch.arange(self.length)[group]
            before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, positions]
            states = states.index_copy(1, positions, self.apply(positions, before))
        return states


class WholeTanhRecurrence(TanhRecurrence):
    """One that can only be applied to all positions at once."""

    has_groups = False
    begin_at = None

    def sweep_groups(self, states, start, num_groups):
        assert num_groups == 1, "there are no groups"
        return super().sweep_groups(states, 0, 1)


def recurrences(kind=TanhRecurrence, gains=(0.1, 1.0, 4.0)):
    return st.builds(kind, st.integers(1, 3), st.integers(1, 23), st.sampled_from(gains), st.integers(0, 99))


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 9))
def test_groups_are_all_positions_from_the_start_on_each_with_its_remainder(start, length, num_groups):
    parts = [list(range(length)[group]) for group in groups(start, length, num_groups)]
    assert sorted(position for part in parts for position in part) == list(range(start, length))
    remainders = [{position % num_groups for position in part} for part in parts]
    assert all(len(r) == 1 for r in remainders) and remainders == sorted(remainders, key=min)


def close(a, b, bound=1e-12):
    torch.testing.assert_close(a, b, atol=bound, rtol=bound)


@given(recurrences(), st.integers(1, 12), st.integers(1, 9))
def test_a_pass_makes_as_many_positions_exact_as_there_are_groups(recurrence, passes, num_groups):
    exact = sequential(recurrence).hidden_states
    solution = cyclic(recurrence, passes, num_groups=num_groups)
    assert solution.passes == passes == len(solution.pass_hidden_states)
    for number, states in enumerate(solution.pass_hidden_states):
        sure = number + 1 if num_groups == 1 else num_groups * number
        close(states[:, :sure], exact[:, :sure])


@given(recurrences(), st.integers(1, 12))
def test_jacobi_is_one_group(recurrence, passes):
    a, b = jacobi(recurrence, passes, num_groups=5), cyclic(recurrence, passes, num_groups=1)
    assert torch.equal(torch.stack(a.pass_hidden_states), torch.stack(b.pass_hidden_states))


@given(
    st.one_of(recurrences(), recurrences(WholeTanhRecurrence)),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([0, 32, 10**6]),
    st.sampled_from([0.0, 1e-13]),
)
def test_without_a_number_of_passes_the_recurrence_is_solved(recurrence, num_groups, adapt, run_cost, tolerance):
    exact = sequential(recurrence).hidden_states
    with patch.dict(RUN_COST, cpu=run_cost):
        solution = cyclic(recurrence, tolerance=tolerance, num_groups=num_groups, adapt=adapt)
    close(solution.hidden_states, exact)
    if recurrence.has_groups and not adapt:
        assert solution.passes <= 2 + -(-recurrence.length // num_groups)
    exact_gradient, gradient = (
        torch.autograd.grad(h.square().sum(), recurrence.w)[0] for h in (exact, solution.hidden_states)
    )
    close(gradient, exact_gradient, 1e-9)


@pytest.mark.parametrize(
    "batch,length,gain,stepped",
    [
        (1, 12, 4.0, True),  # short
        (1, 400, 0.1, False),
        (1, 4000, 0.1, False),
        (100, 400, 0.5, True),  # many rows
        (20, 400, 0.5, True),
        (20, 400, 0.0, False),  # nothing is fed back
    ],
)
def test_steps_are_taken_where_they_are_expected_to_take_less_time(batch, length, gain, stepped):
    recurrence = TanhRecurrence(batch, length, gain)
    solution = cyclic(recurrence, tolerance=1e-4, adapt=True)
    assert (solution.stepped_from is not None) == stepped
    if not stepped:
        assert all(len(positions) > length / 2 for positions in recurrence.computed), "no groups: it contracts"
    if gain == 0:
        assert solution.passes == 2


def test_groups_take_over_where_passes_over_all_positions_do_not_contract():
    recurrence = TanhRecurrence(1, 400, gain=1.5)
    exact = sequential(recurrence).hidden_states
    recurrence.computed.clear()
    with patch.dict(RUN_COST, cpu=1):
        solution = cyclic(recurrence, tolerance=1e-4, adapt=True)
    assert any(len(positions) <= 50 for positions in recurrence.computed)
    close(solution.hidden_states, exact, 1e-3)


@pytest.mark.parametrize("solver", [jacobi, cyclic])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_it_stops_as_soon_as_the_states_change_by_no_more_than_the_tolerance(tolerance, solver):
    recurrence = TanhRecurrence(2, 200, gain=0.2)
    recurrence.x *= 0.01  # small states: the tolerance is relative to them
    solution = solver(recurrence, tolerance=tolerance)
    assert 0 < solution.residual <= tolerance and solution.passes < 50 and solution.stepped_from is None
    exact = sequential(recurrence).hidden_states
    scale = exact.square().mean(-1, keepdim=True).sqrt()
    errors = [((states - exact).abs() / scale).max() for states in jacobi(recurrence, 50).pass_hidden_states]
    # How fast changes shrink is estimated from the last two, and here they do not shrink evenly.
    assert ((solution.hidden_states - exact).abs() / scale).max() <= 2 * tolerance
    if solver is jacobi:
        assert errors[solution.passes - 1] <= 2 * tolerance < 4 * errors[solution.passes - 3]


def test_what_has_settled_is_not_computed_again():
    recurrence = TanhRecurrence(2, 200, gain=0.2)
    recurrence.w = 0.2 * torch.linalg.qr(recurrence.w.detach())[0]
    recurrence.x[:, 100:] *= 0.1  # tanh contracts less there
    solution = jacobi(recurrence, tolerance=1e-9)
    firsts = [positions[0] for positions in recurrence.computed]
    assert firsts == sorted(firsts) and firsts[-1] > 10, "more than the one position a pass that is exact anyway"
    assert all(positions[-1] == 199 for positions in recurrence.computed)
    assert len(firsts) == solution.passes
    close(solution.hidden_states, sequential(recurrence).hidden_states, 1e-8)


@pytest.mark.parametrize("kind", [TanhRecurrence, WholeTanhRecurrence])
@pytest.mark.parametrize("solver", [jacobi, cyclic])
def test_what_does_not_contract_is_stepped(solver, kind):
    recurrence = kind(2, 300, gain=4.0)
    solution = solver(recurrence, tolerance=1e-6)
    assert solution.passes <= PATIENCE + 4 and solution.residual == 0.0
    assert solution.stepped_from > 0 if recurrence.has_groups else solution.stepped_from == 0
    close(solution.hidden_states, sequential(recurrence).hidden_states)


def test_padding_does_not_keep_a_solver_going():
    recurrence = TanhRecurrence(1, 50, gain=3.0)
    recurrence.real[:, 5:] = False
    assert jacobi(recurrence, tolerance=1e-9).passes <= 7


@given(recurrences(), st.integers(0, 4), st.integers(1, 3), st.integers(1, 9))
def test_passes_without_gradients_come_first(recurrence, without, passes, num_groups):
    solution = cyclic(recurrence, passes, num_groups=num_groups, num_no_grad_passes=without)
    every = cyclic(recurrence, without + passes, num_groups=num_groups).pass_hidden_states
    assert solution.passes == len(every) and len(solution.pass_hidden_states) == passes
    for ours, theirs in zip(solution.pass_hidden_states, every[without:], strict=True):
        assert torch.equal(ours, theirs)
    # By hand: the passes with gradients, from constants.
    recurrence.initial_state()
    states = None
    for number in range(without + passes):
        states = recurrence.sweep_groups(states, 0, 1 if number == 0 else num_groups)
        if number < without:
            states, recurrence.memory = states.detach(), recurrence.memory.detach()
    gradients = [
        torch.autograd.grad(h.square().sum(), recurrence.w)[0] for h in (states, solution.pass_hidden_states[-1])
    ]
    close(gradients[1], gradients[0], 1e-9)


def spoilt(recurrence, row, position, value=torch.nan):
    recurrence.x[row, position] = value
    return recurrence


@pytest.mark.parametrize("kind", [TanhRecurrence, WholeTanhRecurrence])
@pytest.mark.parametrize("solver", [jacobi, cyclic, sequential])
def test_a_state_that_is_not_finite_is_no_solution(solver, kind):
    """And nobody goes on to look for one."""
    recurrence = spoilt(kind(1, 100, gain=0.2), row=0, position=0)
    solution = solver(recurrence, tolerance=1e-6)
    assert math.isnan(solution.residual) and solution.passes <= 3
    assert solution.stepped_from is None or solver is sequential
    padded = spoilt(kind(1, 100, gain=0.2), row=0, position=99)
    padded.real[:, 99] = False
    assert solver(padded, tolerance=1e-6).residual <= 1e-6


class OverflowingRecurrence(TanhRecurrence):
    """Whose states are infinite after one that reaches `limit` `[B, 1, 1]`: in the first pass, nobody knows."""

    def apply(self, positions, before):
        return super().apply(positions, before).where(before.abs().amax(-1, keepdim=True) < self.limit, torch.inf)


@given(
    st.sampled_from([jacobi, cyclic]),
    st.booleans(),
    st.none() | st.integers(0, 99),
    st.floats(0.2, 1),
    st.integers(0, 9),
)
@settings(max_examples=40)
def test_a_row_that_is_not_finite_costs_the_others_nothing(solver, has_groups, position, limit, seed):
    alone, together = (OverflowingRecurrence(batch, 100, gain=0.2, seed=seed) for batch in (1, 2))
    together.x, together.w = torch.cat([alone.x, alone.x]), alone.w
    alone.limit = torch.inf
    together.limit = torch.tensor([torch.inf, limit]).view(2, 1, 1)
    together.has_groups = alone.has_groups = has_groups
    if position is not None:
        spoilt(together, 1, position)
    expected, solution = solver(alone, tolerance=1e-6), solver(together, tolerance=1e-6)
    exact = sequential(together).hidden_states
    lost = ~exact[1].isfinite().all(-1)
    assert math.isnan(solution.residual) == bool(lost.any())
    assert solution.stepped_from is None and solution.passes <= expected.passes + 4
    close(solution.hidden_states[0], exact[0], 1e-5)
    assert torch.equal(~solution.hidden_states[1].isfinite().all(-1), lost)
    close(solution.hidden_states[1, ~lost], exact[1, ~lost], 1e-5)


class FragileRecurrence(TanhRecurrence):
    """Not finite as long as what it reads is far from right."""

    def apply(self, positions, before):
        states = super().apply(positions, before)
        right = torch.nn.functional.pad(self.right, (0, 0, 1, 0))[:, positions]
        return states.where((before - right).abs().amax(-1, keepdim=True) < 1e-3, torch.nan)


@pytest.mark.parametrize("solver", [jacobi, cyclic])
def test_a_pass_that_is_not_finite_is_followed_by_others(solver):
    recurrence = FragileRecurrence(2, 60, gain=1.0)
    recurrence.right = sequential(TanhRecurrence(2, 60, gain=1.0)).hidden_states
    solution = solver(recurrence, tolerance=1e-6)
    assert solution.residual <= 1e-6
    close(solution.hidden_states, recurrence.right, 1e-5)


@given(st.integers(-300, 300))
def test_what_changes_is_seen_in_states_of_any_size(exponent):
    """Whose squares are larger, or smaller, than any number."""
    states = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64) * 10.0**exponent
    change = relative_change(states, states * 1.5, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(change, torch.tensor([[2 / 12.5**0.5]], dtype=torch.float64))
    assert relative_change(states * 0, states * 0, torch.ones(1, 1, dtype=torch.bool)) == 0
