"""Stateful GPT: a language model whose last hidden state enriches the next step's token embedding.

`LanguageModelRecurrence` is the equation `h_t = f(fuse(e_t, h_{t-1}), history)` for one batch, `StatefulGPTModel` has
it solved, and `StatefulGPTForCausalLM` puts the head on it.
"""

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .alignment import Alignment, find_alignment, find_padding, first_of_sequence
from .cache import (
    append,
    can_reorder,
    can_scatter,
    copy_states,
    keep_states,
    last_hidden_state_layer,
    past_length,
    put,
    refuse_last_hidden_state,
    scatter,
    snapshot,
)
from .compat import (
    CACHE,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    accept_cache,
    cache_argument,
    checkpointing,
    create_masks,
    is_sharded,
    merge_with_config_defaults,
    slice_logits_to_keep,
)
from .configuration_gateloop import GateLoopConfig
from .configuration_stateful_gpt import DECODE_MODES, StatefulGPTConfig
from .feedback import FUSIONS, Fusion
from .generation_stateful_gpt import StatefulGenerationMixin
from .hub import HubModel
from .language_modeling import (
    find_decoder,
    has_many_logits,
    loss_in_chunks,
    make_head,
    take_head,
    tied_weights,
)
from .modeling_gateloop import (
    GateLoopModel,
    NextTokenLabels,
    SequenceClassificationHead,
    TokenClassificationHead,
    check_inputs,
    default_position_ids,
    embed_tokens,
    look_up,
    of_new_tokens,
    read_mask,
)
from .probe import PROBE_LENGTH, Probe, probe_recurrence, steps_apart
from .solvers import SOLVERS, Solution, State, forget_casts, groups, sequential

logger = logging.get_logger(__name__)

ROUNDINGS = 8
"""The tolerance is at least so many times what rounding does to a state."""

ROUTED = "output_router_logits"
"""Asks a mixture of experts for its load-balancing loss, as a field of its configuration or an argument."""

LOSS_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""What language models call the weight of that loss in the whole."""

RECORDED = ("output_hidden_states", "output_attentions", ROUTED)


Mask = torch.Tensor | dict[str, torch.Tensor]
"""What each position reads, as the language model takes it: one mask, or one for each type of layer."""


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


class LanguageModelRecurrence:
    """The recurrence of one batch (see `solvers.Recurrence`).

    A position's previous state is that of the last real token before it: padding is passed over. There is none at the
    beginning, nor at position 0 of a packed sequence; there, the input is the embedding itself.
    """

    def __init__(
        self,
        model: "StatefulGPTModel",
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        initial_states: torch.Tensor | None = None,
        **kwargs,
    ):
        batch, self.length, _ = embeds.shape
        self.model, self.embeds, self.cache, self.kwargs = model, embeds, cache, kwargs
        self.per_token = per_token(kwargs, batch, self.length)
        if initial_states is not None:
            # What is no number is no guess, either.
            sane = initial_states.isfinite().all(-1, keepdim=True)
            initial_states = initial_states.where(sane, torch.zeros((), device=initial_states.device))
        self.guess = initial_states
        self.attention_mask = attention_mask
        self.past = past_length(cache)
        # As in transformers, positions say what is packed only where there is neither a mask nor a cache.
        self.may_be_packed = position_ids is not None and attention_mask is None and cache is None
        if position_ids is None:
            position_ids = default_position_ids(self.length, attention_mask, cache, embeds.device)
        self.position_ids = position_ids.expand(batch, -1)

        if attention_mask is not None and attention_mask.ndim == 2:
            self.real = of_new_tokens(attention_mask, self.past, self.length).bool()
        else:
            self.real = torch.ones(batch, self.length, dtype=torch.bool, device=embeds.device)
        self.starts = self.real & (self.position_ids == 0)
        if self.may_be_packed:
            self.starts = first_of_sequence(self.position_ids)

        self.before = last_hidden_state_layer(cache, model.config.text_config).read() if cache is not None else None
        if self.before is not None and len(self.before[0]) != batch:
            raise ValueError(
                f"The cache holds {len(self.before[0])} sequences, the input {batch}; they must be the same."
            )
        exists = self.initial_state()[1][:, None]
        # Slots of the states with the one from before the sequence put in front: 0, then t + 1 for position t.
        slots = torch.arange(1, self.length + 1, device=embeds.device).expand(batch, -1)
        self.in_force = torch.where(self.real, slots, 0).cummax(dim=1).values
        self.in_force_exists = (self.in_force > 0) | exists
        self.previous = nn.functional.pad(self.in_force[:, :-1], (1, 0))
        self.has_previous = torch.cat([exists, self.in_force_exists[:, :-1]], dim=1) & ~self.starts
        if attention_mask is not None and attention_mask.ndim == 4 and not torch.compiler.is_compiling():
            self.refuse_hidden_predecessors()
        self.sharded, self.in_lockstep = is_sharded(model), False
        self.running: Cache | None = None
        self.scattered: Cache | None = None
        self.can_be_split: bool | None = None
        self.output: dict[str, tuple[torch.Tensor, ...] | None] = {}

    def refuse_hidden_predecessors(self) -> None:
        """A 4-D mask does not say what is padding, and where a sequence begins only the positions can."""
        mask, queries = self.attention_mask, torch.arange(self.length, device=self.embeds.device)
        read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        predecessors = read[:, :, queries, (queries + self.past - 1).clamp(min=0)].any(1)
        if (self.has_previous & ~predecessors).any():
            raise ValueError(
                "A 4-D attention_mask hides from a token the one before it, whose state it would read. Say what is "
                "padding by a 2-D mask, and where a packed sequence begins by position 0 in position_ids."
            )

    def initial_state(self) -> State:
        if self.before is not None:
            return self.before
        batch, _, width = self.embeds.shape
        return self.embeds.new_zeros(batch, width), self.real.new_zeros(batch)

    def step(self, position: int, state: State) -> tuple[torch.Tensor, State]:
        if position == 0:
            self.running = self.own_cache() if self.length == 1 else snapshot(self.own_cache())
        here = slice(position, position + 1)
        h, exists = state
        inputs = self.fuse(self.embeds[:, here], h[:, None], self.has_previous[:, here])
        padded = self.attention_mask is not None and self.model.has_linear_attention
        before = copy_states(self.running) if padded else None
        hidden_state = self.run(inputs, self.running, here, self.mask_at(position))[:, 0]
        if before is not None:
            keep_states(self.running, before, self.real[:, position])
        carried = self.embeds[:, position] if self.model.config.feedback_source == "embedding" else hidden_state
        real = self.real[:, position]
        return hidden_state, (torch.where(real[:, None], carried, h), exists | real)

    def begin_at(self, position: int, states: torch.Tensor) -> State:
        self.running = snapshot(self.own_cache())
        append(self.running, self.scattered, position)
        last = slice(position - 1, position)
        return self.at(self.in_force[:, last], self.slots(states))[:, 0], self.in_force_exists[:, position - 1]

    def sweep(self, states: torch.Tensor | None) -> torch.Tensor:
        inputs = self.inputs(slice(None), states, self.slots(states))
        self.running = snapshot(self.cache) if self.cache is not None else None
        return self.run(inputs, self.running, slice(None), self.attention_mask)

    def sweep_groups(self, states: torch.Tensor | None, start: int, num_groups: int) -> torch.Tensor:
        if not self.has_groups:
            return self.sweep(states)
        if self.scattered is None:
            self.scattered, self.group_masks = scatter(self.own_cache()), self.masks()
        slots, parts, outputs = self.slots(states), groups(start, self.length, num_groups), []
        for group in parts:
            inputs = self.inputs(group, states, slots)
            for layer in self.scattered.layers:
                layer.positions = group
            whole = len(inputs[0]) == self.length and self.past == 0 and not self.may_be_packed
            # The language model's own mask, where it has one, may have a faster kernel.
            masks = {name: mask[:, :, group] for name, mask in self.group_masks.items()}
            mask = self.attention_mask if whole else masks if len(masks) > 1 else next(iter(masks.values()))
            hidden_states = self.run(inputs, self.scattered, group, mask)
            slots = put(slots, hidden_states, slice(group.start + 1, None, num_groups), dim=1)
            outputs.append(self.output)
        self.running = self.scattered
        if any(self.kwargs.get(name) for name in RECORDED):
            self.output = in_order(outputs, parts, self.length)
        return slots[:, 1:]

    @property
    def has_groups(self) -> bool:
        if self.can_be_split is None:
            self.can_be_split = (
                (self.attention_mask is None or self.attention_mask.ndim == 2)
                and can_scatter(self.own_cache())
                and (torch.compiler.is_compiling() or self.model.why_no_groups(len(self.embeds)) is None)
            )
        return self.can_be_split

    def inputs(self, group: slice, states: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """What the language model gets at the positions of `group`, given the states in `slots(states)`."""
        e = self.embeds[:, group]
        if states is None and self.guess is None and self.before is None:
            return e.clone()  # CTRL scales what it is given in place.
        return self.fuse(e, self.at(self.previous[:, group], slots), self.known(states)[:, group])

    def own_cache(self) -> Cache:
        return DynamicCache(config=self.model.config.text_config) if self.cache is None else self.cache

    def reads(self) -> torch.Tensor:
        """Which keys `[B or 1, 1, T, past + T]` each position reads: those before it, its own, and no padding."""
        keys = torch.arange(self.past + self.length, device=self.embeds.device)
        queries = keys[self.past :, None]
        reads = (keys <= queries)[None]
        if self.attention_mask is not None:
            reads = reads & self.attention_mask.bool()[:, None, : len(keys)]
        elif self.may_be_packed:
            sequence = self.starts.cumsum(1)
            reads = reads & (sequence[:, :, None] == sequence[:, None])
        # Padding reads itself, for a softmax over nothing is not a number.
        reads = (reads | (keys == queries))[:, None].expand(len(self.embeds), -1, -1, -1)
        if self.model.language_model.config._attn_implementation == "sdpa":
            return reads
        dtype = self.embeds.dtype
        return torch.zeros((), dtype=dtype, device=reads.device).where(reads, torch.finfo(dtype).min)

    def masks(self) -> dict[str, torch.Tensor]:
        """What `reads` says, for each type of layer: some attend to a window or to a chunk alone."""
        config = self.model.language_model.config
        if not any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
            return {"": self.reads()}
        masks = create_masks(
            self.cache if self.past > 0 else None,
            config=config,
            inputs_embeds=self.embeds,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids if self.may_be_packed else None,
        )
        masks = masks if isinstance(masks, dict) else {"": masks}
        return {name: self.reads() if mask is None else self.with_itself(mask) for name, mask in masks.items()}

    def with_itself(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` `[B or 1, 1, T, S]`, in which each position reads itself, be it padding."""
        keys = torch.arange(mask.shape[-1], device=mask.device)
        itself = keys == keys[-self.length :, None]
        return mask | itself if mask.dtype == torch.bool else mask.masked_fill(itself, 0)

    def plain(self) -> torch.Tensor:
        """The language model alone: no state, not even one from before the sequence, is fed back."""
        self.running = self.cache
        return self.run(self.embeds.clone(), self.cache, slice(None), self.attention_mask)

    def slots(self, states: torch.Tensor | None) -> torch.Tensor:
        """`[B, T + 1, D]`: the state from before the sequence, then the given `[B, T, D]` or the first guess."""
        if states is None:
            states = torch.zeros_like(self.embeds) if self.guess is None else self.guess.to(self.embeds)
        return torch.cat([self.initial_state()[0][:, None], states], dim=1)

    def known(self, states: torch.Tensor | None) -> torch.Tensor:
        """`[B, T]`: whether a position reads a state. Of the first guess, rows of zeros say nothing."""
        if states is not None:
            return self.has_previous
        guessed = torch.zeros_like(self.real) if self.guess is None else (self.guess != 0).any(-1)
        return self.has_previous & nn.functional.pad(guessed, (1, 0), value=True).gather(1, self.previous)

    @staticmethod
    def at(slots: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The states of the given slots `[B, T']`: 0 is the one from before, t + 1 that of position t."""
        return states.gather(1, slots[..., None].expand(-1, -1, states.shape[-1]))

    def fuse(self, e: torch.Tensor, h: torch.Tensor, has_previous: torch.Tensor) -> torch.Tensor:
        return torch.where(has_previous[..., None], self.model.feedback(e, h).to(e.device), e)

    def run(
        self, inputs: torch.Tensor, cache: Cache | None, positions: slice, attention_mask: Mask | None
    ) -> torch.Tensor:
        if self.in_lockstep:
            anyone(True, self.embeds.device)
        if self.model.reads_own_mask_only and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs.shape[1] :]  # type: ignore[index]
        output = self.model.language_model(
            inputs_embeds=inputs,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **{self.model.cache_argument: cache},
            **({"position_ids": self.position_ids[:, positions]} if self.model.takes_positions else {}),
            **{**self.kwargs, **{name: z[:, positions] for name, z in self.per_token.items()}},
        )
        self.output = {name: output.get(name) for name in ("hidden_states", "attentions")}
        routed = output.get("router_logits")
        # One row for each token, in some models of one dimension more.
        self.output["router_logits"] = routed and tuple(z.view(*inputs.shape[:2], -1) for z in routed)
        # Spread over devices, a model's last layer may be on another one than the embedding, where its states go next.
        # And some sum their residual stream in fp32 (Mamba).
        return output.last_hidden_state.to(self.embeds)

    def wait_for_others(self) -> None:
        """Where the weights are sharded, a run takes all processes, and how many runs it takes depends on the text: who
        is done before the others runs along until all are."""
        while self.in_lockstep and anyone(False, self.embeds.device):
            one = {name: z[:, :1] for name, z in self.per_token.items()}
            self.model.language_model(inputs_embeds=self.embeds[:, :1], use_cache=False, **one)

    def mask_at(self, position: int) -> torch.Tensor | None:
        """The attention mask of one position, which sees the ones before it and itself."""
        if self.attention_mask is not None:
            if self.length == 1:
                return self.attention_mask
            if self.attention_mask.ndim == 2:
                return self.attention_mask[:, : self.past + position + 1]
            raise ValueError("Stepping over a sequence needs a 2-D attention_mask; use solver='jacobi' with a 4-D one.")
        if self.may_be_packed:
            sequence = self.starts.cumsum(1)[:, : position + 1]
            return (sequence == sequence[:, -1:]).long()
        return None

    def commit(self, states: torch.Tensor) -> None:
        """Leaves in the cache what the last run wrote, and the states `[B, T, D]` that the next step can feed back."""
        if self.cache is None:
            return
        if self.scattered is not None and self.running is self.scattered:
            append(self.cache, self.scattered)
        elif self.running is not self.cache:
            self.cache.layers = self.running.layers
        layer = last_hidden_state_layer(self.cache, self.model.config.text_config)
        layer.write(self.at(self.in_force, self.slots(states)), self.in_force_exists)


def anyone(running: bool, device: torch.device) -> bool:
    """Whether any of the processes is running, each of which says of itself."""
    flag = torch.tensor(running, dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def check_equal(runs: int) -> None:
    """Raises a ValueError in every process if they would not make equally many runs in a training pass."""
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, runs)
    if len(set(counts)) > 1:
        raise ValueError(
            "With sharded weights all processes run the model together, and their batches are too unequally long. Pad "
            "them to one length (pad_to_multiple_of in the data collator), or set training_solver='jacobi'."
        )


def per_token(kwargs: dict, batch: int, length: int) -> dict[str, torch.Tensor]:
    """The keywords of a language model that say something of each token, `[B or 1, T, …]`: `token_type_ids`, say. Not
    those of another sequence, which may be as long (`encoder_hidden_states`).

    Raises:
        ValueError: for `token_type_ids` (or `mm_token_type_ids`) of another shape.
    """
    tensors = {name: z for name, z in kwargs.items() if isinstance(z, torch.Tensor)}
    for name, z in tensors.items():
        if name.endswith("token_type_ids") and z.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"{name} is {list(z.shape)}; it must be {[batch, length]}, one for each token that is given now, none "
                f"for those in the cache."
            )
    another = ("encoder_", "cross_attention_")
    return {
        name: z
        for name, z in tensors.items()
        if z.ndim >= 2 and z.shape[0] in (batch, 1) and z.shape[1] == length and not name.startswith(another)
    }


def in_order(outputs: list[dict], parts: list[slice], length: int) -> dict:
    """What groups of positions recorded, one after the other, in the order of their positions: hidden states
    `[B, T, D]`, attentions `[B, H, T, S]` and router logits `[B, T, E]` of every layer."""
    order = torch.cat([torch.arange(length)[part] for part in parts]).argsort()
    result = {}
    for name, dim in (("hidden_states", 1), ("attentions", 2), ("router_logits", 1)):
        layers = zip(*(output[name] for output in outputs), strict=True) if outputs[0][name] else ()
        # Layers that were not asked for are None.
        whole = (None if p[0] is None else torch.cat(p, dim).index_select(dim, order.to(p[0].device)) for p in layers)
        result[name] = tuple(whole) or None
    return result


@contextmanager
def without_checkpointing(language_model: PreTrainedModel) -> Iterator[None]:
    modules = checkpointing(language_model)
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


class TrainingRecurrence(LanguageModelRecurrence):
    """The same equation with what training adds to it."""

    def fuse(self, e: torch.Tensor, h: torch.Tensor, has_previous: torch.Tensor) -> torch.Tensor:
        if self.model.config.feedback_noise > 0:
            h = h + self.model.config.feedback_noise * torch.randn_like(h)
        return super().fuse(e, h, has_previous)

    def run(self, inputs, cache: Cache | None, *where) -> torch.Tensor:
        """A run whose keys and values are kept where the layers would checkpoint their activations."""
        if cache is None or not checkpointing(self.model.language_model):
            return super().run(inputs, cache, *where)
        if torch.is_grad_enabled():
            return self.run_checkpointed(inputs, cache, *where)
        with without_checkpointing(self.model.language_model):
            return super().run(inputs, cache, *where)

    def run_checkpointed(self, inputs, cache: Cache, *where) -> torch.Tensor:
        """Checkpoints the run as a whole, so that the keys and values are kept, which the layers would throw away."""
        before = [copy.copy(layer) for layer in cache.layers]

        def run(inputs: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scratch = Cache(layers=[copy.copy(layer) for layer in before])
            for layer, keys, values in zip(scratch.layers, tensors[::2], tensors[1::2], strict=False):
                layer.keys, layer.values = keys, values
            with without_checkpointing(self.model.language_model):
                hidden_states = super(TrainingRecurrence, self).run(inputs, scratch, *where)
            return hidden_states, *(z for layer in scratch.layers for z in (layer.keys, layer.values))

        tensors = [z for layer in before if layer.is_initialized for z in (layer.keys, layer.values)]
        hidden_states, *tensors = checkpoint(run, inputs, *tensors, use_reentrant=False)
        for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.load(keys, values)
        return hidden_states


class StatefulGPTPreTrainedModel(HubModel):
    config: StatefulGPTConfig
    config_class = StatefulGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # A counter of batches, which works on any device and which no device map names.
    _no_placement_params = ["batches_seen"]
    # What is really supported, the language model says when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def initialize_weights(self) -> None:
        # In a model that is not its own, transformers passes over modules without parameters of their own; those of
        # GPT-2 scale their projections. The language model, alone, leaves out none.
        self.base_model.language_model.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Fusion):
            module.reset_parameters()
        elif isinstance(module, StatefulGPTModel):
            init.zeros_(module.batches_seen)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)


class StatefulGPTModel(StatefulGPTPreTrainedModel):
    """The recurrence around `language_model`, without the head.

    In training mode, `forward` makes the configured passes. In eval mode it solves the recurrence.
    """

    def __init__(self, config: StatefulGPTConfig):
        super().__init__(config)
        if config.text_config.model_type == GateLoopConfig.model_type:
            # Always that of the same code: the Auto classes may know another copy of it, or none.
            self.language_model: PreTrainedModel = GateLoopModel(config.text_config)
        else:
            # Of the type of all else; left to itself, it would be that of its own configuration.
            self.language_model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        if config.feedback is not None:
            refuse_unsupported(self.language_model)
        self.read_arguments()
        self.feedback = FUSIONS[config.feedback](config.hidden_size) if config.feedback is not None else None
        layers = DynamicCache(config=config.text_config).layers
        self.has_linear_attention = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        # Where no layer attends to the past, the mask is that of the tokens given.
        self.reads_own_mask_only = all(type(layer) is LinearAttentionLayer for layer in layers)
        self.gradient_checkpointing = False
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self.probed: dict[tuple, Probe] = {}
        self.post_init()

    @accept_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_passes: int | None = None,
        solver: str | None = None,
        decode_mode: str | None = None,
        initial_states: torch.Tensor | None = None,
        **kwargs,
    ) -> StatefulGPTOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]`: token embeddings, into which the state is then fused.
            attention_mask: `[B, past + T]`, 0 on padding; if all layers attend, what `read_mask` takes.
            position_ids: `[B, T]`; by default the tokens counted without padding. Position 0 starts a sequence: it
                reads no previous state. Packed sequences need `use_cache=False` and no mask, as in transformers.
            past_key_values: a `Cache`; the state is its last layer. With one, a model in training mode evaluates the
                recurrence as in eval mode: that is how `generate()` calls it.
            num_passes: that many passes instead of what the config says, all with gradients: 1 is the plain language
                model. In evaluation as well, they are made the way training makes them, if `solver` says nothing else.
            solver: overrides the config's, in training `training_solver`.
            decode_mode: overrides the config's. `solver="sequential"` steps in any mode.
            initial_states: `[B, T, D]`, the first guess of the last hidden states, which the first pass reads instead
                of being plain; where it is zero there is none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if num_passes is not None and num_passes < 1:
            raise ValueError(f"num_passes is {num_passes}; it must be at least 1 (1 is the plain language model).")
        if num_passes is not None and solver == "sequential":
            raise ValueError("solver='sequential' makes no passes; leave out num_passes, or choose another solver.")
        look_up(DECODE_MODES, decode_mode or self.config.decode_mode, "decode_mode")
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(self.get_input_embeddings(), input_ids)
        text_config = self.config.text_config
        for name in RECORDED:
            default = getattr(text_config if name == ROUTED else self.config, name, False)
            kwargs[name] = default if kwargs.get(name) is None else kwargs[name]
        if not kwargs[ROUTED]:  # Which most language models do not know.
            del kwargs[ROUTED]
        kwargs |= self.inputs_of_tokens(input_ids, kwargs)
        check_inputs(text_config, inputs_embeds.shape[1], attention_mask, past_key_values)
        if initial_states is not None and initial_states.shape != inputs_embeds.shape:
            raise ValueError(
                f"initial_states is {list(initial_states.shape)}; it must be {list(inputs_embeds.shape)}, a state for "
                f"each token (zeros where there is none)."
            )
        if self.feedback is None:
            refuse_last_hidden_state(past_key_values)
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{self.cache_argument: past_key_values},
                **kwargs,
            )
            return StatefulGPTOutputWithPast(
                last_hidden_state=outputs.last_hidden_state.to(inputs_embeds.dtype),
                **{CACHE: outputs.get(self.cache_argument)},
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.get("router_logits"),
            )

        training = self.training and past_key_values is None
        if use_cache and past_key_values is None and not (training and self.has_linear_attention):
            past_key_values = DynamicCache(config=text_config)
        attention_mask = read_mask(self.language_model.config, inputs_embeds, attention_mask, past_key_values)
        alignment = None
        shape = inputs_embeds.shape[:2]
        # In training even one token asks: the answer may take a probe, which all processes with sharded weights run.
        if (training or shape[1] > 1) and self.groups_positions(shape[0], training, num_passes, solver, decode_mode):
            alignment = find_alignment(attention_mask, position_ids, past_key_values, shape, self.config.num_groups)
        elif self.has_linear_attention and shape[1] > 1:
            alignment = self.align_states(attention_mask, position_ids, past_key_values, shape[1])
        if alignment is not None:
            if position_ids is None:
                position_ids = default_position_ids(shape[1], attention_mask, past_key_values, inputs_embeds.device)
            kwargs |= {name: alignment.align(z) for name, z in per_token(kwargs, *shape).items()}
            attention_mask = alignment.align_mask(attention_mask)
            position_ids = alignment.align(position_ids.expand(shape))
            inputs_embeds, initial_states = (
                None if z is None else alignment.align(z) for z in (inputs_embeds, initial_states)
            )
        kind = TrainingRecurrence if training else LanguageModelRecurrence
        recurrence = kind(self, inputs_embeds, attention_mask, position_ids, past_key_values, initial_states, **kwargs)
        forget_casts()  # Of the probe.
        if training:
            solution = self.train_passes(recurrence, num_passes, solver or self.config.training_solver)
            # Heads other than ours see one state for each token. A loss on any pass is on average the mean over all;
            # one on the last pass alone would leave the recurrence, which is what is decoded, far from any pass.
            last_hidden_state = any_pass(solution.pass_hidden_states)
        else:
            solution = self.solve(recurrence, num_passes, solver, decode_mode or self.config.decode_mode)
            last_hidden_state = solution.hidden_states
        recurrence.commit(inputs_embeds if self.config.feedback_source == "embedding" else solution.hidden_states)
        output = StatefulGPTOutputWithPast(
            last_hidden_state=last_hidden_state,
            **{CACHE: past_key_values},
            **recurrence.output,
            pass_hidden_states=solution.pass_hidden_states if training else None,
            passes=None if training else solution.passes,
            residual=solution.residual,
            stepped_from=None if training else solution.stepped_from,
            rounding_floor=solution.rounding_floor,
        )
        if alignment is not None:
            alignment.restore_output(output)
        return output

    def read_arguments(self) -> None:
        """Looks up what the language model's forward takes."""
        self.cache_argument = cache_argument(self.language_model.forward) or CACHE
        parameters = inspect.signature(self.language_model.forward).parameters
        self.takes_positions = "position_ids" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())

    def inputs_of_tokens(self, input_ids: torch.Tensor | None, given: dict) -> dict[str, torch.Tensor]:
        """What the language model reads of the tokens besides their embeddings: in Gemma 3n and 4, an input for each
        layer."""
        if not getattr(self.config.text_config, "hidden_size_per_layer_input", 0) or "per_layer_inputs" in given:
            return {}
        if input_ids is None:
            raise ValueError(
                f"{type(self.language_model).__name__} reads the tokens themselves, not their embeddings alone: pass "
                f"input_ids, or per_layer_inputs beside inputs_embeds."
            )
        return {"per_layer_inputs": self.language_model.get_per_layer_inputs(input_ids)}

    def align_states(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        length: int,
    ) -> Alignment | None:
        """Layers with a state have read all that is behind them, so no padding may be behind a token."""
        name = type(self.language_model).__name__
        if attention_mask is None:
            if position_ids is not None and cache is None and first_of_sequence(position_ids)[:, 1:].any():
                raise ValueError(
                    f"{name} has layers with a state, which packed sequences would share. Give each sequence a row."
                )
            return None
        if attention_mask.ndim != 2:
            return None
        alignment = find_padding(attention_mask, int(past_length(cache)), length, padding_first=True)
        if alignment is not None and cache is not None and not can_reorder(cache):
            raise ValueError(
                f"{name} has layers with a state, and others whose past cannot be put in another order. With a cache, "
                f"its padding must be on the left (tokenizer.padding_side='left')."
            )
        return alignment

    def groups_positions(
        self, batch: int, training: bool, num_passes: int | None, solver: str | None, decode_mode: str | None
    ) -> bool:
        """Whether a fixed number of cyclic passes is made, whose result depends on which positions make a group."""
        solved = num_passes is None and training and self.config.num_no_grad_passes is None
        fixed = training or num_passes is not None or (decode_mode or self.config.decode_mode) == "passes"
        cyclic = (solver or self.config.training_solver) == "cyclic"
        single = num_passes == 1 or self.config.feedback_source == "embedding"
        if not (fixed and cyclic) or solved or single:
            return False
        return torch.compiler.is_compiling() or self.why_no_groups(batch) is None

    def _replicate_for_data_parallel(self) -> "StatefulGPTModel":
        # It cannot gather numbers such as `passes` from the replicas, nor the state's layer of the cache.
        if self.feedback is not None:
            raise NotImplementedError(
                "Stateful GPT cannot be run by nn.DataParallel, which Trainer takes where it sees several GPUs in one "
                "process. Start a process for each GPU (accelerate launch … or torchrun --nproc_per_node=… …), or let "
                "the process see one GPU alone (CUDA_VISIBLE_DEVICES=0)."
            )
        return super()._replicate_for_data_parallel()

    def train_passes(self, recurrence: LanguageModelRecurrence, num_passes: int | None, solver: str) -> Solution:
        num_no_grad_passes = self.config.num_no_grad_passes if num_passes is None else 0
        num_passes = num_passes or self.draw_num_passes()
        if solver == "sequential" and checkpointing(self.language_model):
            raise ValueError(
                "Training token by token needs the keys and values that checkpointed activations throw away. Set "
                "gradient_checkpointing=False (trl's trainers have it on by default), or train by the solved "
                "recurrence: training_solver='cyclic', num_no_grad_passes=None."
            )
        if solver == "sequential" and self.has_linear_attention and torch.is_grad_enabled():
            raise ValueError(
                f"{type(self.language_model).__name__} writes its states in place, and cannot be trained token by "
                f"token; choose training_solver='jacobi' or 'cyclic'."
            )
        if solver != "sequential" and num_passes == 1 and num_no_grad_passes == 0 and recurrence.guess is None:
            return one_pass(recurrence.plain())
        if self.config.feedback_source == "embedding":
            return one_pass(recurrence.sweep(recurrence.embeds))
        if recurrence.sharded:
            check_equal(recurrence.length if solver == "sequential" else min(recurrence.length, self.config.num_groups))
        if solver != "sequential" and num_no_grad_passes is None:
            recurrence.guess = self.solved_states(recurrence, solver)
            solver, num_no_grad_passes = "jacobi", 0
        solution = self.run_solver(recurrence, solver, num_passes, num_no_grad_passes=num_no_grad_passes)
        if solver == "sequential":
            self.record(recurrence, solution)
        return solution

    @torch.no_grad()
    def solved_states(self, recurrence: LanguageModelRecurrence, solver: str) -> torch.Tensor:
        """The states `[B, T, D]` that evaluation computes: no dropout, no noise, nothing checkpointed."""
        known = recurrence.attention_mask is not None or recurrence.may_be_packed
        positions = recurrence.position_ids if known else None
        inputs = (recurrence.embeds, recurrence.attention_mask, positions, None, recurrence.guess)
        more = {name: value for name, value in recurrence.kwargs.items() if name not in RECORDED}
        with evaluation_mode(self):
            return self.solve(LanguageModelRecurrence(self, *inputs, **more), None, solver, "solved").hidden_states

    def solve(self, recurrence: LanguageModelRecurrence, *how) -> Solution:
        recurrence.in_lockstep = recurrence.sharded
        if recurrence.sharded and is_sharded(self.feedback):
            raise ValueError(
                "The fusion is sharded apart from the model, and not all processes need it equally often. Wrap the "
                "decoder's layers alone (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)."
            )
        solution = self.solve_alone(recurrence, *how)
        recurrence.wait_for_others()
        return solution

    def solve_alone(
        self, recurrence: LanguageModelRecurrence, num_passes: int | None, solver: str | None, decode_mode: str
    ) -> Solution:
        if num_passes is None and decode_mode != "solved" and solver != "sequential":
            single = recurrence.length == 1
            passes = self.config.prefill_passes or self.config.trained_passes()
            fixed = {"no_feedback": 1, "plain_prompt": None if single else 1, "passes": None if single else passes}
            num_passes = fixed[decode_mode]
            if num_passes == 1 and decode_mode != "passes":
                return one_pass(recurrence.plain())
        if num_passes == 1 and recurrence.guess is None:
            return one_pass(recurrence.plain())
        if self.config.feedback_source == "embedding" and solver != "sequential":
            # The previous tokens' embeddings are known, so one pass is exact.
            return one_pass(recurrence.sweep(recurrence.embeds))
        if recurrence.length == 1:
            return sequential(recurrence)
        if self.has_linear_attention and recurrence.past > 0:
            # Not every such model can go on from its states by more than one token.
            logger.warning_once(
                f"{type(self.language_model).__name__} has layers with a state. More than one token after a cached "
                f"text is stepped through, which takes longer."
            )
            return sequential(recurrence)
        if num_passes is not None:
            given = [solver, self.config.training_solver, "jacobi"]
            return self.run_solver(recurrence, next(s for s in given if s not in (None, "sequential")), num_passes)
        solver = solver or self.config.solver
        floor = None
        if solver != "sequential" and not torch.compiler.is_exporting():
            floor = self.probe(len(recurrence.embeds)).rounding_floor
        tolerance = self.config.tolerance
        if tolerance > 0 and floor is not None:  # Asked for 0, it goes on until nothing changes.
            tolerance = max(tolerance, ROUNDINGS * floor)
        solution = self.run_solver(recurrence, solver, tolerance=tolerance)
        solution.rounding_floor = floor
        if math.isnan(solution.residual):
            logger.warning_once(
                "A sequence's hidden states are not finite (NaN or infinite), nor is what follows from them. Look at "
                "the weights and the inputs; if the model computes in fp16, use bf16 or fp32."
            )
        self.record(recurrence, solution)
        return solution

    @staticmethod
    def record(recurrence: LanguageModelRecurrence, solution: Solution) -> None:
        """The states being known, one pass over all positions records what was computed piece by piece."""
        if any(recurrence.kwargs.get(name) for name in RECORDED):
            recurrence.sweep(solution.hidden_states)

    def run_solver(
        self, recurrence: LanguageModelRecurrence, solver: str, passes: int | None = None, **how
    ) -> Solution:
        if solver == "cyclic" and not recurrence.has_groups:
            why = self.why_no_groups(len(recurrence.embeds)) or "this mask or cache allows to run all positions only"
            logger.warning_once(
                f"{type(self.language_model).__name__} cannot be run on some positions at a time here ({why}). The "
                f"cyclic solver falls back to Jacobi, which gives the same and takes more passes."
            )
        return look_up(SOLVERS, solver, "solver")(recurrence, passes, num_groups=self.config.num_groups, **how)

    def why_no_groups(self, batch: int = 1) -> str | None:
        """Why the language model cannot be run on some positions at a time, over keys and values written before."""
        config = self.language_model.config
        if config._attn_implementation not in ("eager", "sdpa"):
            return f"{config._attn_implementation} attention takes no such mask; eager and sdpa do"
        if named := [n for n in ("alibi", "window_size") if getattr(config, n, None)]:
            return f"its {named[0]} makes masks of its own"
        if not can_scatter(DynamicCache(config=config)):
            return "not every layer attends to the past"
        return self.probe(batch).refused

    @torch.compiler.disable
    def probe(self, batch: int = 1) -> Probe:
        """What a short text shows of the language model in the data type and attention at hand, found once for each; by
        `batch` rows of it, as adapters may be named for each row."""
        device, dtype = self.batches_seen.device.type, self.language_model.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        key = (self.language_model.config._attn_implementation, dtype)
        if key not in self.probed:
            self.probed[key] = self.probe_language_model(batch, torch.finfo(dtype).eps)
        return self.probed[key]

    def probe_language_model(self, batch: int, eps: float) -> Probe:
        with evaluation_mode(self.language_model):
            return probe_recurrence(*self.probe_text(batch), eps)

    def steps_differ(self) -> bool:
        """Whether the language model, by itself, steps with a cache to other states than it reads a text to."""
        floor = max(self.probe(2).rounding_floor, torch.finfo(self.language_model.dtype).eps)
        with evaluation_mode(self.language_model):
            return steps_apart(*self.probe_text(2)) > 64 * floor

    @torch.no_grad()
    def probe_text(self, batch: int) -> tuple[Callable[[torch.Tensor], LanguageModelRecurrence], torch.Tensor]:
        """The recurrence of a short text, from its embeddings, in which no state is read; and these, `[B, T, D]`."""
        ids = torch.linspace(0, self.config.vocab_size - 1, PROBE_LENGTH).long().to(self.batches_seen.device)
        ids = ids.expand(batch, -1)
        recurrence = partial(self.plain_recurrence, **self.inputs_of_tokens(ids, {}))
        return recurrence, self.get_input_embeddings()(ids)

    def plain_recurrence(self, embeds: torch.Tensor, **kwargs) -> LanguageModelRecurrence:
        recurrence = LanguageModelRecurrence(self, embeds, None, None, None, **kwargs)
        recurrence.has_previous, recurrence.can_be_split = torch.zeros_like(recurrence.has_previous), True
        recurrence.in_lockstep = recurrence.sharded
        return recurrence

    def draw_num_passes(self) -> int:
        probabilities = self.config.pass_probabilities
        return self.config.num_passes if probabilities is None else self.draw_from(probabilities)

    @torch.compiler.disable
    def draw_from(self, probabilities: list[float]) -> int:
        # Not the global random state: that may differ between processes, which must agree on the number.
        generator = random.Random(f"{self.config.pass_seed} {int(self.batches_seen)}")
        if torch.is_grad_enabled():  # Whoever only looks at a batch must not change which numbers training draws.
            self.batches_seen += 1
        return generator.choices(range(1, len(probabilities) + 1), weights=probabilities)[0]


UNSUPPORTED = {
    "git": "it counts the patches of an image that is not there",
    "minimax": "it takes no other cache than its own",
    "recurrent_gemma": "it keeps its state in the modules, not in a cache",
}
"""Types of language models that take the arguments, and around which the recurrence would be wrong or fail."""


def refuse_unsupported(language_model: PreTrainedModel) -> None:
    """Raises a ValueError for a language model around which the recurrence could not be evaluated correctly."""
    config, name = language_model.config, type(language_model).__name__
    if config.model_type in UNSUPPORTED:
        raise ValueError(f"{name} cannot take feedback: {UNSUPPORTED[config.model_type]}.")
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or []):
        raise ValueError(f"{name} cannot take feedback: it chooses experts by the tokens, not by their embeddings.")
    needed = {cache_argument(language_model.forward), "inputs_embeds", "attention_mask"}
    if not needed <= set(inspect.signature(language_model.forward).parameters):
        raise ValueError(f"{name} cannot take feedback: its forward needs inputs_embeds, attention_mask and a Cache.")
    # Some decoders have this field and do not read it.
    if getattr(config, "is_decoder", None) is False and any(hasattr(m, "is_decoder") for m in language_model.modules()):
        raise ValueError(f"{name} is an encoder (config.is_decoder is False); feedback needs a decoder.")
    width = language_model.get_input_embeddings().weight.shape[-1]
    if width != config.hidden_size:
        raise ValueError(f"{name} embeds tokens {width} wide; feedback needs its hidden_size, {config.hidden_size}.")


def not_finite(model: PreTrainedModel) -> str:
    """Why its logits are not numbers."""
    named = [(name, z) for name, z in model.named_parameters() if not z.is_meta]
    names = [name for name, z in named if not z.isfinite().all()]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{type(model).__name__} has weights that are not finite: {shown}. Load or train it again."
    return (
        f"{type(model).__name__} gives logits that are not numbers, though its weights are finite: something overflows "
        f"in {model.dtype}. Load it with dtype=torch.float32 or torch.bfloat16."
    )


@torch.no_grad()
def probe_logits(model: PreTrainedModel, **kwargs) -> torch.Tensor:
    """The logits of four tokens, in evaluation mode."""
    with evaluation_mode(model):
        return model(torch.arange(4, device=model.device)[None], **kwargs).logits


def any_pass(passes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden states `[B, T, D]`, each position's from one of the passes, drawn at random."""
    states = passes[0]
    if len(passes) > 1:
        drawn = torch.randint(len(passes), (*states.shape[:2], 1), device=states.device)
        for number, others in enumerate(passes[1:], start=1):
            states = torch.where(drawn == number, others, states)
    return states


def one_pass(hidden_states: torch.Tensor) -> Solution:
    return Solution(hidden_states, passes=1, pass_hidden_states=(hidden_states,))


class StatefulGPTForCausalLM(NextTokenLabels, StatefulGenerationMixin, StatefulGPTPreTrainedModel):
    def __init__(self, config: StatefulGPTConfig):
        super().__init__(config)
        self.model = StatefulGPTModel(config)
        if config.head == "linear":
            self.lm_head: Any = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = make_head(config.text_config)
        self.tie_head()
        self.read_generation()
        self.post_init()
        if self._tp_plan and config.head == "linear":
            # Tensor parallelism splits the embedding, whose weight may be the head's.
            self._tp_plan["lm_head"] = "colwise_gather_output"

    def tie_head(self) -> None:
        """Says which weights of the head are those of the language model, where they are tied."""
        if self.config.head == "linear":
            embedding = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embedding)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        else:
            self._tied_weights_keys = tied_weights(self.lm_head, "model.language_model")

    def read_generation(self) -> None:
        """Whether tokens cannot be taken back, so that `generate()` refuses drafts."""
        self._is_stateful = getattr(self.model.language_model, "_is_stateful", False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if self.config.head == "linear" else self.lm_head.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.config.head == "linear":
            self.lm_head = new_embeddings
        else:
            self.lm_head.set_output_embeddings(new_embeddings)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, V]` from last hidden states `[B, T, D]`, or `[N, V]` from `[N, D]`."""
        if self.config.head == "linear":
            return self.lm_head(hidden_states)
        if hidden_states.ndim == 2:
            return self.compute_logits(hidden_states[None])[0]
        return self.lm_head(inputs_embeds=hidden_states, use_cache=False).logits

    def balance(
        self, outputs: StatefulGPTOutputWithPast, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, float]:
        """The load-balancing loss of a mixture of experts, as the language model's own head computes it (None where it
        has none), and its weight."""
        if self.config.head == "linear":
            raise ValueError(
                f"A linear head has no load-balancing loss for {type(self.model.language_model).__name__}'s experts: "
                f"set head='language_model' in the configuration, or output_router_logits=False."
            )
        hidden_states = outputs.last_hidden_state
        if attention_mask is not None:
            attention_mask = attention_mask[:, -hidden_states.shape[1] :] if attention_mask.ndim == 2 else None
        routed = tuple(z.flatten(0, 1) for z in outputs.router_logits)
        output = self.lm_head(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            router_logits=routed,
            use_cache=False,
            logits_to_keep=1,
            **{ROUTED: True},
        )
        weight = next((getattr(self.lm_head, name) for name in LOSS_WEIGHTS if hasattr(self.lm_head, name)), 0.0)
        return output.get("aux_loss"), weight

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel, feedback: str | None = "correction", **config
    ) -> "StatefulGPTForCausalLM":
        """Puts feedback around a trained causal language model, whose modules are taken over, not copied.

        Args:
            backbone: the model, or a name or path for `AutoModelForCausalLM.from_pretrained`.
            feedback: `"correction"` and `"gated_add"` start out computing exactly what the backbone computes; `"glu"`
                cannot.
            config: further fields of `StatefulGPTConfig`.

        Raises:
            ValueError: if it is no decoder with a head on it that takes feedback, or if its weights are not finite.
        """
        if isinstance(backbone, str):
            backbone = AutoModelForCausalLM.from_pretrained(backbone)
        head = backbone.get_output_embeddings()
        if head is None or backbone.config.model_type == StatefulGPTConfig.model_type:
            raise ValueError(f"{type(backbone).__name__} is not a plain language model with a head (…ForCausalLM).")
        logits = probe_logits(backbone)
        if logits.isnan().any():
            raise ValueError(not_finite(backbone))
        linear = type(head) is nn.Linear and head.bias is None and not getattr(backbone.config, ROUTED, False)
        # One linear layer where that is the same, as most tools know it.
        kinds = [config.pop("head")] if "head" in config else ["linear"] * linear + ["language_model"]
        for kind in kinds:
            model = cls.assemble(backbone, feedback=feedback, head=kind, **config)
            if torch.equal(probe_logits(model, num_passes=1), logits):
                break
        else:
            raise ValueError(
                f"{type(backbone).__name__} computes other logits than its decoder does with embeddings and a head of "
                f"the kind {' or '.join(map(repr, kinds))}. Leave head to from_backbone, if you gave it. If not, "
                f"feedback cannot be put around this model."
            )
        if feedback is not None and model.model.steps_differ():
            raise ValueError(
                f"{type(backbone).__name__} steps with a cache to other states than it reads a text to. Feedback "
                f"cannot be put around it: what is trained on texts would not be what generates."
            )
        return model.train(backbone.training)

    @classmethod
    def assemble(cls, backbone: PreTrainedModel, **config) -> "StatefulGPTForCausalLM":
        """A model of the modules of `backbone`, unchecked."""
        _, decoder = find_decoder(backbone)
        with torch.device("meta"):
            # Unless it is told otherwise, a composite configuration resets how its parts attend.
            attention = backbone.config._attn_implementation
            model = cls(StatefulGPTConfig(text_config=backbone.config, attn_implementation=attention, **config))
        model.lm_head = backbone.get_output_embeddings() if model.config.head == "linear" else take_head(backbone)
        model.model.language_model = decoder
        if model.lm_head is backbone.get_output_embeddings():
            # What the configuration says, not every model does.
            model.config.tie_word_embeddings = model.lm_head.weight is decoder.get_input_embeddings().weight
        model.model.read_arguments()
        model.read_generation()
        model.model.batches_seen = torch.zeros((), dtype=torch.int64, device=backbone.device)
        if model.config.feedback is not None:
            fusion = FUSIONS[model.config.feedback](model.config.hidden_size)
            fusion.start_at_identity()
            model.model.feedback = fusion.to(backbone.device, backbone.dtype)
        model.generation_config = backbone.generation_config
        return model

    @accept_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_passes: int | None = None,
        solver: str | None = None,
        decode_mode: str | None = None,
        initial_states: torch.Tensor | None = None,
        **kwargs,
    ) -> StatefulGPTCausalLMOutputWithPast:
        """`labels` `[B, T]` are the `input_ids` themselves (they are shifted here), −100 where there is no loss. The
        other arguments are those of `StatefulGPTModel.forward`.

        In training, `loss` is the mean over all passes, and `logits` are those of the last. Without labels, `logits`
        are at each position those of a pass drawn at random. So a loss that is computed from them, as Trainer does for
        `label_smoothing_factor` and `compute_loss_func`, is on average the mean over all passes, too.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_passes=num_passes,
            solver=solver,
            decode_mode=decode_mode,
            initial_states=initial_states,
            **kwargs,
        )
        every_pass = outputs.pass_hidden_states if labels is not None else None
        last_pass = outputs.pass_hidden_states[-1] if outputs.pass_hidden_states else outputs.last_hidden_state
        losses = []
        passes = [slice_logits_to_keep(h, logits_to_keep) for h in every_pass or (outputs.last_hidden_state,)]
        logits = None
        for number, hidden_states in enumerate(passes, start=1):
            if number < len(passes) and has_many_logits(hidden_states, self.config.vocab_size):
                losses.append(loss_in_chunks(self, hidden_states, labels, **kwargs))
                continue
            logits = self.compute_logits(hidden_states)
            if labels is not None:
                losses.append(self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs))
        loss = torch.stack(losses).mean() if losses else None
        aux_loss = None
        if outputs.router_logits is not None:
            aux_loss, weight = self.balance(outputs, attention_mask)
            if loss is not None and aux_loss is not None:
                loss = loss + weight * aux_loss.to(loss.device)
        return StatefulGPTCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pass_losses=torch.stack(losses).detach() if every_pass else None,
            states=last_pass.detach(),
            passes=outputs.passes,
            residual=outputs.residual,
            stepped_from=outputs.stepped_from,
            rounding_floor=outputs.rounding_floor,
        )


class StatefulGPTForSequenceClassification(SequenceClassificationHead, StatefulGPTPreTrainedModel):
    base_model_class = StatefulGPTModel


class StatefulGPTForTokenClassification(TokenClassificationHead, StatefulGPTPreTrainedModel):
    base_model_class = StatefulGPTModel


StatefulGPTModel.register_for_auto_class("AutoModel")
StatefulGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
StatefulGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
StatefulGPTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
