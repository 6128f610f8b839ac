"""What the fields of the configurations may hold. Types are checked by `@strict`; here are the values."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from transformers import PreTrainedConfig


class Range(NamedTuple):
    words: str
    holds: Callable[[float], bool]


# NaN compares as False.
SIZE = Range("at least 1", lambda number: 1 <= number < math.inf)
COUNT = Range("at least 0", lambda number: 0 <= number < math.inf)
POSITIVE = Range("above 0 and finite", lambda number: 0 < number < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda number: 0 <= number < math.inf)
FRACTION = Range("above 0 and at most 1", lambda number: 0 < number <= 1)
PROBABILITY = Range("between 0 and 1", lambda number: 0 <= number <= 1)

RANGES = {
    # Of the language model.
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "gateloop_num_heads": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": POSITIVE,
    "attention_dropout": PROBABILITY,
    "hidden_dropout": PROBABILITY,
    "classifier_dropout": PROBABILITY,
    "initializer_range": NOT_NEGATIVE,
    # Of the feedback.
    "num_passes": SIZE,
    "num_no_grad_passes": COUNT,
    "feedback_noise": NOT_NEGATIVE,
    "prefill_passes": SIZE,
    "num_groups": SIZE,
    "tolerance": NOT_NEGATIVE,
}

ROPE_RANGES = {
    "rope_theta": POSITIVE,
    "partial_rotary_factor": FRACTION,
    "factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
    "attention_factor": NOT_NEGATIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "short_factor": POSITIVE,
    "long_factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "mscale": NOT_NEGATIVE,
    "mscale_all_dim": NOT_NEGATIVE,
}
"""Of the entries of `rope_parameters`; of lists, for each number."""


class CheckedConfig(PreTrainedConfig):
    """A configuration whose numbers are checked wherever they are set: in its constructor, by the arguments of
    `from_pretrained`, by hand."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RANGES and isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(name, value, RANGES[name])
        super().__setattr__(name, value)


def check_ranges(config: PreTrainedConfig) -> None:
    """Raises a ValueError for the first number of a configuration that is not in its range."""
    for name, allowed in RANGES.items():
        value = getattr(config, name, None)
        if isinstance(
            value, (int, float)
        ):  # Not a default that is None, nor what other language models may have there.
            check_number(name, value, allowed)


def check_rope(rope_parameters: dict[str, Any], types: Collection[str], head_dim: int) -> None:
    """Raises a ValueError for parameters of rotary positions that are not allowed."""
    for name, value in rope_parameters.items():
        if isinstance(value, dict):
            raise ValueError(f"rope_parameters[{name!r}] is {value}; all layers have the same rotary positions.")
    check_name("rope_parameters['rope_type']", rope_parameters.get("rope_type"), types)
    for name, allowed in ROPE_RANGES.items():
        value = rope_parameters.get(name)
        if value is not None or name == "rope_theta":
            for number in value if isinstance(value, list) else [value]:
                check_number(f"rope_parameters[{name!r}]", number, allowed)
    pairs = int(head_dim * (rope_parameters.get("partial_rotary_factor") or 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        value = rope_parameters.get(name)
        if value is not None and not (isinstance(value, list) and len(value) == pairs):
            raise ValueError(f"rope_parameters[{name!r}] is {value}; it must be a list of {pairs} numbers.")


def check_number(name: str, value: Any, allowed: Range) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed.holds(value):
        raise ValueError(f"{name} is {value!r}; it must be {allowed.words}.")


def check_name(name: str, value: str | None, allowed: Collection[str | None]) -> None:
    """Raises a ValueError where a field does not name an entry of its table."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} does not exist; choose from {sorted(allowed, key=str)}.")
