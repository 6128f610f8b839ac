"""Stateful GPT: a language model whose last hidden state enriches the next step's token embedding.

The trip of a batch: it is embedded, a plan says how it is evaluated (`plan.py`), a `LanguageModelRecurrence` says what
(`recurrence.py`), a solver does it (`solvers.py`), the cache gets what the next step needs, and the head makes logits.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, PreTrainedModel
from transformers.utils import can_return_tuple

from .alignment import find_group_alignment, find_state_alignment
from .backbone import ROUTED, Backbone, read_traits, refuse_unsupported
from .cache import past_length, refuse_last_hidden_state
from .compat import CACHE, accept_cache, merge_with_config_defaults, slice_logits_to_keep
from .configuration_gateloop import GateLoopConfig
from .configuration_stateful_gpt import DECODE_MODES, StatefulGPTConfig
from .evaluation import evaluate, sample_pass_per_token, train
from .feedback import FUSIONS, Fusion
from .generation_gateloop import check_rotary
from .generation_stateful_gpt import StatefulGenerationMixin
from .hub import HubModel
from .inputs import check_inputs, default_position_ids, embed_tokens, look_up, read_mask
from .language_modeling import balancing_loss, logits_and_losses, make_head, tied_weights
from .modeling_gateloop import GateLoopModel, NextTokenLabels, SequenceClassificationHead, TokenClassificationHead
from .outputs import StatefulGPTCausalLMOutputWithPast, StatefulGPTOutputWithPast
from .plan import Plan, draw_num_passes, plan_evaluation, plan_training
from .probe import refuse_padding, why_no_groups
from .recurrence import RECORDED, LanguageModelRecurrence, per_token
from .solvers import forget_casts
from .training_recurrence import TrainingRecurrence
from .wrapping import WrappingMixin


class StatefulGPTPreTrainedModel(HubModel):
    config: StatefulGPTConfig
    config_class = StatefulGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Older checkpoints hold a counter of batches.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)batches_seen$"]
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
        self.traits = read_traits(self.language_model, config.text_config)
        self.feedback = FUSIONS[config.feedback](config.hidden_size) if config.feedback is not None else None
        self.gradient_checkpointing = False
        self.batches_seen = 0
        self.post_init()

    @property
    def backbone(self) -> Backbone:
        return Backbone(self.language_model, self.config.text_config, self.traits)

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
            position_ids: `[B, T]`; by default the tokens counted without padding. Without a mask and a cache
                (`use_cache=False`), position 0 starts a packed sequence, which reads no previous state.
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
        kwargs |= self.backbone.inputs_of_tokens(input_ids, kwargs)
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
                **{self.traits.cache_argument: past_key_values},
                **kwargs,
            )
            return StatefulGPTOutputWithPast(
                last_hidden_state=outputs.last_hidden_state.to(inputs_embeds.dtype),
                **{CACHE: outputs.get(self.traits.cache_argument)},
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                router_logits=outputs.get("router_logits"),
            )

        training = self.training and past_key_values is None
        if use_cache and past_key_values is None and not (training and self.traits.has_linear_attention):
            past_key_values = DynamicCache(config=text_config)
        attention_mask = read_mask(self.language_model.config, inputs_embeds, attention_mask, past_key_values)
        plan = self.make_plan(inputs_embeds, past_key_values, training, num_passes, solver, decode_mode, initial_states)
        if plan.solver != "plain" and not torch.compiler.is_compiling():
            check_rotary(text_config, int(past_length(past_key_values)) + inputs_embeds.shape[1])
        shape, alignment = inputs_embeds.shape[:2], None
        # In training even one token asks: the answer may take a probe, which all processes with sharded weights run.
        if plan.depends_on_groups and self.can_be_split(inputs_embeds):
            arguments = attention_mask, position_ids, past_key_values
            alignment = find_group_alignment(*arguments, shape, self.config.num_groups)
        elif self.traits.has_linear_attention and shape[1] > 1:
            name = type(self.language_model).__name__
            refuse_padding(self.backbone, attention_mask)
            alignment = find_state_alignment(name, attention_mask, position_ids, past_key_values, shape[1])
        if alignment is not None:
            if position_ids is None:
                position_ids = default_position_ids(shape[1], attention_mask, past_key_values, inputs_embeds.device)
            kwargs |= {name: alignment.align(z) for name, z in per_token(kwargs, *shape).items()}
            attention_mask = alignment.align_mask(attention_mask)
            position_ids = alignment.align(position_ids.expand(shape))
            inputs_embeds, initial_states = (
                None if z is None else alignment.align(z) for z in (inputs_embeds, initial_states)
            )
        training_kind = partial(TrainingRecurrence, noise=self.config.feedback_noise)
        kind: Any = training_kind if training else LanguageModelRecurrence
        recurrence = kind(
            self.backbone,
            self.feedback,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            initial_states,
            fed_back=inputs_embeds if self.config.feedback_source == "embedding" else None,
            can_be_split=partial(self.can_be_split, inputs_embeds),
            **kwargs,
        )
        forget_casts()  # Of the probe.
        if training:
            solution = train(recurrence, plan, self.config)
            # Heads other than ours see one state for each token. A loss on any pass is on average the mean over all;
            # one on the last pass alone would leave the recurrence, which is what is decoded, far from any pass.
            last_hidden_state = sample_pass_per_token(solution.pass_hidden_states)
        else:
            solution = evaluate(recurrence, plan, self.config)
            last_hidden_state = solution.hidden_states
        recurrence.commit(solution.hidden_states, alignment)
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

    def make_plan(
        self,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        training: bool,
        num_passes: int | None,
        solver: str | None,
        decode_mode: str | None,
        initial_states: torch.Tensor | None,
    ) -> Plan:
        has_guess = initial_states is not None
        if training:
            drawn = self.config.num_passes
            if self.config.pass_probabilities is not None and num_passes is None:
                drawn = self.draw_num_passes()
            return plan_training(self.config, num_passes, solver, drawn, has_guess)
        steps_only = self.traits.has_linear_attention and past_length(cache) > 0
        length = inputs_embeds.shape[1]
        return plan_evaluation(self.config, num_passes, solver, decode_mode, length, has_guess, steps_only)

    def can_be_split(self, inputs_embeds: torch.Tensor) -> bool:
        """Whether the language model can be run on some positions of such a batch at a time."""
        compiling = torch.compiler.is_compiling()  # A graph cannot look; where it matters, eager mode has.
        return compiling or why_no_groups(self.backbone, len(inputs_embeds), inputs_embeds.device) is None

    def _replicate_for_data_parallel(self) -> "StatefulGPTModel":
        # It cannot gather numbers such as `passes` from the replicas, nor the state's layer of the cache.
        if self.feedback is not None:
            raise NotImplementedError(
                "Stateful GPT cannot be run by nn.DataParallel, which Trainer takes where it sees several GPUs in one "
                "process. Start a process for each GPU (accelerate launch … or torchrun --nproc_per_node=… …), or let "
                "the process see one GPU alone (CUDA_VISIBLE_DEVICES=0)."
            )
        return super()._replicate_for_data_parallel()

    @torch.compiler.disable
    def draw_num_passes(self) -> int:
        passes = draw_num_passes(self.config, self.batches_seen)
        if torch.is_grad_enabled():  # Whoever only looks at a batch must not change which numbers training draws.
            self.batches_seen += 1
        return passes


class StatefulGPTForCausalLM(WrappingMixin, NextTokenLabels, StatefulGenerationMixin, StatefulGPTPreTrainedModel):
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
        passes = [slice_logits_to_keep(h, logits_to_keep) for h in every_pass or (outputs.last_hidden_state,)]
        logits, losses = logits_and_losses(self, passes, labels, **kwargs)
        loss = torch.stack(losses).mean() if losses else None
        aux_loss = None
        if outputs.router_logits is not None:
            if self.config.head == "linear":
                raise ValueError(
                    f"A linear head has no load-balancing loss for {type(self.model.language_model).__name__}'s "
                    f"experts: set head='language_model' in the configuration, or output_router_logits=False."
                )
            routed = outputs.router_logits
            aux_loss, weight = balancing_loss(self.lm_head, outputs.last_hidden_state, routed, attention_mask)
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
