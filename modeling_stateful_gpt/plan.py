"""How a batch is evaluated: which solver, how many passes, and how many of them without gradients."""

import random
from dataclasses import dataclass

from .configuration_stateful_gpt import StatefulGPTConfig


@dataclass(frozen=True)
class Plan:
    """`solver`: a key of `SOLVERS`; or `"plain"`, the language model alone; or `"shifted"`, the one exact pass of the
    control, whose states are known beforehand. `num_passes`: passes with gradients, None for as many as the tolerance
    takes. `num_no_grad_passes`: those before them. `solve_first`: the solver by which the solution is
    found, from which the passes then begin. `adapt`: whether the solver may go over to what takes less time."""

    solver: str
    num_passes: int | None = None
    num_no_grad_passes: int = 0
    solve_first: str | None = None
    adapt: bool = False

    @property
    def depends_on_groups(self) -> bool:
        """Whether the result depends on which positions make a group: a solution does not, a number of passes does."""
        return self.solver == "cyclic" and self.num_passes is not None


PLAIN = Plan("plain", 1)
SHIFTED = Plan("shifted", 1)
STEPPED = Plan("sequential")
SOLVED = Plan("cyclic", adapt=True)


def draw_num_passes(config: StatefulGPTConfig, batch: int) -> int:
    """The number of passes with gradients of the training batch number `batch`, by `pass_probabilities`. It does not
    depend on the global random state: that may differ between processes, which must agree on the number."""
    generator = random.Random(f"{config.pass_seed} {batch}")
    return generator.choices(range(1, len(config.pass_probabilities) + 1), weights=config.pass_probabilities)[0]


def plan_training(
    config: StatefulGPTConfig, num_passes: int | None, solver: str | None, drawn: int, has_guess: bool
) -> Plan:
    """The passes of a training batch. The first row that fits counts.

    | given | plan |
    |---|---|
    | one pass, none before it, no first guess, not stepped | plain |
    | the control | shifted |
    | solver "sequential" | stepped |
    | `num_no_grad_passes=None`, no `num_passes` | solved, then Jacobi passes from there |
    | anything else | passes by the solver |

    Args:
        num_passes, solver: the arguments of the forward. With `num_passes`, all passes have gradients.
        drawn: the number of passes with gradients that the configuration gives for this batch.
        has_guess: whether the first pass is given states.
    """
    solver = solver or config.training_solver
    passes, without = (drawn, config.num_no_grad_passes) if num_passes is None else (num_passes, 0)
    if passes == 1 and without == 0 and not has_guess and solver != "sequential":
        return PLAIN
    if config.feedback_source == "embedding":
        return SHIFTED
    if solver == "sequential":
        return STEPPED
    if without is None:
        return Plan("jacobi", passes, solve_first=solver)
    return Plan(solver, passes, without)


def plan_evaluation(
    config: StatefulGPTConfig,
    num_passes: int | None,
    solver: str | None,
    decode_mode: str | None,
    length: int,
    has_guess: bool,
    steps_only: bool,
) -> Plan:
    """The evaluation of a batch. The first row that fits counts; a token alone has one position.

    | given | plan |
    |---|---|
    | `num_passes=1` or mode "no_feedback" or, for more than a token, "plain_prompt" | plain |
    | the control, unless stepped | shifted |
    | a token alone; solver "sequential"; the language model can only step here | stepped |
    | `num_passes`; mode "passes", if training makes a number of passes | so many, as training makes them |
    | a solver, as an argument or in the configuration | solved to the tolerance by it |
    | anything else | solved to the tolerance, by what is expected to take the least time |

    A solver "sequential" steps in any mode. A first guess makes of one pass another one than the plain.

    Args:
        num_passes, solver, decode_mode: the arguments of the forward.
        length: how many tokens are given.
        has_guess: whether the first pass is given states.
        steps_only: whether the language model cannot go on from its cache by more than one token.
    """
    mode, stepped = decode_mode or config.decode_mode, solver == "sequential"
    if num_passes is None and not stepped:
        if mode == "no_feedback" or (mode == "plain_prompt" and length > 1):
            return PLAIN
        if mode == "passes" and length > 1:
            num_passes = config.prefill_passes or config.trained_passes()
    if num_passes == 1 and not has_guess:
        return PLAIN
    if config.feedback_source == "embedding" and not stepped:
        return SHIFTED
    if length == 1 or steps_only or stepped:
        return STEPPED
    if num_passes is None:
        chosen = solver or config.solver
        return Plan(chosen) if chosen else SOLVED
    candidates = (solver, config.training_solver, "jacobi")
    return Plan(next(name for name in candidates if name not in (None, "sequential")), num_passes)
