"""The recurrence `h_t = f(fuse(e_t, h_{t-1}), history)` of one batch, over a language model and a fusion."""

from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import nn
from transformers import Cache

from .alignment import Alignment
from .backbone import Backbone
from .cache import (
    append,
    can_scatter,
    copy_states,
    keep_states,
    last_hidden_state_layer,
    past_length,
    reorder_slots,
    scatter,
    snapshot,
)
from .cache_layers import put
from .compat import StaticLayer, create_masks, is_sharded
from .inputs import default_position_ids
from .solvers import State, groups
from .timeline import make_timeline

RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


Mask = torch.Tensor | dict[str, torch.Tensor]
"""What each position reads, as the language model takes it: one mask, or one for each type of layer."""


class LanguageModelRecurrence:
    """The recurrence of one batch (see `solvers.Recurrence`).

    A position's previous state is that of the last real token before it: padding is passed over. There is none at the
    beginning, nor at position 0 of a packed sequence; there, the input is the embedding itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: nn.Module,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        initial_states: torch.Tensor | None = None,
        fed_back: torch.Tensor | None = None,
        can_be_split: Callable[[], bool] = lambda: True,
        **kwargs,
    ):
        """
        Args:
            embeds: `[B, T, D]`.
            attention_mask, position_ids, cache: as a forward has them, read already.
            initial_states: `[B, T, D]`, the first guess of the states; zeros where there is none.
            fed_back: `[B, T, D]`, what each token hands on in place of its hidden state.
            can_be_split: whether the language model can be run on some positions at a time.
            kwargs: more for the language model.
        """
        batch, self.length, _ = embeds.shape
        self.backbone, self.fusion, self.embeds, self.cache = backbone, fusion, embeds, cache
        self.fed_back, self.kwargs = fed_back, kwargs
        self.per_token = per_token(kwargs, batch, self.length)
        if initial_states is not None:
            # What is no number is no guess, either.
            sane = initial_states.isfinite().all(-1, keepdim=True)
            initial_states = initial_states.where(sane, torch.zeros((), device=initial_states.device))
        self.guess = initial_states
        self.attention_mask = attention_mask
        self.past = past_length(cache)
        self.timeline = make_timeline(batch, self.length, attention_mask, position_ids, cache, embeds.device)
        self.real = self.timeline.is_token
        self.may_be_packed = attention_mask is None and self.timeline.is_first is not None
        if position_ids is None:
            position_ids = default_position_ids(self.length, attention_mask, cache, embeds.device)
        self.position_ids = position_ids.expand(batch, -1)

        self.before = last_hidden_state_layer(cache, backbone.text_config).read() if cache is not None else None
        if self.before is not None and len(self.before[0]) != batch:
            raise ValueError(
                f"The cache holds {len(self.before[0])} sequences, the input {batch}; they must be the same."
            )
        exists = self.initial_state()[1]
        self.in_force_exists = (self.timeline.last_slot > 0) | exists[:, None]
        self.has_previous = self.timeline.has_previous(exists)
        if attention_mask is not None and attention_mask.ndim == 4 and not torch.compiler.is_compiling():
            self.refuse_hidden_predecessors()
        self.sharded = is_sharded(backbone.language_model) or is_sharded(fusion)
        self.in_lockstep = False
        self.running: Cache | None = None
        self.scattered: Cache | None = None
        self.can_be_split = can_be_split
        self.split: bool | None = None
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
        padded = self.attention_mask is not None and self.backbone.traits.has_linear_attention
        before = copy_states(self.running) if padded else None
        hidden_state = self.run(inputs, self.running, here, self.mask_at(position))[:, 0]
        if before is not None:
            keep_states(self.running, before, self.real[:, position])
        carried = hidden_state if self.fed_back is None else self.fed_back[:, position]
        real = self.real[:, position]
        return hidden_state, (torch.where(real[:, None], carried, h), exists | real)

    def begin_at(self, position: int, states: torch.Tensor) -> State:
        self.running = snapshot(self.own_cache())
        append(self.running, self.scattered, position)
        last = slice(position - 1, position)
        return self.at(self.timeline.last_slot[:, last], self.slots(states))[:, 0], self.in_force_exists[
            :, position - 1
        ]

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
            own = self.attention_mask
            if own is not None and own.ndim == 4:
                own = own[..., : self.length]
            mask = own if whole else masks if len(masks) > 1 else next(iter(masks.values()))
            hidden_states = self.run(inputs, self.scattered, group, mask)
            slots = put(slots, hidden_states, slice(group.start + 1, None, num_groups), dim=1)
            outputs.append(self.output)
        self.running = self.scattered
        if any(self.kwargs.get(name) for name in RECORDED):
            self.output = in_order(outputs, parts, self.length)
        return slots[:, 1:]

    @property
    def has_groups(self) -> bool:
        if self.split is None:
            is_4d = self.attention_mask is not None and self.attention_mask.ndim == 4
            self.split = not (is_4d and self.has_windows) and can_scatter(self.own_cache()) and self.can_be_split()
        return self.split

    @property
    def has_windows(self) -> bool:
        """Whether some layers attend to a window or to a chunk alone."""
        config = self.backbone.language_model.config
        return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))

    def inputs(self, group: slice, states: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """What the language model gets at the positions of `group`, given the states in `slots(states)`."""
        e = self.embeds[:, group]
        if states is None and self.guess is None and self.before is None:
            return e.clone()  # CTRL scales what it is given in place.
        return self.fuse(e, self.at(self.timeline.previous_slot[:, group], slots), self.known(states)[:, group])

    def own_cache(self) -> Cache:
        return self.backbone.make_cache() if self.cache is None else self.cache

    def reads(self) -> torch.Tensor:
        """Which keys `[B or 1, 1, T, past + T]` each position reads: those before it, its own, and no padding. A 4-D
        mask says it itself."""
        if self.attention_mask is not None and self.attention_mask.ndim == 4:
            return self.with_itself(self.attention_mask[..., : self.past + self.length])
        keys = torch.arange(self.past + self.length, device=self.embeds.device)
        queries = keys[self.past :, None]
        reads = (keys <= queries)[None]
        if self.attention_mask is not None:
            reads = reads & self.attention_mask.bool()[:, None, : len(keys)]
        elif self.may_be_packed:
            sequence = self.timeline.is_first.cumsum(1)
            reads = reads & (sequence[:, :, None] == sequence[:, None])
        # Padding reads itself, for a softmax over nothing is not a number.
        reads = (reads | (keys == queries))[:, None].expand(len(self.embeds), -1, -1, -1)
        if self.backbone.language_model.config._attn_implementation == "sdpa":
            return reads
        dtype = self.embeds.dtype
        return torch.zeros((), dtype=dtype, device=reads.device).where(reads, torch.finfo(dtype).min)

    def masks(self) -> dict[str, torch.Tensor]:
        """What `reads` says, for each type of layer: some attend to a window or to a chunk alone."""
        config = self.backbone.language_model.config
        if not self.has_windows:
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
        return self.has_previous & nn.functional.pad(guessed, (1, 0), value=True).gather(1, self.timeline.previous_slot)

    @staticmethod
    def at(slots: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The states of the given slots `[B, T']`: 0 is the one from before, t + 1 that of position t."""
        return states.gather(1, slots[..., None].expand(-1, -1, states.shape[-1]))

    def fuse(self, e: torch.Tensor, h: torch.Tensor, has_previous: torch.Tensor) -> torch.Tensor:
        return torch.where(has_previous[..., None], self.fusion(e, h).to(e.device), e)

    def run(
        self, inputs: torch.Tensor, cache: Cache | None, positions: slice, attention_mask: Mask | None
    ) -> torch.Tensor:
        if self.in_lockstep:
            anyone(True, self.embeds.device)
        kwargs = {**self.kwargs, **{name: z[:, positions] for name, z in self.per_token.items()}}
        output = self.backbone.run(inputs, cache, attention_mask, self.position_ids[:, positions], **kwargs)
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
            self.backbone.language_model(inputs_embeds=self.embeds[:, :1], use_cache=False, **one)

    def mask_at(self, position: int) -> torch.Tensor | None:
        """The attention mask of one position, which sees the ones before it and itself."""
        if self.attention_mask is not None:
            if self.length == 1:
                return self.attention_mask
            if self.attention_mask.ndim == 2:
                return self.attention_mask[:, : self.past + position + 1]
            if self.has_windows or any(isinstance(layer, StaticLayer) for layer in self.own_cache().layers):
                raise ValueError(
                    "Stepping over a sequence needs a 2-D attention_mask here; use solver='jacobi' with a 4-D one."
                )
            return self.attention_mask[:, :, position : position + 1, : self.past + position + 1]
        if self.may_be_packed:
            sequence = self.timeline.is_first.expand_as(self.real).cumsum(1)[:, : position + 1]
            return (sequence == sequence[:, -1:]).long()
        return None

    def commit(self, states: torch.Tensor, alignment: Alignment | None = None) -> None:
        """Leaves in the cache what the last run wrote, and of the states `[B, T, D]` those that the next step reads; in
        the order of the row, where `alignment` has put the positions in another."""
        if self.cache is None:
            return
        if alignment is not None:
            reorder_slots(self.running, alignment.places, self.past)
        if self.scattered is not None and self.running is self.scattered:
            append(self.cache, self.scattered)
        elif self.running is not self.cache:
            self.cache.layers = self.running.layers
        layer = last_hidden_state_layer(self.cache, self.backbone.text_config)
        states = states if self.fed_back is None else self.fed_back
        layer.write(self.at(self.timeline.last_slot, self.slots(states)), self.in_force_exists)
        if alignment is not None:
            alignment.restore_states(layer)


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
