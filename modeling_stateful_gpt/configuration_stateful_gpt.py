"""The configuration of Stateful GPT: a language model's own configuration, and how its state is fed back."""

# Before all else: it says what is too old.
from .compat import OLDEST  # noqa: F401

# isort: split
import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .adapters import write_stateful_rows
from .configuration_gateloop import GateLoopConfig
from .feedback import FUSIONS, linear_layers
from .ranges import CheckedConfig, check_name, check_ranges
from .solvers import SOLVERS

if TYPE_CHECKING:
    from .modeling_stateful_gpt import StatefulGPTModel  # noqa: F401 (as in configuration_gateloop.py)

logger = logging.get_logger(__name__)

DECODE_MODES = {
    "no_feedback": "the language model alone, in generation too",
    "plain_prompt": "one plain pass over the prompt; what is generated has feedback",
    "passes": "a fixed number of passes over the prompt",
    "solved": "the recurrence, solved: what stepping gives, however the prompt is cut",
}

HEADS = {
    "linear": "one linear layer without bias",
    "language_model": "all that the …ForCausalLM of `text_config` does with the last hidden states",
}

READ_THROUGH = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Fields of `text_config` that clients look for at the top level, some as attributes, some in the dictionary."""


REMOVED = ("detach_between_passes", "prefix_mixin", "share_dropout_masks")
"""Fields that older checkpoints have. They changed how a model was trained, not what it computes."""


def make_text_config(model_type: str = GateLoopConfig.model_type, **fields) -> PreTrainedConfig:
    """Any configuration that `AutoConfig` knows. A `GateLoopConfig` is always that of the same code: `AutoConfig` may
    know another copy of it, or none."""
    if model_type == GateLoopConfig.model_type:
        return GateLoopConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


@strict
class StatefulGPTConfig(CheckedConfig):
    r"""
    Args:
        text_config: the language model's own configuration, any decoder of transformers or a `GateLoopConfig`
            (the default: a plain GPT), or the dictionary of one. The fields that are named in `READ_THROUGH` are its
            fields at the top level as well, to read and to set.
        feedback: how the state enters the embedding, a key of `FUSIONS` in `feedback.py`; None for no feedback.
        feedback_source: `"hidden_state"`, or `"embedding"`: the same fusion fed with the previous token's embedding,
            a token shift and no recurrence, to compare with.
        head: how last hidden states become logits, a key of `HEADS`: `"linear"`, or `"language_model"` for whatever the
            language model has there (a bias, a scale, a cap). With the latter, a mixture of experts has its
            load-balancing loss, too (`output_router_logits`). `from_backbone` chooses what computes the same.

    Training:
        - `training_solver`: how the passes are made, a key of `SOLVERS` in `solvers.py`: `"jacobi"`, `"cyclic"`, or
          `"sequential"`, token by token with backpropagation through time.
        - `num_passes`: passes over a training batch. The first is plain, each further one reads the states of the pass
          before, shifted by one. The loss is the mean over all passes.
        - `num_no_grad_passes`: further passes, without gradient and loss, before those. With None there are as many as
          solve the recurrence to `tolerance`, without dropout and noise. The passes with gradient then go over all
          positions at once, and what is trained is what evaluation computes.
        - `pass_probabilities`: in place of `num_passes`, the probability of 1, 2, … passes, drawn for each batch from
          `pass_seed` and the number of batches so far: the same on every process, and after a resume.
        - `feedback_noise`: standard deviation of Gaussian noise on the states that are fed back.

    Evaluation:
        - `decode_mode`: what prompts and other sequences of more than one token go through, a key of `DECODE_MODES`.
        - `prefill_passes`: their passes in the mode `"passes"`; by default as many as in training.
        - `solver`: how the recurrence is solved in the mode `"solved"`, a key of `SOLVERS` in `solvers.py`; None for
          what is expected to take the least time, pass by pass.
        - `num_groups`: groups of positions in a pass of the cyclic solver, in evaluation and training.
        - `tolerance`: how much an element may differ from the solution, in units of the root mean square of its state,
          as far as that can be estimated. Unless it is 0, at least 8 times what rounding does to a state.
    """

    model_type = "stateful_gpt"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *GateLoopConfig.keys_to_ignore_at_inference, "aux_loss", "router_logits", "pass_losses", "states",
        "passes", "residual", "stepped_from", "rounding_floor",
    ]  # fmt: skip

    # Any: `__post_init__` turns a dict or None into the configuration it stands for.
    text_config: Any = None
    feedback: str | None = "gated_add"
    feedback_source: str = "hidden_state"
    head: str = "linear"
    training_solver: str = "cyclic"
    num_passes: int = 1
    num_no_grad_passes: int | None = 2
    pass_probabilities: list[float] | None = None
    pass_seed: int = 0
    feedback_noise: float = 0.0
    decode_mode: str = "solved"
    prefill_passes: int | None = None
    solver: str | None = None
    num_groups: int = 8
    tolerance: float = 1e-4
    classifier_dropout: float | None = None

    def __post_init__(self, **kwargs):
        given = self.text_config
        if not (given is None or isinstance(given, (dict, PreTrainedConfig))):
            raise ValueError(
                f"text_config is {given!r}; it must be a configuration or the dictionary of one, such as "
                f"AutoConfig.from_pretrained(…) gives. To start from a model's name, use "
                f"StatefulGPTForCausalLM.from_backbone(…)."
            )
        if removed := [name for name in REMOVED if kwargs.pop(name, None)]:
            logger.warning_once(
                f"This version has no {' and no '.join(removed)}. Training goes without; what the model computes is "
                f"the same."
            )
        at_the_top = {name: kwargs.pop(name) for name in READ_THROUGH if name in kwargs}
        if not isinstance(given, PreTrainedConfig):
            # What follows from other fields (the width of a head, say) then follows from these.
            self.text_config = make_text_config(**{**(given or {}), **at_the_top})
        super().__post_init__(**kwargs)
        for name, value in at_the_top.items():
            if isinstance(given, dict):
                inside = given.get(self.text_config.attribute_map.get(name, name), given.get(name, value))
                if inside != value:
                    raise ValueError(f"{name} is {value!r} at the top level and {inside!r} in text_config; give one.")
            setattr(self, name, value)
        # Models are made in the type that the configuration names, and all of this one in the same.
        self.dtype: Any = self.dtype or self.text_config.dtype
        # Saved with every checkpoint, so that each Auto class finds its class in the code beside the weights.
        self.auto_map = {
            "AutoConfig": "configuration_stateful_gpt.StatefulGPTConfig",
            "AutoModel": "modeling_stateful_gpt.StatefulGPTModel",
            "AutoModelForCausalLM": "modeling_stateful_gpt.StatefulGPTForCausalLM",
            "AutoModelForSequenceClassification": "modeling_stateful_gpt.StatefulGPTForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_stateful_gpt.StatefulGPTForTokenClassification",
        }

    def to_dict(self):
        fields = super().to_dict()
        fusion = [] if self.feedback not in FUSIONS else [f"feedback.{name}" for name in linear_layers(self.feedback)]
        write_stateful_rows(self.model_type, self.text_config.model_type, fusion)
        return fields | {name: copy.deepcopy(getattr(self, name)) for name in READ_THROUGH if hasattr(self, name)}

    def to_diff_dict(self):
        # In config.json they stand once, so that who changes one by hand changes the only one.
        return {name: value for name, value in super().to_diff_dict().items() if name not in READ_THROUGH}

    def trained_passes(self) -> int | None:
        """How many passes a training batch goes through, at most; None where the recurrence is solved."""
        if self.num_no_grad_passes is None:
            return None
        return self.num_no_grad_passes + len(self.pass_probabilities or [None] * self.num_passes)

    def validate_fields(self):
        check_ranges(self)
        check_name("feedback", self.feedback, [*FUSIONS, None])
        check_name("feedback_source", self.feedback_source, ["hidden_state", "embedding"])
        check_name("decode_mode", self.decode_mode, DECODE_MODES)
        check_name("head", self.head, HEADS)
        check_name("training_solver", self.training_solver, SOLVERS)
        check_name("solver", self.solver, {None, *SOLVERS})
        probabilities = self.pass_probabilities
        if probabilities is not None and not (
            min(probabilities, default=-1) >= 0 and abs(sum(probabilities) - 1) <= 1e-6
        ):
            raise ValueError(
                f"pass_probabilities are the probabilities of 1, 2, … passes and must sum to 1, not {probabilities}."
            )

    def validate_text_config(self):
        if missing := [name for name in ("vocab_size", "hidden_size") if not hasattr(self.text_config, name)]:
            raise ValueError(
                f"text_config is a {type(self.text_config).__name__}, which has no {missing[0]}; it must be that of a "
                f"language model. Of a model of images or sound, give get_text_config()."
            )
        # Its own check was before fields were set from here.
        if self.text_config.model_type == GateLoopConfig.model_type:
            self.text_config.validate()


def _read_through(name: str) -> property:
    def get(config: StatefulGPTConfig):
        try:
            return getattr(config.text_config, name)
        except RuntimeError as error:  # It is another one in each layer.
            raise AttributeError(f"text_config has no {name} of its own: {error}") from error

    def set_(config: StatefulGPTConfig, value):
        setattr(config.text_config, name, value)

    return property(get, set_, doc=f"`text_config.{name}`, for clients that look for it at the top level.")


for _name in READ_THROUGH:
    setattr(StatefulGPTConfig, _name, _read_through(_name))


OWN_FIELDS = {field.name for field in dataclasses.fields(StatefulGPTConfig)} - {"dtype", "text_config"}
"""The fields that do not follow from the language model, as data type and `text_config` do."""

StatefulGPTConfig.register_for_auto_class()
