"""Has the recurrence of a batch evaluated as its plan says."""

import contextlib
import math

import torch
from transformers.utils import logging

from .backbone import evaluation_mode, without_checkpointing
from .compat import StaticLayer, checkpointing, is_sharded
from .configuration_stateful_gpt import StatefulGPTConfig
from .inputs import look_up
from .plan import Plan
from .probe import probe, why_no_groups
from .recurrence import RECORDED, LanguageModelRecurrence, check_equal
from .solvers import SOLVERS, Solution, sequential
from .training_recurrence import TrainingRecurrence

logger = logging.get_logger(__name__)

ROUNDINGS = 8
"""The tolerance is at least so many times what rounding does to a state."""


def evaluate(recurrence: LanguageModelRecurrence, plan: Plan, config: StatefulGPTConfig) -> Solution:
    recurrence.in_lockstep = recurrence.sharded
    if recurrence.sharded and is_sharded(recurrence.fusion):
        raise ValueError(
            "The fusion is sharded apart from the model, and not all processes need it equally often. Wrap the "
            "decoder's layers alone (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)."
        )
    language_model = recurrence.backbone.language_model
    # In training mode, checkpointed layers would keep nothing in the cache.
    with without_checkpointing(language_model) if language_model.training else contextlib.nullcontext():
        solution = evaluate_alone(recurrence, plan, config)
    recurrence.wait_for_others()
    return solution


def evaluate_alone(recurrence: LanguageModelRecurrence, plan: Plan, config: StatefulGPTConfig) -> Solution:
    if plan.solver == "plain":
        return one_pass(recurrence.plain())
    if plan.solver == "shifted":
        return one_pass(recurrence.sweep(recurrence.fed_back))
    if recurrence.length == 1:
        return sequential(recurrence)
    if recurrence.backbone.traits.has_linear_attention and recurrence.past > 0:
        # Not every such model can go on from its states by more than one token.
        logger.warning_once(
            f"{name_of(recurrence)} has layers with a state. More than one token after a cached text is stepped "
            f"through, which takes longer."
        )
        return sequential(recurrence)
    if plan.num_passes is not None:
        return run_solver(recurrence, plan, config)
    floor = None
    if plan.solver != "sequential" and not torch.compiler.is_exporting():
        floor = probe(recurrence.backbone, len(recurrence.embeds), recurrence.embeds.device).rounding_floor
    tolerance = config.tolerance
    if tolerance > 0 and floor is not None:  # Asked for 0, it goes on until nothing changes.
        tolerance = max(tolerance, ROUNDINGS * floor)
    adapt = plan.adapt and can_step(recurrence)
    solution = run_solver(recurrence, plan, config, tolerance=tolerance, adapt=adapt)
    solution.rounding_floor = floor
    if math.isnan(solution.residual):
        logger.warning_once(
            "A sequence's hidden states are not finite (NaN or infinite), nor is what follows from them. Look at "
            "the weights and the inputs; if the model computes in fp16, use bf16 or fp32."
        )
    record(recurrence, solution)
    return solution


def train(recurrence: TrainingRecurrence, plan: Plan, config: StatefulGPTConfig) -> Solution:
    """The passes of a training batch, with gradients as the plan says."""
    if plan.solver == "plain":
        return one_pass(recurrence.plain())
    if plan.solver == "shifted":
        return one_pass(recurrence.sweep(recurrence.fed_back))
    stepped = plan.solver == "sequential"
    if stepped and checkpointing(recurrence.backbone.language_model):
        raise ValueError(
            "Training token by token needs the keys and values that checkpointed activations throw away. Set "
            "gradient_checkpointing=False (trl's trainers have it on by default), or train by the solved "
            "recurrence: training_solver='cyclic', num_no_grad_passes=None."
        )
    if stepped and recurrence.backbone.traits.has_linear_attention and torch.is_grad_enabled():
        raise ValueError(
            f"{name_of(recurrence)} writes its states in place, and cannot be trained token by token; choose "
            f"training_solver='jacobi' or 'cyclic'."
        )
    if recurrence.sharded:
        check_equal(recurrence.length if stepped else min(recurrence.length, config.num_groups))
    if plan.solve_first:
        recurrence.guess = solve_states(recurrence, plan, config)
    solution = run_solver(recurrence, plan, config)
    if stepped:
        record(recurrence, solution)
    return solution


def can_step(recurrence: LanguageModelRecurrence) -> bool:
    """Whether steps do what passes do: some write in place what gradients need, and not every 4-D mask has steps."""
    layers = () if recurrence.cache is None else recurrence.cache.layers
    static = any(isinstance(layer, StaticLayer) for layer in layers)
    in_place = torch.is_grad_enabled() and (static or recurrence.backbone.traits.has_linear_attention)
    is_4d = recurrence.attention_mask is not None and recurrence.attention_mask.ndim == 4
    return not is_4d and not in_place


@torch.no_grad()
def solve_states(recurrence: TrainingRecurrence, plan: Plan, config: StatefulGPTConfig) -> torch.Tensor:
    """The states `[B, T, D]` that evaluation computes: no dropout, no noise, nothing checkpointed."""
    with evaluation_mode(recurrence.backbone.language_model), evaluation_mode(recurrence.fusion):
        return evaluate(recurrence.for_evaluation(), Plan(plan.solve_first), config).hidden_states


def run_solver(recurrence: LanguageModelRecurrence, plan: Plan, config: StatefulGPTConfig, **how) -> Solution:
    if plan.solver == "cyclic" and not recurrence.has_groups:
        why = why_no_groups(recurrence.backbone, len(recurrence.embeds)) or (
            "this cache allows to run all positions only"
        )
        same = "which gives the same and takes more passes"
        other = "whose states after so many passes are others"
        logger.warning_once(
            f"{name_of(recurrence)} cannot be run on some positions at a time here ({why}). The cyclic solver falls "
            f"back to Jacobi, {same if plan.num_passes is None else other}."
        )
    solve = look_up(SOLVERS, plan.solver, "solver")
    return solve(
        recurrence,
        plan.num_passes,
        num_groups=config.num_groups,
        num_no_grad_passes=plan.num_no_grad_passes,
        **how,
    )


def record(recurrence: LanguageModelRecurrence, solution: Solution) -> None:
    """The states being known, one pass over all positions records what was computed piece by piece."""
    if any(recurrence.kwargs.get(name) for name in RECORDED):
        recurrence.sweep(solution.hidden_states)


def sample_pass_per_token(passes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden states `[B, T, D]`, each position's from one of the passes, drawn at random."""
    states = passes[0]
    if len(passes) > 1:
        drawn = torch.randint(len(passes), (*states.shape[:2], 1), device=states.device)
        for number, others in enumerate(passes[1:], start=1):
            states = torch.where(drawn == number, others, states)
    return states


def one_pass(hidden_states: torch.Tensor) -> Solution:
    return Solution(hidden_states, passes=1, pass_hidden_states=(hidden_states,))


def name_of(recurrence: LanguageModelRecurrence) -> str:
    return type(recurrence.backbone.language_model).__name__
