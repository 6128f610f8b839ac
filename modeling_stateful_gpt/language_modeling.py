"""From last hidden states to logits and a loss: the head of any causal language model, and a loss that holds few
logits."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

MANY_LOGITS = 2**24
"""A pass with more logits than this, which nobody sees, does not hold them all."""

TOKENS_AT_A_TIME = 256
"""It computes those of so many tokens at a time. In the backward pass each time adds to the gradient of the whole
head, which takes longer than the products themselves if the tokens are few."""

IGNORED = -100
"""The label where there is no loss."""

LOSS_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""What language models call the weight of the load-balancing loss in the whole."""


@dataclass
class GivenOutput(MoeModelOutputWithPast):
    cross_attentions: None = None
    """There is no encoder."""


class GivenHiddenStates(nn.Module):
    """Takes the place of the decoder in a causal language model: the embeddings it is given are the last hidden states
    `[B, T, D]`, and `router_logits` what its routers said. It has the numbers of the decoder, such as a multiplier,
    which some heads look up there."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        numbers = {name: value for name, value in vars(decoder).items() if isinstance(value, (int, float))}
        vars(self).update({name: value for name, value in numbers.items() if not hasattr(self, name)})

    def forward(self, *args, inputs_embeds: torch.Tensor, router_logits=None, **kwargs) -> GivenOutput:
        return GivenOutput(last_hidden_state=inputs_embeds, router_logits=router_logits)

    def get_input_embeddings(self) -> None:
        """There are none. transformers asks before it looks for the head."""


def find_decoder(causal_lm: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The part of a causal language model that computes the last hidden states, and its name there.

    Raises:
        ValueError: if there is none, or more than one.
    """
    parts = {name: part for name, part in causal_lm.named_children() if isinstance(part, PreTrainedModel)}
    name, decoder = next(iter(parts.items()), ("", None))
    try:
        plain = not causal_lm.config.is_encoder_decoder and (
            len(parts) == 1 and decoder.get_input_embeddings() is not None and hasattr(decoder.config, "hidden_size")
        )
    except NotImplementedError:  # The decoder of an encoder-decoder model.
        plain = False
    if not plain:
        raise ValueError(f"{type(causal_lm).__name__} is not a plain language model: one decoder with a head on it.")
    return name, decoder


def take_head(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """`causal_lm` without its decoder, as a module of its own; `causal_lm` stays as it is."""
    name, decoder = find_decoder(causal_lm)
    head = copy.copy(causal_lm)
    # A device map has put these in front of the class's own, bound to the whole model.
    for attribute in ("forward", "_old_forward", "_hf_hook"):
        vars(head).pop(attribute, None)
    vars(head).update({name: type(hooks)() for name, hooks in vars(causal_lm).items() if name.endswith("_hooks")})
    head._modules = {**causal_lm._modules, name: GivenHiddenStates(decoder)}
    head._tied_weights_keys, head.all_tied_weights_keys = {}, {}  # Whoever holds the head ties it.
    return head


def tied_weights(head: PreTrainedModel, decoder: str) -> dict[str, str]:
    """Which weights of `head` are those of its decoder, whose place in the model at hand is `decoder`."""
    here = next(name for name, part in head.named_children() if isinstance(part, GivenHiddenStates))
    tied = type(head)._tied_weights_keys or {}
    return {
        f"lm_head.{name}": f"{decoder}.{source.removeprefix(f'{here}.')}"
        for name, source in tied.items()
        if source.startswith(f"{here}.")
    }


def make_head(text_config: PreTrainedConfig) -> PreTrainedModel:
    return take_head(AutoModelForCausalLM.from_config(text_config, dtype=torch.get_default_dtype()))


def has_many_logits(hidden_states: torch.Tensor, vocab_size: int) -> bool:
    tokens = hidden_states[..., 0].numel()
    return tokens > TOKENS_AT_A_TIME and tokens * vocab_size > MANY_LOGITS


def loss_in_chunks(
    model: PreTrainedModel,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """`model.loss_function`, whose logits are computed for some positions at a time, and again in the backward pass.

    Args:
        hidden_states: `[B, T, D]`, the last ones.
        labels: `[B, T]`, the tokens themselves; not read where `shift_labels`, those that follow them, are given.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != kwargs.get("ignore_index", IGNORED)).sum()

    def loss_of(hidden_states: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
        logits = model.compute_logits(hidden_states)
        return model.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels.contiguous(),
            **kwargs,
        )

    positions = -(-TOKENS_AT_A_TIME // len(hidden_states))
    chunks = zip(hidden_states.split(positions, 1), shift_labels.split(positions, 1), strict=True)
    return torch.stack([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def logits_and_losses(
    model: PreTrainedModel, passes: list[torch.Tensor], labels: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits `[B, T, V]` of the last of the `passes`, hidden states `[B, T, D]` each, and if there are `labels` the
    loss of every pass."""
    losses = []
    for hidden_states in passes:
        if hidden_states is not passes[-1] and has_many_logits(hidden_states, model.config.vocab_size):
            losses.append(loss_in_chunks(model, hidden_states, labels, **kwargs))
            continue
        logits = model.compute_logits(hidden_states)
        if labels is not None:
            losses.append(model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs))
    return logits, losses


def balancing_loss(
    head: PreTrainedModel,
    hidden_states: torch.Tensor,
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, float]:
    """The load-balancing loss of a mixture of experts, as the language model's own head computes it (None where it
    has none), and its weight.

    Args:
        hidden_states: `[B, T, D]`, the last ones.
        router_logits: `[B, T, E]` for each layer that has experts.
        attention_mask: as a forward has it.
    """
    if attention_mask is not None:
        attention_mask = attention_mask[:, -hidden_states.shape[1] :] if attention_mask.ndim == 2 else None
    routed = tuple(z.flatten(0, 1) for z in router_logits)
    output = head(
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        router_logits=routed,
        use_cache=False,
        logits_to_keep=1,
        output_router_logits=True,
    )
    weight = next((getattr(head, name) for name in LOSS_WEIGHTS if hasattr(head, name)), 0.0)
    return output.get("aux_loss"), weight
