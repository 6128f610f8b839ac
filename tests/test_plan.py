"""The plan of a batch, row by row of the tables in `plan.py`; and the timeline of its tokens."""

import pytest
import torch
from transformers import DynamicCache

from modeling_stateful_gpt import StatefulGPTConfig
from modeling_stateful_gpt.plan import PLAIN, SHIFTED, SOLVED, STEPPED, Plan, plan_evaluation, plan_training
from modeling_stateful_gpt.timeline import make_timeline


def trained(num_passes=None, solver=None, drawn=1, has_guess=False, **config):
    return plan_training(StatefulGPTConfig(**config), num_passes, solver, drawn, has_guess)


JACOBI = {"training_solver": "jacobi", "num_no_grad_passes": 0}


@pytest.mark.parametrize(
    "plan,expected",
    [
        (trained(), Plan("cyclic", 1, 2)),
        (trained(drawn=3), Plan("cyclic", 3, 2)),
        (trained(num_passes=3), Plan("cyclic", 3)),
        (trained(num_passes=1), PLAIN),
        (trained(num_passes=1, has_guess=True), Plan("cyclic", 1)),
        (trained(**JACOBI), PLAIN),
        (trained(**JACOBI, drawn=2), Plan("jacobi", 2)),
        (trained(**JACOBI, solver="cyclic", drawn=2), Plan("cyclic", 2)),
        (trained(solver="sequential"), STEPPED),
        (trained(training_solver="sequential", num_passes=1), STEPPED),
        (trained(num_no_grad_passes=None), Plan("jacobi", 1, solve_first="cyclic")),
        (trained(num_no_grad_passes=None, num_passes=2), Plan("cyclic", 2)),
        (trained(feedback_source="embedding"), SHIFTED),
        (trained(feedback_source="embedding", training_solver="sequential"), SHIFTED),
        (trained(feedback_source="embedding", num_passes=1), PLAIN),
    ],
)
def test_the_plan_of_a_training_batch(plan, expected):
    assert plan == expected


def evaluated(num_passes=None, solver=None, mode=None, length=9, has_guess=False, steps_only=False, **config):
    return plan_evaluation(StatefulGPTConfig(**config), num_passes, solver, mode, length, has_guess, steps_only)


@pytest.mark.parametrize(
    "plan,expected",
    [
        (evaluated(), SOLVED),
        (evaluated(solver="cyclic"), Plan("cyclic")),
        (evaluated(solver="jacobi"), Plan("jacobi")),
        (evaluated(length=1), STEPPED),
        (evaluated(steps_only=True), STEPPED),
        (evaluated(solver="sequential"), STEPPED),
        (evaluated(solver="sequential", mode="no_feedback"), STEPPED),
        (evaluated(num_passes=1), PLAIN),
        (evaluated(num_passes=1, has_guess=True), Plan("cyclic", 1)),
        (evaluated(num_passes=3), Plan("cyclic", 3)),
        (evaluated(num_passes=3, training_solver="sequential"), Plan("jacobi", 3)),
        (evaluated(mode="no_feedback"), PLAIN),
        (evaluated(mode="no_feedback", length=1), PLAIN),
        (evaluated(mode="plain_prompt"), PLAIN),
        (evaluated(mode="plain_prompt", length=1), STEPPED),
        (evaluated(mode="passes"), Plan("cyclic", 3)),
        (evaluated(mode="passes", prefill_passes=5), Plan("cyclic", 5)),
        (evaluated(mode="passes", length=1), STEPPED),
        (evaluated(mode="passes", num_no_grad_passes=None), SOLVED),
        (evaluated(decode_mode="passes", mode="solved"), SOLVED),
        (evaluated(feedback_source="embedding"), SHIFTED),
        (evaluated(feedback_source="embedding", length=1), SHIFTED),
        (evaluated(feedback_source="embedding", solver="sequential"), STEPPED),
    ],
)
def test_the_plan_of_an_evaluation(plan, expected):
    assert plan == expected


def test_a_number_of_cyclic_passes_depends_on_the_groups_and_a_solution_does_not():
    assert Plan("cyclic", 3).depends_on_groups and not Plan("cyclic").depends_on_groups
    assert not Plan("jacobi", 3).depends_on_groups and not STEPPED.depends_on_groups


def timeline(attention_mask=None, position_ids=None, cache=None, length=5):
    mask, positions = (None if z is None else torch.tensor([z]) for z in (attention_mask, position_ids))
    return make_timeline(1, length, mask, positions, cache, torch.device("cpu"))


def test_padding_is_passed_over():
    line = timeline(attention_mask=[0, 1, 0, 1, 1])
    assert line.is_token.tolist() == [[False, True, False, True, True]] and line.is_first is None
    assert line.last_slot.tolist() == [[0, 2, 2, 4, 5]] and line.previous_slot.tolist() == [[0, 0, 2, 2, 4]]
    assert line.has_previous(torch.tensor([False])).tolist() == [[False, False, True, True, True]]
    assert line.has_previous(torch.tensor([True])).all()


def test_positions_say_what_is_packed_where_there_is_neither_mask_nor_cache():
    positions = [0, 1, 2, 0, 1]
    line = timeline(position_ids=positions)
    assert line.has_previous(torch.tensor([False])).tolist() == [[False, True, True, False, True]]
    for more in ({"attention_mask": [1, 1, 1, 1, 1]}, {"cache": DynamicCache()}):
        line = timeline(position_ids=positions, **more)
        assert line.is_first is None and line.has_previous(torch.tensor([False])).tolist() == [[False] + [True] * 4]
