"""What the forward of a Stateful GPT returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class StatefulGPTOutputWithPast(BaseModelOutputWithPast):
    """`pass_hidden_states`: in training, the last hidden states `[B, T, D]` of every pass; `last_hidden_state` is then,
    at each position, that of a pass drawn at random. `passes`, `residual`, `stepped_from` and `rounding_floor`: in
    evaluation, what the solver did (see `Solution`). `router_logits`: of a mixture of experts, if asked for, those of
    the last pass, `[B, T, E]` for each layer that has experts."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    pass_hidden_states: tuple[torch.Tensor, ...] | None = None
    passes: int | None = None
    residual: float | None = None
    stepped_from: int | None = None
    rounding_floor: float | None = None


@dataclass
class StatefulGPTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`pass_losses`: in training, the loss of every pass, `[passes]`, whose mean is `loss`. `states`: the last hidden
    states `[B, T, D]` of the last pass, without gradient: a first guess for the next time (`initial_states`).
    `aux_loss`: of a mixture of experts, if asked for, the load-balancing loss of the last pass. `loss` contains it,
    times the weight that the language model gives it."""

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    pass_losses: torch.Tensor | None = None
    states: torch.Tensor | None = None
    passes: int | None = None
    residual: float | None = None
    stepped_from: int | None = None
    rounding_floor: float | None = None
