"""Train a model from scratch, from a checkpoint, or around a pretrained backbone.

    python training/train.py --preset stateful --output_dir runs/stateful
    accelerate launch --num_processes 2 training/train.py --preset stateful --output_dir runs/stateful

The options are those below and everything transformers' TrainingArguments offers. Ctrl-C saves a checkpoint; the same
command again goes on from there. The output folder then holds a checkpoint that `from_pretrained` loads.
"""

import contextlib
import copy
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from data import DataError, byte_tokenizer, bytes_per_token, load_corpus, sample_blocks, token_blocks
from datasets import Dataset
from errors import Diverged, RunError, trying
from huggingface_hub import whoami
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model
from plot import draw
from records import write_json
from runs import (
    LOCK,
    delete_checkpoints,
    fault,
    is_empty,
    last_complete_checkpoint,
    locked,
    read_object,
    saving,
    seal,
    size_of_checkpoint,
    tensors_checksum,
    tokenizer_checksum,
)
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import is_liger_kernel_available, logging

from modeling_stateful_gpt import (
    GateLoopConfig,
    GateLoopForCausalLM,
    StatefulGPTConfig,
    StatefulGPTForCausalLM,
    StatefulGPTModel,
)
from modeling_stateful_gpt.cache_layers import RECURRENT_LAYERS
from modeling_stateful_gpt.documents import Documents, WholeDocuments, check_arguments, pad
from modeling_stateful_gpt.generation_gateloop import position_limit
from modeling_stateful_gpt.progress import computation
from modeling_stateful_gpt.unbounded import CONTEXTS, check_recurrent
from modeling_stateful_gpt.upload import upload
from modeling_stateful_gpt.warm_start import (
    StatesMissing,
    StateStore,
    WarmStart,
    Windows,
    collate,
    losses_from_states,
    saved_state,
)

logger = logging.get_logger("training")


@dataclass(frozen=True)
class Preset:
    """`decoder`: fields of `GateLoopConfig`, in which `layer_types` is a pattern that is repeated over the depth.
    `stateful`: fields of `StatefulGPTConfig`; None for the decoder alone. `warm_start`: whether the first pass reads
    the states of the epoch before. `step_per_pass`: see `StepPerPassTrainer`."""

    decoder: dict = field(default_factory=dict)
    stateful: dict | None = None
    warm_start: bool = False
    step_per_pass: bool = False


JACOBI = {"training_solver": "jacobi", "num_no_grad_passes": 0}

PRESETS = {
    "gpt": Preset(),
    "gateloop": Preset({"layer_types": ["gateloop"]}),
    # Its two ablations.
    "gateloop_signed": Preset({"layer_types": ["gateloop"], "state_transition": "signed"}),
    "gateloop_positive": Preset({"layer_types": ["gateloop"], "state_transition": "positive"}),
    "hybrid": Preset({"layer_types": ["gateloop", "full_attention"]}),
    "reversible": Preset({"layer_types": ["reversible"]}),
    "reversible_forgetting": Preset({"layer_types": ["reversible"], "reversible_form": "forgetting"}),
    # RWKV with its token shift replaced by a layer with feedback.
    "rwkv": Preset({"layer_types": ["reversible", "rwkv", "rwkv", "rwkv"], "reversible_form": "forgetting"}),
    # The control: the same fusion, fed with the previous token's embedding.
    "token_shift": Preset(stateful={"feedback": "gated_add", "feedback_source": "embedding"}),
    "stateful": Preset(stateful={"feedback": "gated_add"}),
    # The original proposal, with gradients through all passes.
    "jacobi": Preset(stateful={"feedback": "gated_add", **JACOBI, "num_passes": 3}),
    # And with those it was trained by: none between passes, each of which is a step of the optimiser.
    "step_per_pass": Preset(stateful={"feedback": "gated_add", **JACOBI, "num_passes": 2}, step_per_pass=True),
    # For several epochs: a step is one pass. {"pass_probabilities": [0.75, 0.25]} adds a share of steps of two.
    "warm_start": Preset(stateful={"feedback": "gated_add", **JACOBI, "num_passes": 1}, warm_start=True),
}
"""With the same sizes, all presets have the same number of parameters, to within rounding."""

OURS = (GateLoopConfig.model_type, StatefulGPTConfig.model_type)


@dataclass
class ModelArguments:
    preset: str | None = field(
        default=None, metadata={"help": f"What to train: {', '.join(PRESETS)}. From scratch, stateful is the default."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint. A plain language model gets the preset's feedback and starts out "
            "computing what it computed before; without a preset, a model of ours stays as it is."
        },
    )
    hidden_size: int = field(default=128, metadata={"help": "From scratch only, as the other sizes."})
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    dropout: float = 0.0
    warm_start: bool = field(
        default=False,
        metadata={"help": "The first pass reads the states of the epoch before (as with the preset warm_start)."},
    )
    trainable: str = field(
        default="everything",
        metadata={
            "help": "Of a model with feedback around a checkpoint: everything; fusion: the feedback alone; lora: the "
            "feedback and, through LoRA, the language model."
        },
    )
    stateful_config: str = field(
        default="{}",
        metadata={"help": 'Further fields of StatefulGPTConfig as JSON, e.g. \'{"feedback": "glu"}\'.'},
    )
    decoder_config: str = field(
        default="{}",
        metadata={
            "help": 'Further fields of GateLoopConfig as JSON, e.g. \'{"mlp_type": "swiglu"}\'; layer_types '
            "is a pattern that is repeated over the depth."
        },
    )


@dataclass
class DataArguments:
    text_file: list[str] | None = field(default=None, metadata={"help": "UTF-8 text files, each a document."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the Hub."})
    dataset_config_name: str | None = None
    text_column: str = "text"
    validation_fraction: float = 0.05
    max_train_bytes: int | None = field(
        default=None, metadata={"help": "Train on that much of the training text; the validation text stays whole."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A pretrained tokenizer; by default the checkpoint's own, or bytes."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per training example."})
    random_offsets: bool = field(
        default=False, metadata={"help": "Cut the text into examples elsewhere in each epoch."}
    )
    max_eval_samples: int = field(default=64, metadata={"help": "Blocks for evaluation during training."})
    context: str = field(
        default="blocks",
        metadata={
            "help": "What a training example is: blocks of --block_size tokens; or whole documents, read in pieces of "
            "--chunk_size tokens, between which gradients flow (unbounded) or only states do (truncated)."
        },
    )
    chunk_size: int = field(default=1024, metadata={"help": "Tokens of a document whose activations are kept at once."})

    def __post_init__(self) -> None:
        if self.max_eval_samples < 1:
            raise ValueError(f"--max_eval_samples is {self.max_eval_samples}; it must be at least 1.")


ENDLESS = 10**9
"""Steps."""


AT_LEAST = {
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "label_smoothing_factor": 0,
    "dataloader_num_workers": 0,
    "eval_steps": 0,
    "eval_delay": 0,
    "logging_steps": 0,
    "progress_seconds": 0,
    "neftune_noise_alpha": 0,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_prefetch_factor": 1,
}
"""Of transformers' arguments, those whose value is otherwise refused by what is made after the model, if at all."""

REFUSED = {
    "save_only_model": (True, "no run can go on from such checkpoints"),
    "ignore_data_skip": (True, "a run that goes on would read another text"),
    "train_sampling_strategy": ("group_by_length", "a run that goes on would read in another order"),
    "auto_find_batch_size": (True, "the batch size decides the result"),
    "restore_callback_states_from_checkpoint": (False, "a run that goes on would not know what has been spent"),
}
"""Of transformers' arguments, those with a value that makes a killed run another one, and why."""

SEEDS = range(2**32)
"""Of which numpy's and torch's generators are made."""


@dataclass
class TrainArguments(TrainingArguments):
    """TrainingArguments with defaults for small models trained from scratch."""

    learning_rate: float = 1e-3
    lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "cosine; with --patience, constant_with_warmup."}
    )
    warmup_steps: float = 50
    weight_decay: float = 0.1
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    max_steps: int = field(default=-1, metadata={"help": "500 if no other end is given."})
    num_train_epochs: float = 0.0
    max_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Train for so many seconds, not counting reading data, evaluating and saving. The learning rate "
            "falls as a cosine of the seconds, as it does of the steps with --max_steps: to the same end for a slow "
            "and a fast model."
        },
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the validation loss has not improved for so many evaluations, with each of which a "
            "checkpoint is saved; the result is the best one. The learning rate stays constant after the warm-up, "
            "because one that falls until a fixed step would itself decide when the loss stops improving. --max_steps "
            "and --num_train_epochs are an upper bound."
        },
    )
    progress_seconds: float = field(
        default=300,
        metadata={
            "help": "How often to keep how far a document has been read, for a run that is killed in the middle."
        },
    )
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    eval_strategy: str = "steps"
    eval_steps: float = 50
    eval_on_start: bool = True
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 2
    prediction_loss_only: bool = True
    include_num_input_tokens_seen: str = "all"
    # What has been spent, and for how long nothing has improved.
    restore_callback_states_from_checkpoint: bool = True
    # Where an example stands in the text is no argument of the model.
    remove_unused_columns: bool = False
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the finished model, as hub_upload.py does."})
    report_to: str = "none"
    dataloader_pin_memory: bool = torch.accelerator.is_available()
    # In a batch of one pass the fusion has no gradient, with gradient checkpointing as well.
    ddp_find_unused_parameters: bool | None = True

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:  # Nor may it be no number.
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least {least}, and finite.")
        for name, (value, why) in REFUSED.items():
            if getattr(self, name, None) == value:
                raise ValueError(f"--{name} {value}: {why}; leave it out.")
        if not 0 < self.save_steps < math.inf:
            raise ValueError(f"--save_steps is {self.save_steps}; it must be more than 0, and finite.")
        if wrong := [part for part in (self.optim_args or "").split(",") if part and "=" not in part]:
            raise ValueError(f"--optim_args has {wrong[0]!r}; its parts have the form name=value.")
        if (counted := self.include_num_input_tokens_seen) not in ("all", "non_padding", "no", True, False):
            raise ValueError(f"--include_num_input_tokens_seen is {counted}; choose from all, non_padding, no.")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if getattr(self, name) >= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be less than 1.")
        if (metric := getattr(self, "metric_for_best_model")) not in (None, "loss", "eval_loss"):  # noqa: B009
            raise ValueError(f"--metric_for_best_model is {metric}; there is eval_loss alone.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"--max_steps is {self.max_steps}; it must be at least 1, or -1 for another end.")
        if self.seed not in SEEDS or (self.data_seed is not None and self.data_seed not in SEEDS):
            raise ValueError(f"--seed and --data_seed must lie between 0 and {SEEDS[-1]}.")
        steps_given = self.max_steps > 0 or self.num_train_epochs > 0
        if self.max_seconds is not None:
            if steps_given or self.patience is not None:
                raise ValueError(
                    "--max_seconds is an end of its own: leave out --max_steps, --num_train_epochs and --patience."
                )
            if self.lr_scheduler_type not in (None, "cosine", "constant_with_warmup"):
                raise ValueError("--max_seconds goes with --lr_scheduler_type cosine or constant_with_warmup.")
            if not 0 < self.max_seconds < math.inf:
                raise ValueError("--max_seconds must be more than 0, and finite.")
        if 0 < self.warmup_steps < 1 and not steps_given:
            raise ValueError("--warmup_steps as a share is one of --max_steps; give their number.")
        if not steps_given:
            self.max_steps = 500 if self.max_seconds is None and self.patience is None else ENDLESS
        if self.lr_scheduler_type is None:
            self.lr_scheduler_type = "cosine" if self.patience is None else "constant_with_warmup"
        if self.patience is not None:
            if self.patience < 1 or self.eval_strategy == "no" or not self.eval_steps:
                raise ValueError(
                    "--patience must be at least 1, and there must be evaluations (--eval_strategy, --eval_steps)."
                )
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps
        super().__post_init__()


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the current step, with a checkpoint; the second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.note)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)
        # After the last step there is nothing to resume.
        self.interrupted &= state.global_step < state.max_steps

    def note(self, *_) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)
        print("\nInterrupted: saving a checkpoint after this step (Ctrl-C again to stop without).", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


class StopAtWhatIsNoNumber(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # Its loss is scaled, and steps that overflow are left out.
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not get_total_norm(gradients, math.inf).isfinite():
            raise Diverged("gradient", state.global_step + 1)


class CountBatches(TrainerCallback):
    """Lets a run that is resumed draw the numbers of passes that it would have drawn."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, StatefulGPTModel):
                module.batches_seen = state.global_step * args.gradient_accumulation_steps


class StopWhenNothingImproves(EarlyStoppingCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            # Resumed from here, the run would go on to another evaluation, which may be better than the best.
            control.should_save = False


class TrainingClock(TrainerCallback, ExportableState):
    """Counts the seconds spent in training steps, and ends the run with the step in which `max_seconds` are over."""

    def __init__(self, max_seconds: float | None):
        self.max_seconds = max_seconds
        self.seconds = 0.0

    def state(self) -> dict:
        return {"args": {"max_seconds": self.max_seconds}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self.started
        if self.max_seconds is not None:
            # All processes have the same learning rate and end with the same step.
            (self.seconds,) = broadcast_object_list([self.seconds])

    def on_step_end(self, args, state, control, **kwargs):
        if self.max_seconds is not None and self.seconds >= self.max_seconds:
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy == "steps"
            control.should_save = args.save_strategy != "no"

    def share_left(self) -> float:
        return max(0.0, 1 - self.seconds / self.max_seconds)


class LanguageModelTrainer(Trainer):
    """Evaluates the exact recurrence. Notes in its log what each evaluation has cost: the tokens and `train_seconds` of
    this run and, `before`, of those it goes on from."""

    label_smoother: Callable | None

    def __init__(self, *args, before: dict[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = before or {"tokens": 0, "seconds": 0.0}
        self.add_callback(TrainingClock(self.args.max_seconds))
        self.add_callback(StopAtWhatIsNoNumber())
        self.args.logging_nan_inf_filter = False  # It would log another loss in place of one that is no number.
        if self.label_smoother is not None:
            # Compiled, a model is none of those for which Trainer shifts the labels.
            self.label_smoother = partial(self.label_smoother, shift_labels=True)

    @property
    def clock(self) -> TrainingClock:
        # Resuming replaces it.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, TrainingClock))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.max_seconds is not None and self.args.lr_scheduler_type == "cosine":

            def factor(step: int) -> float:
                warmup = min(1.0, (step + 1) / (self.args.warmup_steps + 1))
                return warmup * (1 - math.cos(math.pi * self.clock.share_left())) / 2

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        logs["tokens"] = self.before["tokens"] + self.state.num_input_tokens_seen
        logs["train_seconds"] = round(self.before["seconds"] + self.clock.seconds, 3)
        if not math.isfinite(logs.get("eval_loss", 0)):
            raise Diverged("validation loss", self.state.global_step)
        super().log(logs, start_time)

    def is_finished(self) -> bool:
        """Whether there is nothing left to train, as where a run was killed after its last step."""
        seconds_over = self.args.max_seconds is not None and self.clock.seconds >= self.args.max_seconds
        return self.state.global_step >= self.state.max_steps or seconds_over

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.is_finished():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        if num_items_in_batch is not None:
            # The loss of a batch in which nothing is asked is 0, and not 0 / 0.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().training_step(model, inputs, num_items_in_batch)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args, **kwargs) -> None:
        if not tr_loss.isfinite():
            raise Diverged("loss", self.state.global_step)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def check_weights(self) -> None:
        if not get_total_norm(list(self.model.parameters()), math.inf).isfinite():
            raise Diverged("update", self.state.global_step)

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.check_weights()
        return output

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        self.check_weights()
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # None is deleted before this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(checkpoint, size_of_checkpoint(model)):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(checkpoint)
        except RunError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            delete_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        # Weights that are tied to others are not saved.
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, {**inputs, **exactly(self.model)}, *args, **kwargs)


def exactly(model: PreTrainedModel) -> dict[str, str]:
    """The arguments with which a model's forward evaluates the recurrence itself; none for a plain model."""
    return {"decode_mode": "solved"} if model.config.model_type == StatefulGPTConfig.model_type else {}


class StepPerPassTrainer(LanguageModelTrainer):
    """The training of the original proposal: the states that a pass reads carry no gradient to the pass before, and
    each pass takes a step of the optimiser (here one and the same; there, each had its own)."""

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        self.states = None
        for number in range(self.model.config.num_passes):
            if number > 0:
                if self.args.max_grad_norm:
                    self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                model.zero_grad()
            one_pass = {**inputs, "initial_states": self.states, "num_passes": 1}
            loss = super().training_step(model, one_pass, num_items_in_batch)
        return loss

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.states = outputs.states.detach()
        return (loss, outputs) if return_outputs else loss


class WindowTrainer(WarmStart, LanguageModelTrainer):
    """Cuts the text anew in each epoch."""


class DocumentTrainer(WholeDocuments, LanguageModelTrainer):
    """Trains on whole documents, and evaluates on blocks as all others do."""


@dataclass
class TrainingData:
    tokenizer: PreTrainedTokenizerBase
    train: Dataset | None
    """Blocks; None where whole documents are trained on."""
    validation: Dataset
    train_documents: list[str]
    validation_documents: list[str]
    report: dict
    checksum: str
    """Of the text."""


def prepare_data(arguments: DataArguments, model_name_or_path: str | None = None) -> TrainingData:
    """The text in blocks of tokens, by the tokenizer that is named, that of the checkpoint, or bytes.

    Raises:
        RunError: the tokenizer cannot be loaded.
        DataError: the text cannot be used, or a part of it has less than one block.
    """
    name = arguments.tokenizer_name or model_name_or_path
    tokenizer = load_tokenizer(name) if name else byte_tokenizer()
    corpus = load_corpus(
        arguments.text_file,
        arguments.dataset_name,
        arguments.dataset_config_name,
        arguments.text_column,
        arguments.validation_fraction,
        arguments.max_train_bytes,
    )

    def blocks(part: str, documents: list[str]) -> Dataset:
        try:
            return token_blocks(documents, tokenizer, arguments.block_size)
        except DataError as error:
            raise DataError(f"The {part} text: {error}") from error

    return TrainingData(
        tokenizer=tokenizer,
        train=blocks("training", corpus.train) if arguments.context == "blocks" else None,
        validation=blocks("validation", corpus.validation),
        train_documents=corpus.train,
        validation_documents=corpus.validation,
        report={**corpus.report, "bytes_per_token": bytes_per_token(corpus.validation, tokenizer)},
        checksum=hashlib.sha256("\0".join([*corpus.train, *corpus.validation]).encode()).hexdigest(),
    )


def count_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def build_model(
    arguments: ModelArguments,
    data_arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The model to train, in the data type it is stored in (fp32 from scratch). `base`: what stands at
    `model_name_or_path`, for a caller that has it already.

    Raises:
        RunError: an unknown preset, a checkpoint with missing weights, too small a vocabulary or too few positions.
    """
    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise RunError(f"There is no preset {arguments.preset!r}; choose from {sorted(PRESETS)}.")
    preset = PRESETS[arguments.preset or "stateful"]
    stateful = config_fields("--stateful_config", arguments.stateful_config, StatefulGPTConfig)
    if preset.stateful is None and stateful:
        raise RunError("--stateful_config is for a preset with feedback; leave it out.")
    feedback = None if preset.stateful is None else {**preset.stateful, "pass_seed": seed, **stateful}
    decoder = {**preset.decoder, **config_fields("--decoder_config", arguments.decoder_config, GateLoopConfig)}
    model = base or (load_model(arguments.model_name_or_path) if arguments.model_name_or_path else None)
    with trying():
        if model is None:
            model = matched_model(decoder_config(arguments, data_arguments, tokenizer, decoder), feedback)
        else:
            model = continued_model(arguments, model, feedback)
    if warm_start(arguments) and getattr(model.config, "feedback", None) is None:
        raise RunError("--warm_start is for a model that feeds its hidden state back, and this one has no feedback.")
    if warm_start(arguments) and model.config.feedback_source != "hidden_state":
        raise RunError("--warm_start is for a model that feeds its hidden state back, not the embedding.")
    if never_fed_back(model.config) and not warm_start(arguments):
        raise RunError(
            "A single pass without states to start from is plain, and would not train the feedback. Give --warm_start "
            "true, as to a model that was trained so, or more passes in --stateful_config."
        )
    model = choose_trainable(model, arguments)
    text_config = model.config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise RunError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {text_config.vocab_size}; use the "
            f"tokenizer that came with the model (leave out --tokenizer_name)."
        )
    for name in ("bos_token_id", "eos_token_id"):
        if any(token >= text_config.vocab_size for token in as_list(decoder.get(name))):
            raise RunError(
                f"--decoder_config: {name} is {decoder[name]}, but the vocabulary has {text_config.vocab_size} tokens."
            )
    limit = position_limit(text_config)
    if limit is not None and data_arguments.block_size > limit:
        raise RunError(
            f"--block_size {data_arguments.block_size} is more than the model's max_position_embeddings "
            f"({limit}); lower it."
        )
    return model


def as_list(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def checked_model(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainArguments,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """`build_model`, for what can be trained as asked: if not, a RunError says why."""
    model = build_model(model_arguments, data_arguments, tokenizer, training_arguments.seed, base)
    check_context(model, warm_start(model_arguments), data_arguments, training_arguments)
    check_step_per_pass(model_arguments, data_arguments, training_arguments)
    return model


def choose_trainable(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel | PeftModel:
    trainable = arguments.trainable
    if trainable not in ("everything", "fusion", "lora"):
        raise RunError(f"--trainable {trainable} does not exist; choose from everything, fusion, lora.")
    if trainable == "everything":
        return model
    if not arguments.model_name_or_path:
        raise RunError(f"--trainable {trainable} is for feedback around a checkpoint (--model_name_or_path).")
    if getattr(model.config, "feedback", None) is None:
        raise RunError(f"--trainable {trainable} is for a model with feedback; choose a --preset that has it.")
    drawn = model.config.pass_probabilities
    plain = model.config.num_no_grad_passes == 0 and (drawn[0] > 0 if drawn else model.config.num_passes == 1)
    if trainable == "fusion" and plain:
        raise RunError(
            "--trainable fusion has nothing to learn from a plain pass: with a warm start the first epoch is plain, "
            "and so is a batch of one pass. Train everything, or use --preset stateful."
        )
    if trainable == "lora":
        how: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": ["feedback"]}
        try:
            return get_peft_model(model, LoraConfig(**how))
        except ValueError:
            name = type(model.model.language_model).__name__
            logger.warning(f"peft does not say which modules of {name} to adapt: LoRA adapts all linear layers.")
            return get_peft_model(model, LoraConfig(**how, target_modules="all-linear"))
    model.requires_grad_(False)
    model.model.feedback.requires_grad_(True)
    return model


def warm_start(arguments: ModelArguments) -> bool:
    return arguments.warm_start or (arguments.preset is not None and PRESETS[arguments.preset].warm_start)


def never_fed_back(config: PreTrainedConfig) -> bool:
    """Whether no pass of training would read the states of one before."""
    of_states = getattr(config, "feedback", None) is not None and config.feedback_source == "hidden_state"
    return of_states and config.training_solver != "sequential" and config.trained_passes() == 1


def continued_model(arguments: ModelArguments, model: PreTrainedModel, feedback: dict | None) -> PreTrainedModel:
    """The loaded model as it is, or with feedback around it.

    Raises:
        RunError: options that are for a model from scratch, or that do not go with what was loaded.
    """
    defaults = ModelArguments()
    if arguments.preset is not None and PRESETS[arguments.preset].decoder:
        raise RunError(
            f"--preset {arguments.preset} is for a model from scratch; choose a preset with feedback, or none."
        )
    text_config = model.config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "dropout"):
        own = getattr(text_config, "hidden_dropout" if name == "dropout" else name, None)
        if getattr(arguments, name) not in (getattr(defaults, name), own):
            raise RunError(f"--{name} is for a model from scratch; {arguments.model_name_or_path} has its own.")
    decoder = config_fields("--decoder_config", arguments.decoder_config, GateLoopConfig)
    if pattern := decoder.get("layer_types"):
        decoder["layer_types"] = repeated(pattern, text_config.num_hidden_layers)
    if any(getattr(text_config, name, None) != value for name, value in decoder.items()):
        raise RunError(f"--decoder_config is for a model from scratch; {arguments.model_name_or_path} has its own.")
    layer_types = getattr(text_config, "layer_types", None) or []
    if arguments.preset == "gpt" and not RECURRENT_LAYERS.keys().isdisjoint(layer_types):
        raise RunError(f"{arguments.model_name_or_path} is no gpt: it has layers with a state; leave out --preset.")
    stateful = model.config.model_type == StatefulGPTConfig.model_type
    as_it_is = arguments.preset is None and model.config.model_type in OURS
    if stateful and not as_it_is:
        raise RunError(f"{arguments.model_name_or_path} has its feedback already; leave out --preset.")
    if not as_it_is and feedback is not None:
        return StatefulGPTForCausalLM.from_backbone(model, **feedback)
    if arguments.stateful_config != defaults.stateful_config:
        raise RunError("--stateful_config needs a --preset with feedback, or a plain model to put feedback around.")
    return model


def config_fields(option: str, text: str, config_class: type) -> dict:
    """The fields of a configuration given as JSON; a RunError if it is none, or names others."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RunError(f"{option} is not JSON of the form '{{\"field\": value}}': {text}")
    # Its own alone: what all of transformers' configurations have is of no use here, or harms.
    known = get_annotations(config_class).keys() - {"text_config"}
    if unknown := sorted(set(values) - known):
        raise RunError(f"{option}: {config_class.__name__} has no field {', '.join(unknown)}.")
    return values


def decoder_config(
    arguments: ModelArguments, data_arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, more: dict
) -> GateLoopConfig:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.num_attention_heads,
        "hidden_dropout": arguments.dropout,
        "attention_dropout": arguments.dropout,
        "max_position_embeddings": max(2048, data_arguments.block_size),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    given = {**sizes, **more}
    if pattern := given.get("layer_types"):
        given["layer_types"] = repeated(pattern, given["num_hidden_layers"])
    return GateLoopConfig(**given)


def repeated(pattern: list[str], num_layers: int) -> list[str]:
    """The type of each layer.

    Raises:
        RunError: not a list, or fewer layers than it takes to have one of each type.
    """
    if not isinstance(pattern, list) or not all(isinstance(name, str) for name in pattern):
        raise RunError(f'--decoder_config: layer_types must be a list such as ["gateloop"], not {pattern!r}.')
    layer_types = [pattern[i % len(pattern)] for i in range(num_layers)]
    if missing := set(pattern) - set(layer_types):
        raise RunError(
            f"--num_hidden_layers {num_layers} is too few for the pattern {', '.join(pattern)}: "
            f"there would be no {' and no '.join(sorted(missing))}."
        )
    return layer_types


def load_model(path: str) -> PreTrainedModel:
    """A checkpoint, all of it.

    Raises:
        RunError: the weights are missing, truncated, or lack parameters of the model.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    except Exception as error:
        what = (
            f"{type(error).__name__}: {error}"
            if Path(path).exists()
            else "there is no such folder, nor could it be had"
        )
        raise RunError(
            f"The checkpoint {path} cannot be loaded ({what}). Download or save it again, or go on from an earlier one."
        ) from error
    if lost := [name for name, z in model.named_parameters() if not z.isfinite().all()]:
        raise RunError(
            f"The checkpoint {path} has weights that are not finite: {', '.join(lost[:3])}"
            f"{' …' if len(lost) > 3 else ''}. Download or save it again, or go on from an earlier one."
        )
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise RunError(
            f"The checkpoint {path} lacks weights: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. "
            f"Its config.json and its weights do not belong together, or it was not saved completely."
        )
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise RunError(f"The tokenizer {name} cannot be loaded ({type(error).__name__}: {error}).") from error


def matched_model(decoder: GateLoopConfig, feedback: dict | None) -> PreTrainedModel:
    """A model with as many parameters as the plain GPT of the same sizes: what other layers and the fusion take, the
    MLPs give."""
    gpt = copy.deepcopy(decoder)
    gpt.layer_types = ["full_attention"] * gpt.num_hidden_layers

    def build() -> PreTrainedModel:
        if feedback is None:
            return GateLoopForCausalLM(decoder)
        return StatefulGPTForCausalLM(StatefulGPTConfig(text_config=decoder, **feedback))

    with torch.device("meta"):
        surplus = count_parameters(build()) - count_parameters(GateLoopForCausalLM(gpt))
    matrices = {"gelu": 2, "swiglu": 3}[decoder.mlp_type]
    decoder.intermediate_size -= round(surplus / (matrices * decoder.hidden_size * decoder.num_hidden_layers))
    if decoder.intermediate_size < 1:
        raise ValueError("The MLPs are too small to give the other layers their parameters; raise intermediate_size.")
    return build()


def check_place(folder: Path) -> None:
    """Raises a RunError where no folder can be."""
    try:
        blocked = any(path.exists() and not path.is_dir() for path in (folder, *folder.parents))
    except OSError as error:
        raise RunError(f"{error}; use another --output_dir.") from error
    if blocked:
        raise RunError(f"{folder} is a file or lies below one; use another --output_dir.")


def check_folder(folder: Path, settings: dict) -> None:
    """Raises a RunError if `folder` holds something else, or a run with other settings."""
    check_place(folder)
    marker = folder / "run.json"
    if marker.exists():
        before = read_object(marker)
        # A run begun before an option was there did what is its default now; of transformers' options, what was not
        # noted is taken to be as it is.
        before = {**settings, **asdict(ModelArguments()), **asdict(DataArguments()), **before}
        changed = [name for name in settings if before.get(name) != settings[name]]
        if read := sorted(set(changed) & {"text", "tokenizer", "base_weights", "base_config"}):
            raise RunError(
                f"{folder} holds a run of another {' and '.join(read).replace('_', ' ')}: what was read for it has "
                f"changed since it was begun. To start anew, use another --output_dir."
            )
        if changed:
            differences = ", ".join(f"{n}: {before.get(n)!r} then, {settings[n]!r} now" for n in changed)
            raise RunError(
                f"{folder} holds a run with other settings ({differences}). To resume it, use the same settings; to "
                f"start anew, use another --output_dir."
            )
    elif not is_empty(folder):
        raise RunError(f"{folder} holds something that is not a run of this command; use another --output_dir.")


OF_A_STEP = (
    *("optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16", "gradient_checkpointing", "optim_args", "optim_target_modules", "neftune_noise_alpha"),
)
"""Of transformers' arguments, those that decide what the steps of training do."""


def batch_size(arguments: TrainingArguments) -> int:
    """Examples for each step of the optimizer, on all devices of all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def settings_of(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainArguments
) -> dict:
    """What decides the result of a run. Where it is logged, how often it is saved, how it is spread do not."""
    decisive = {
        *(*OF_A_STEP, "num_train_epochs", "max_seconds", "seed", "data_seed"),
        *("patience", "load_best_model_at_end", "metric_for_best_model"),
        *("train_sampling_strategy", "dataloader_drop_last", "average_tokens_across_devices"),
    }
    if training_arguments.load_best_model_at_end:
        decisive |= {"eval_strategy", "eval_steps", "eval_delay", "greater_is_better"}
    training = {name: getattr(training_arguments, name) for name in sorted(decisive)}
    training["train_batch_size"] = batch_size(training_arguments)
    training["accelerator_config"] = other_than_default(training_arguments.accelerator_config)
    return as_json({**asdict(model_arguments), **asdict(data_arguments), **training})


def other_than_default(config: AcceleratorConfig) -> dict | None:
    """Its fields that are, but for the one that says how the run is spread."""
    default = AcceleratorConfig()
    return {k: v for k, v in vars(config).items() if k != "use_configured_state" and v != getattr(default, k)} or None


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As they will be read.

    Raises:
        RunError: an option holds a number that JSON has not.
    """
    for name, value in settings.items():
        try:
            settings[name] = json.loads(json.dumps(value, default=str, allow_nan=False))
        except ValueError as error:
            raise RunError(f"--{name} is {value}; it must be finite.") from error
    return settings


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainArguments,
    prepared: Callable[[], TrainingData] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict | None:
    """Trains, or goes on training. Returns what `results.json` in the output folder says, or None if interrupted.

    `prepared` returns the data, for a caller that has made it already. `callbacks` are for the Trainer.

    Raises:
        RunError: what cannot be trained as asked, or an output folder with something else; nothing is written then.
        DataError: see `prepare_data`.
    """
    folder = Path(training_arguments.output_dir)
    results_file = folder / "results.json"
    settings = settings_of(model_arguments, data_arguments, training_arguments)
    if (asked := training_arguments.resume_from_checkpoint) and (why := fault(Path(asked))):
        raise RunError(
            f"--resume_from_checkpoint {asked} is no complete checkpoint ({why}); leave it out to go on from the last "
            f"complete one."
        )
    # Trainer would push, at every save, all that is in the folder; what is pushed here is a complete repository, once.
    push, training_arguments.push_to_hub = training_arguments.push_to_hub, False
    if push and training_arguments.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise RunError("--push_to_hub publishes the finished model; checkpoints are not: leave out --hub_strategy.")
    if push:
        check_access(training_arguments.hub_model_id or folder.name, training_arguments.hub_token)
    check_folder(folder, settings)
    main_process = training_arguments.process_index == 0
    if results_file.exists():
        print(f"{folder} is finished.")
        results = read_object(results_file)
        if push and main_process and "pushed" not in results:
            publish(folder, results, training_arguments)
        return results

    with contextlib.ExitStack() as held:
        trainer, data, checkpoint = begin(
            model_arguments, data_arguments, training_arguments, settings, prepared, callbacks, held
        )
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except OSError as error:
            raise RunError(f"{error}. What was complete is kept.") from error
        interrupt = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SaveOnInterrupt))
        if interrupt.interrupted:
            print(f"Stopped at step {trainer.state.global_step}. Run the same command again to resume.")
            return None
        results = finish(trainer, model_arguments, data.report)
        (folder / LOCK).unlink(missing_ok=True)
        if main_process and push:
            publish(folder, results, training_arguments)
        return results


def begin(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainArguments,
    settings: dict,
    prepared: Callable[[], TrainingData] | None,
    callbacks: Sequence[TrainerCallback],
    held: contextlib.ExitStack,
) -> tuple[LanguageModelTrainer, TrainingData, str | None]:
    """Makes all that the run needs in the output folder, which is given back when `held` is closed, and then notes the
    run's settings in it, before any data is written. Returns the trainer, the data and the checkpoint to go on from.

    Raises:
        RunError: what cannot be trained as asked, or an output folder with something else; nothing is left then.
        DataError: see `prepare_data`.
    """
    folder = Path(training_arguments.output_dir)
    main_process = training_arguments.process_index == 0
    new = False
    with training_arguments.main_process_first():
        data = prepared() if prepared else prepare_data(data_arguments, model_arguments.model_name_or_path)
        set_seed(training_arguments.seed)
        model = checked_model(model_arguments, data_arguments, training_arguments, data.tokenizer)
        settings |= checksums(model_arguments, data_arguments, data, model)
        if main_process:
            check_folder(folder, settings)
            held.enter_context(locked(folder))
            # From now on, nobody else writes there; until now, somebody may have.
            check_folder(folder, settings)
            new = is_empty(folder)
        checkpoint = training_arguments.resume_from_checkpoint or last_complete_checkpoint(folder)
    if main_process:
        print(json.dumps(data.report, indent=1))
        print(f"{type(model).__name__}: {count_parameters(model):,} parameters")
    if checkpoint:
        print(f"Resuming from {checkpoint}.")
        # It would count once more for --patience.
        training_arguments.eval_on_start = False
    try:
        trainer = checked_trainer(model_arguments, data_arguments, training_arguments, data, model, callbacks)
        if main_process:
            with saving(folder / "run.json", 10_000):
                write_json(folder / "run.json", settings)
        if data_arguments.context != "blocks":
            trainer.train_dataset = write_documents(data, training_arguments)
    except RunError:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return trainer, data, checkpoint


def checksums(
    model_arguments: ModelArguments, data_arguments: DataArguments, data: TrainingData, model: PreTrainedModel
) -> dict[str, str]:
    """Of all that is read for a run."""
    sums = {"text": data.checksum}
    if data_arguments.tokenizer_name or model_arguments.model_name_or_path:
        sums["tokenizer"] = tokenizer_checksum(data.tokenizer)
    if model_arguments.model_name_or_path:
        sums["base_weights"] = tensors_checksum(dict(model.named_parameters()))
        configurations = filter(None, (model.config, model.generation_config))
        sums["base_config"] = hashlib.sha256("".join(map(computation, configurations)).encode()).hexdigest()
    return sums


def checked_trainer(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainArguments,
    data: TrainingData,
    model: PreTrainedModel,
    callbacks: Sequence[TrainerCallback] = (),
) -> LanguageModelTrainer:
    """The trainer of a run that can begin: if not, a RunError says why."""
    patience = training_arguments.patience
    patient = [StopWhenNothingImproves(patience)] if patience else []
    check_options(training_arguments)
    with trying():
        trainer = make_trainer(
            model_arguments,
            data_arguments,
            data,
            model=model,
            args=training_arguments,
            eval_dataset=sample_blocks(data.validation, data_arguments.max_eval_samples),
            processing_class=data.tokenizer,
            data_collator=collate,
            callbacks=[SaveOnInterrupt(), CountBatches(), *patient, *callbacks],
            before=spent(model_arguments.model_name_or_path),
        )
    check_trainer(trainer)
    return trainer


def check_options(arguments: TrainArguments) -> None:
    """Raises a RunError for options that name what is not installed, or does not exist."""
    with trying("--report_to"):
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise RunError("--use_liger_kernel: liger-kernel is not installed; leave it out.")
    if arguments.torch_compile:
        with trying("--torch_compile_backend and --torch_compile_mode"):
            torch.compile(nn.Identity(), backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
    with trying("--gradient_checkpointing_kwargs or --activation_checkpointing_kwargs"):
        given = {"use_reentrant": False, **(arguments.gradient_checkpointing_kwargs or {})}
        for name in ("every_n_layers", "offload"):  # The model takes these for itself.
            given.pop(name, None)
        checkpointed(nn.Identity(), torch.zeros(1, requires_grad=True), **given)


def check_trainer(trainer: LanguageModelTrainer) -> None:
    """Makes what the Trainer would make only after the run has begun, so that what is wrong with it shows before.

    Raises:
        RunError: there would be no step, or an option is refused.
    """
    with trying("--dataloader_* and --accelerator_config"):
        batches = len(trainer.get_train_dataloader())
    if batches == 0:
        raise RunError(
            f"The text gives no whole batch ({len(trainer.train_dataset)} examples; a batch takes "
            f"{batch_size(trainer.args)}): leave out --dataloader_drop_last, or lower --per_device_train_batch_size."
        )
    config = trainer.model.config
    if trainer.args.gradient_checkpointing and getattr(config, "training_solver", None) == "sequential":
        raise RunError("Training token by token goes without --gradient_checkpointing; leave it out.")
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        with trying("--optim, --optim_args and --optim_target_modules"):
            trainer.create_optimizer()
    with trying("--lr_scheduler_type and --lr_scheduler_kwargs"):
        check_schedule(trainer, batches)


def check_schedule(trainer: LanguageModelTrainer, batches: int) -> None:
    """Raises an error for a learning rate that is no number at the beginning, half-way or at the end."""
    arguments = trainer.args
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * batches)
    # One of its own, because schedulers write into it.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    schedule = trainer.create_scheduler(steps, optimizer)
    trainer.lr_scheduler = None
    factors = [factor(step) for factor in getattr(schedule, "lr_lambdas", []) for step in (0, steps // 2, steps)]
    if not all(map(math.isfinite, factors)):
        raise ValueError("the learning rate does not stay finite.")


def finish(trainer: LanguageModelTrainer, model_arguments: ModelArguments, report: dict) -> dict:
    """Saves the trained model and what `results.json` says of it, which is returned."""
    training_arguments, model = trainer.args, trainer.model
    folder = Path(training_arguments.output_dir)
    main_process = training_arguments.process_index == 0
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    if trainer.is_fsdp_enabled:  # Sharded checkpoints or not, the model that is left is one file.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with saving(folder / "model.safetensors", size_of_checkpoint(trainer.model)):
        trainer.save_model()
    state = trainer.state
    # That of the model that is left. Training ends with an entry in the log.
    step = (training_arguments.load_best_model_at_end and state.best_global_step) or state.global_step
    last = [entry for entry in state.log_history if entry["step"] == step][-1]
    results = {
        "preset": model_arguments.preset or Path(model_arguments.model_name_or_path or "stateful").name,
        "seed": training_arguments.seed,
        "parameters": count_parameters(model),
        "step": step,
        "tokens": last["tokens"],
        "seconds": last["train_seconds"],
        "before": trainer.before,
        "data": report,
        "eval_blocks": len(trainer.eval_dataset),
        "log": [entry for entry in state.log_history if "eval_loss" in entry],
    }
    warm = isinstance(trainer, WindowTrainer) and trainer.state_store and last["epoch"] >= 1
    epochs = int(last["epoch"])
    if main_process and warm and not trainer.is_fsdp_enabled:  # Sharded, all processes would have to take part.
        with contextlib.suppress(StatesMissing):
            results["warm_start"] = losses_from_states(model, trainer.train_dataset, trainer.state_store, epochs)
    if main_process:
        with saving(folder / "results.json", 1_000_000):
            if any(entry["step"] > 0 for entry in results["log"]):
                draw({results["preset"]: [results]}, folder / "training_curve.png")
            write_json(folder / "results.json", results)
        if warm:
            trainer.state_store.keep({epochs - 1})  # For a look at them; a finished run does not go on.
        print(f"Saved to {folder}.")
    return results


def spent(checkpoint: str | None) -> dict[str, float]:
    """The tokens and seconds of training behind a checkpoint, up to what it has logged last if it is one of a run; 0 if
    this command did not leave it.

    Raises:
        RunError: its `results.json` does not say.
    """
    if checkpoint and (file := Path(checkpoint, "results.json")).is_file():
        try:
            results = json.loads(file.read_text())
            before = {name: results[name] for name in ("tokens", "seconds")}
            if all(0 <= number < math.inf for number in before.values()):
                return before
            why = f"of {before}"
        except (ValueError, TypeError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
        raise RunError(f"{file} does not say how many tokens and seconds were spent ({why}). Mend it, or take it away.")
    state = saved_state(checkpoint) if checkpoint else None
    for entry in reversed(state.log_history if state else []):
        if "train_seconds" in entry:
            return {"tokens": entry["tokens"], "seconds": entry["train_seconds"]}
    return {"tokens": 0, "seconds": 0.0}


def make_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, data: TrainingData, **arguments
) -> LanguageModelTrainer:
    """Over blocks that are always the same, over windows where their place in the text matters, or over documents."""
    warm = warm_start(model_arguments)
    if step_per_pass(model_arguments):
        return StepPerPassTrainer(train_dataset=data.train, **arguments)
    if data_arguments.context != "blocks":
        return make_document_trainer(data_arguments, data, **arguments)
    if not warm and not data_arguments.random_offsets:
        return LanguageModelTrainer(train_dataset=data.train, **arguments)
    training_arguments, model = arguments["args"], arguments["model"]
    tokens = np.concatenate(data.train.with_format("numpy")["input_ids"][:])
    seed = training_arguments.data_seed if training_arguments.data_seed is not None else training_arguments.seed
    windows = Windows(tokens, data_arguments.block_size, seed, data_arguments.random_offsets)
    store = None
    if warm:
        # Filled up to whole batches for every process, tokens would be visited twice in an epoch.
        training_arguments.dataloader_drop_last |= training_arguments.world_size > 1
        try:
            store = StateStore(
                Path(training_arguments.output_dir, "states"),
                windows.num_tokens,
                model.config.hidden_size,
                # Two for the run and, if it stands elsewhere, two for each checkpoint.
                epochs=2 + 2 * (training_arguments.save_total_limit or 1),
            )
        except OSError as error:
            raise RunError(str(error)) from error
    trainer = WindowTrainer(train_dataset=windows, state_store=store, **arguments)
    steps = len(trainer.get_train_dataloader()) / training_arguments.gradient_accumulation_steps
    if warm and 0 < training_arguments.max_steps < 2 * steps:
        logger.warning(
            f"The states of an epoch are the start of the next, and {training_arguments.max_steps} steps are only "
            f"{training_arguments.max_steps / steps:.1f} epochs. Train for several, or on less text."
        )
    return trainer


def make_document_trainer(data_arguments: DataArguments, data: TrainingData, **arguments) -> DocumentTrainer:
    """Of texts, which a run that has begun replaces by their tokens."""
    training_arguments = arguments["args"]
    training_arguments.include_num_input_tokens_seen = "non_padding"
    return DocumentTrainer(
        train_dataset=data.train_documents,
        context=data_arguments.context,
        chunk_size=data_arguments.chunk_size,
        progress_seconds=training_arguments.progress_seconds,
        **{**arguments, "data_collator": pad},
    )


def write_documents(data: TrainingData, arguments: TrainArguments) -> Documents:
    """Their tokens, in a file of the output folder."""
    path = Path(arguments.output_dir, "documents.int32")
    with arguments.main_process_first(), saving(path, 4 * sum(map(len, data.train_documents))):
        return Documents(path, data.train_documents, data.tokenizer, write=arguments.process_index == 0)


def step_per_pass(arguments: ModelArguments) -> bool:
    return arguments.preset is not None and PRESETS[arguments.preset].step_per_pass


def check_step_per_pass(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> None:
    """Raises a RunError for options that do not go with a preset that takes a step for each pass."""
    other_examples = data_arguments.random_offsets or data_arguments.context != "blocks" or warm_start(model_arguments)
    other_steps = other_examples or training_arguments.gradient_accumulation_steps > 1
    if step_per_pass(model_arguments) and other_steps:
        raise RunError(
            f"--preset {model_arguments.preset} takes the same blocks in every epoch, and a step for each batch: leave "
            f"out --random_offsets, --context, --warm_start and --gradient_accumulation_steps."
        )


def check_context(
    model: PreTrainedModel, warm: bool, arguments: DataArguments, training_arguments: TrainingArguments
) -> None:
    """Raises a RunError for a --context that does not exist or does not go with the model or the other options."""
    if arguments.context == "blocks":
        return
    if arguments.context not in CONTEXTS:
        raise RunError(f"--context {arguments.context} does not exist; choose from blocks, {', '.join(CONTEXTS)}.")
    if arguments.chunk_size < 1:
        raise RunError("--chunk_size must be at least 1.")
    if warm or arguments.random_offsets:
        raise RunError(f"--context {arguments.context} reads whole documents: leave out warm start and random offsets.")
    with trying():
        check_recurrent(model)
        check_arguments(training_arguments)


def check_access(repo_id: str, token: str | None) -> None:
    """Raises a RunError before training for what would keep the finished model from being pushed."""
    try:
        validate_repo_id(repo_id)
        whoami(token)
    except (HTTPError, ValueError, OSError) as error:
        raise RunError(f"--push_to_hub: {error}") from error


def publish(folder: Path, results: dict, arguments: TrainArguments) -> None:
    """Pushes a finished run, and notes it in its results."""
    try:
        commit = upload(
            folder,
            arguments.hub_model_id or folder.name,
            token=arguments.hub_token,
            private=arguments.hub_private_repo,
            revision=arguments.hub_revision,
        )
    except (HTTPError, ValueError, OSError, RuntimeError) as error:
        raise RunError(f"{error}\nThe model is in {folder}. Give the same command again to push it.") from error
    results["pushed"] = commit.commit_url
    write_json(folder / "results.json", results)
    print(f"Pushed to {commit.commit_url}.")


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    types = (ModelArguments, DataArguments, TrainArguments)
    parser = HfArgumentParser(types, description=__doc__, allow_abbrev=False)
    with trying():
        return parser.parse_args_into_dataclasses(args=arguments)


def run_command(command: Callable[[], object]) -> None:
    """Runs a script's main function; what a user can mend is said in one line."""
    try:
        command()
    except (RunError, DataError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Given again, a command that trains goes on with what it has not finished.")


def main() -> None:
    if train(*parse(sys.argv[1:])) is None:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
