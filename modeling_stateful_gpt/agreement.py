"""Whether solving the recurrence of a model and stepping through it agree, on a text of the user's."""

import time
from dataclasses import dataclass

import torch

from .backbone import evaluation_mode
from .modeling_stateful_gpt import StatefulGPTForCausalLM
from .probe import probe, why_no_groups
from .solvers import lost_states, relative_change


@dataclass(frozen=True)
class Agreement:
    """Changes of states are in units of a state's root mean square (see `solvers.relative_change`)."""

    shape: tuple[int, int]
    """`B` and `T` of the text."""
    solver: str
    passes: int
    stepped_from: int | None
    """The position from which on the solver stepped itself, if it did."""
    rounding_floor: float
    """How far rounding moves a state of this model in its data type."""
    allowed: float
    """How far solved states may be from stepped ones in the median: 2 · `config.tolerance`, or 4 · `rounding_floor`,
    whichever is more."""
    states_median: float
    states_tenth: float
    states_max: float
    """How far solved states are from stepped ones: in the median, at least in the furthest tenth, and at most. A state
    that is not finite is infinitely far."""
    feedback: float
    """How far stepped states are, in the median, from those of the language model alone."""
    log_probs_mean: float
    log_probs_max: float
    """How far the log-probabilities of the tokens of the text are from each other."""
    same_next_token: float
    """The share of positions at which the most probable next token is the same."""
    seconds_solved: float
    seconds_stepped: float

    @property
    def agrees(self) -> bool:
        """Stepping rounds at every step, so it may be as far from the solution as solving. Where a model amplifies
        differences, single tokens may be further."""
        return self.states_median <= self.allowed and self.states_tenth <= 4 * self.allowed

    @property
    def tells(self) -> bool:
        """Whether a recurrence that is wrong would show: feedback moves states further than is allowed."""
        return self.feedback > self.allowed

    def __str__(self) -> str:
        how = f"{self.solver}, {self.passes} passes"
        unclear = ", but feedback moves states no further than rounding: compare in fp32, or train the feedback first"
        how += "" if self.stepped_from is None else f", stepped from position {self.stepped_from} on"
        return "\n".join(
            [
                f"{'text':16}{self.shape[0]} × {self.shape[1]} tokens",
                f"{'solved':16}{how}, {self.seconds_solved:.2f} s",
                f"{'stepped':16}{self.seconds_stepped:.2f} s",
                f"{'states':16}{self.states_median:.1e} apart in the median, {self.states_max:.1e} at most",
                f"{'allowed':16}{self.allowed:.1e}; rounding moves a state by {self.rounding_floor:.1e}",
                f"{'feedback':16}moves a state by {self.feedback:.1e}",
                f"{'log-probability':16}{self.log_probs_mean:.1e} apart on average, {self.log_probs_max:.1e} at most",
                f"{'next token':16}the same at {self.same_next_token:.1%} of the positions",
                f"{'agree':16}{'yes' if self.agrees else 'NO'}{unclear if self.agrees and not self.tells else ''}",
            ]
        )


@torch.no_grad()
def verify_agreement(
    model: StatefulGPTForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> Agreement:
    """Solves the recurrence over `input_ids` `[B, T]`, steps through it, and compares.

    It solves by the passes that the configuration names, cyclic ones where it names none, and never goes over to steps
    because these are faster.

    Raises:
        ValueError: for a model without feedback, or a text of fewer than two tokens.
    """
    if hasattr(model, "get_base_model"):  # An adapter around it.
        model = model.get_base_model()
    if model.config.feedback is None:
        raise ValueError("The model has no feedback (config.feedback is None): there is nothing to solve.")
    if input_ids.shape[1] < 2:
        raise ValueError(f"input_ids is {list(input_ids.shape)}; a text of at least two tokens is needed.")
    with evaluation_mode(model):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        floor = probe(model.model.backbone, len(input_ids)).rounding_floor  # Not a part of what is timed.
        began = time.perf_counter()
        solver = "jacobi" if model.config.solver == "jacobi" else "cyclic"
        solved = model(**inputs, decode_mode="solved", solver=solver)
        between = time.perf_counter()
        stepped = model(**inputs, solver="sequential")
        ended = time.perf_counter()
        plain = model(**inputs, decode_mode="no_feedback")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    change = relative_change(solved.states, stepped.states, real)
    lost = lost_states(solved.states, real) | lost_states(stepped.states, real)
    change = change.masked_fill(lost, torch.inf)[real]
    if solver == "cyclic" and (why := why_no_groups(model.model.backbone, len(input_ids))) is not None:
        solver = f"jacobi ({why})"
    predicts = (real[:, 1:] & real[:, :-1]).to(solved.logits.device)
    ours, theirs = (
        output.logits[:, :-1].float().log_softmax(-1).gather(-1, input_ids[:, 1:, None].to(output.logits.device))
        for output in (solved, stepped)
    )
    distance = (ours - theirs)[..., 0].abs()[predicts]
    same_token = (solved.logits.argmax(-1) == stepped.logits.argmax(-1))[real.to(solved.logits.device)]
    return Agreement(
        shape=(input_ids.shape[0], input_ids.shape[1]),
        solver=solver,
        passes=solved.passes,
        stepped_from=solved.stepped_from,
        rounding_floor=floor,
        allowed=max(2 * model.config.tolerance, 4 * floor),
        states_median=change.median().item(),
        states_tenth=change.quantile(0.9).item(),
        states_max=change.max().item(),
        feedback=relative_change(plain.states, stepped.states, real)[real].median().item(),
        log_probs_mean=distance.mean().item(),
        log_probs_max=distance.max().item(),
        same_next_token=same_token.float().mean().item(),
        seconds_solved=between - began,
        seconds_stepped=ended - between,
    )
