"""Configurations: what is refused when they are made, what clients read in them, and that they survive saving."""

import dataclasses
import json
import logging
from typing import get_args

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from tiny import BACKBONES, LLAMA_LIKE
from transformers import AutoConfig, GPT2Config, PreTrainedConfig

from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.configuration_gateloop import NAMES
from modeling_stateful_gpt.configuration_stateful_gpt import READ_THROUGH
from modeling_stateful_gpt.ranges import RANGES

NAN, INF = float("nan"), float("inf")

# What is refused


def refused(config_class, fields, message):
    with pytest.raises(Exception, match=message):
        config_class(**fields)


@pytest.mark.parametrize("name", [n for n, allowed in RANGES.items() if allowed.holds(1) and not allowed.holds(0.5)])
def test_sizes_and_numbers_of_passes_are_at_least_one(name):
    config_class = StatefulGPTConfig if name in StatefulGPTConfig.__dataclass_fields__ else GateLoopConfig
    for number in (0, -1):
        refused(config_class, {name: number}, f"{name} is {number}; it must be at least 1")
    refused(config_class, {name: True}, f"'{name}'.*(expected int|True)")


@pytest.mark.parametrize(
    "name,numbers,allowed",
    [
        ("rms_norm_eps", [0.0, -1e-6, NAN, INF], "above 0 and finite"),
        ("initializer_range", [-0.02, NAN, INF], "at least 0 and finite"),
        ("attention_dropout", [-0.1, 1.1, NAN, INF], "between 0 and 1"),
        ("hidden_dropout", [-0.1, 1.1, NAN, INF], "between 0 and 1"),
        ("feedback_noise", [-0.1, NAN, INF], "at least 0 and finite"),
        ("tolerance", [-0.1, NAN, INF], "at least 0 and finite"),
    ],
)
def test_numbers_out_of_their_range_are_refused_by_name(name, numbers, allowed):
    config_class = StatefulGPTConfig if name in StatefulGPTConfig.__dataclass_fields__ else GateLoopConfig
    for number in numbers:
        refused(config_class, {name: number}, f"{name} is {number}; it must be {allowed}")
    refused(config_class, {name: True}, f"'{name}' expected float, got bool")


def test_every_number_has_a_range():
    without = {"pass_seed", "pass_probabilities", "pad_token_id", "bos_token_id", "eos_token_id"}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    for config_class in (GateLoopConfig, StatefulGPTConfig):
        types = {field.name: set(get_args(field.type) or [field.type]) for field in dataclasses.fields(config_class)}
        numbers = {name for name, kinds in types.items() if kinds & {int, float}}
        assert numbers - inherited - without <= RANGES.keys()


@pytest.mark.parametrize("number", [-1, LLAMA_LIKE["vocab_size"]])
def test_a_padding_token_outside_the_vocabulary_is_refused(number):
    refused(GateLoopConfig, {**LLAMA_LIKE, "pad_token_id": number}, f"pad_token_id is {number}; .* from 0 to .* = 49")


@pytest.mark.parametrize(
    "rope,message",
    [
        ({"rope_theta": 0.0}, r"rope_parameters\['rope_theta'\] is 0.0; it must be above 0 and finite"),
        ({"rope_theta": NAN}, r"rope_parameters\['rope_theta'\] is nan"),
        ({"rope_theta": "10000"}, r"rope_parameters\['rope_theta'\] is '10000'"),
        ({"rope_theta": None}, r"rope_parameters\['rope_theta'\] is None"),
        ({"rope_type": "linear", "factor": -2.0}, r"rope_parameters\['factor'\] is -2.0; it must be above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}, r"rope_parameters\['beta_slow'\] is 0"),
        ({"rope_type": "longrope", "short_factor": [1.0, NAN], "long_factor": [1.0] * 2}, r"'short_factor'\] is nan"),
        ({"rope_type": "spiral"}, r"rope_parameters\['rope_type'\] 'spiral' does not exist; choose from .*'default'"),
        (
            {"full_attention": {"rope_theta": 1e4}},
            r"rope_parameters\['full_attention'\] is {.*all layers have the same",
        ),
    ],
)
def test_rotary_positions_out_of_their_range_are_refused_by_name(rope, message):
    refused(GateLoopConfig, {**LLAMA_LIKE, "rope_parameters": rope}, message)


def test_a_rope_theta_at_the_top_level_is_checked_as_well():
    refused(GateLoopConfig, {"rope_theta": -1.0}, r"rope_parameters\['rope_theta'\] is -1.0")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_names_are_refused_where_they_are_not_used_as_well(name):
    value = ["fft"] * 4 if name == "layer_types" else "fft"
    refused(GateLoopConfig, {name: value}, f"{name} 'fft' does not exist; choose from .*'{min(NAMES[name])}'")


@pytest.mark.parametrize("text_config", ["gpt2", GPT2Config, ["gpt2"]])
def test_a_language_model_that_is_no_configuration_is_refused(text_config):
    refused(StatefulGPTConfig, {"text_config": text_config}, r"text_config is .*gpt2.*AutoConfig.*from_backbone")


@pytest.mark.parametrize("text_config", [GateLoopConfig, GPT2Config])
def test_a_language_model_is_checked_again_with_what_the_top_level_sets(text_config):
    refused(StatefulGPTConfig, {"text_config": text_config(), "vocab_size": 0}, "vocab_size is 0")
    refused(StatefulGPTConfig, {"text_config": GateLoopConfig(), "num_hidden_layers": 2}, "layer_types has 4 entries")


OVERRIDES = [
    {"tolerance": NAN}, {"feedback_noise": NAN}, {"pass_probabilities": [0.9]}, {"prefill_passes": 0},
    {"num_passes": 0}, {"num_groups": 0}, {"feedback": "other"}, {"pad_token_id": 999}, {"solver": "other"},
    {"classifier_dropout": 7.0}, {"classifier_dropout": "much"}, {"vocab_size": 0},
]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_what_overrides_a_checkpoints_configuration_is_checked_as_well(override, tmp_path):
    StatefulGPTConfig(text_config=GateLoopConfig(**LLAMA_LIKE)).save_pretrained(tmp_path)
    (name,) = override
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        StatefulGPTForCausalLM(AutoConfig.from_pretrained(tmp_path, **override))


@pytest.mark.parametrize("config", [GateLoopConfig(), StatefulGPTConfig()], ids=lambda config: config.model_type)
def test_a_number_that_is_set_by_hand_is_checked_there(config):
    with pytest.raises(ValueError, match=r"classifier_dropout is 2\.0; it must be between 0 and 1"):
        config.classifier_dropout = 2.0
    assert config.classifier_dropout is None


@pytest.mark.parametrize("factor", [[1.0] * 3, 1.0])
def test_each_pair_of_a_head_needs_a_factor(factor):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factor, "long_factor": [1.0] * 4}
    message = r"rope_parameters\['short_factor'\] is .*; it must be a list of 4 numbers"
    refused(GateLoopConfig, {**LLAMA_LIKE, "rope_parameters": rope}, message)


def test_nothing_refused_is_saved(tmp_path):
    for config in (GateLoopConfig(), StatefulGPTConfig()):
        vars(config.get_text_config())["hidden_dropout"] = NAN
        with pytest.raises(Exception, match="hidden_dropout is nan"):
            config.save_pretrained(tmp_path)


# What is accepted

FRACTIONS = st.sampled_from([0.0, 0.1, 1.0])
SCALED = {"factor": 2.0, "original_max_position_embeddings": 32}
DECODERS = st.fixed_dictionaries(
    {
        "vocab_size": st.just(50),
        "hidden_size": st.just(8),
        "num_hidden_layers": st.just(2),
        "num_attention_heads": st.just(2),
        "layer_types": st.lists(st.sampled_from(sorted(NAMES["layer_types"])), min_size=2, max_size=2),
    },
    optional={
        **{name: st.sampled_from(sorted(names)) for name, names in NAMES.items() if name != "layer_types"},
        "rms_norm_eps": st.sampled_from([1e-24, 1e-6, 1.0]),
        "initializer_range": st.sampled_from([0.0, 1e-9, 5.0]),
        "attention_dropout": FRACTIONS,
        "hidden_dropout": FRACTIONS,
        "pad_token_id": st.sampled_from([None, 0, 49]),
        "eos_token_id": st.sampled_from([None, 1, [1, 2]]),
        "gateloop_num_heads": st.sampled_from([None, 1, 8]),
        "head_dim": st.sampled_from([2, 6]),
        "use_cache": st.booleans(),
        "rope_parameters": st.sampled_from(
            [
                None,
                {"rope_theta": 1},
                {"rope_theta": 5e6, "rope_type": "default"},
                {"rope_type": "linear", "factor": 0.5},
                {"rope_type": "dynamic", "factor": 4},
                {"rope_type": "yarn", **SCALED, "attention_factor": None, "truncate": False},
                {"rope_type": "llama3", **SCALED, "low_freq_factor": 1, "high_freq_factor": 4},
            ]
        ),
    },
)
FEEDBACKS = st.fixed_dictionaries(
    {},
    optional={
        "feedback": st.sampled_from([None, "glu"]),
        "feedback_source": st.sampled_from(["hidden_state", "embedding"]),
        "num_no_grad_passes": st.sampled_from([0, 3]),
        "pass_probabilities": st.sampled_from([None, [1.0], [0.0, 0.25, 0.75]]),
        "feedback_noise": st.sampled_from([0.0, 3.0]),
        "prefill_passes": st.sampled_from([None, 1]),
        "tolerance": st.sampled_from([0.0, 1e-12, 10.0]),
    },
)


@given(DECODERS, FEEDBACKS)
def test_what_makes_sense_is_accepted_and_survives_saving(decoder, feedback):
    for config in (GateLoopConfig(**decoder), StatefulGPTConfig(text_config=decoder, **feedback)):
        for again in (
            type(config)(**config.to_dict()),
            type(config)(**json.loads(config.to_json_string())),
            type(config)(**json.loads(config.to_json_string(use_diff=False))),
        ):
            assert again.to_dict() == config.to_dict()


OF_AN_EARLIER_VERSION = """{
  "architectures": ["StatefulGPTForCausalLM"],
  "decode_mode": "solved", "detach_between_passes": true, "dtype": "float32", "feedback": "correction",
  "feedback_noise": 0.0, "feedback_source": "hidden_state", "model_type": "stateful_gpt", "num_groups": 8,
  "num_no_grad_passes": 0, "num_passes": 2, "pass_probabilities": null, "pass_seed": 0, "prefill_passes": null,
  "prefix_mixin": 0.0, "share_dropout_masks": false, "solver": "cyclic", "tolerance": 0.0,
  "training_solver": "jacobi", "transformers_version": "5.22.0",
  "text_config": {
    "activation_function": "gelu_new", "add_cross_attention": false, "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_inner": null, "n_layer": 2, "n_positions": 64,
    "pad_token_id": null, "resid_pdrop": 0.1, "tie_word_embeddings": false, "use_cache": false, "vocab_size": 50
  }
}"""


def test_a_configuration_of_an_earlier_version_is_read_as_it_was(tmp_path, caplog):
    (tmp_path / "config.json").write_text(OF_AN_EARLIER_VERSION)
    logger = logging.getLogger("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "propagate", True)
        config = AutoConfig.from_pretrained(tmp_path)
    assert "This version has no detach_between_passes. Training goes without" in caplog.text
    assert not hasattr(config, "detach_between_passes")
    text = config.text_config
    assert (text.n_embd, text.n_layer, text.vocab_size, text.use_cache) == (32, 2, 50, False)
    assert (config.hidden_size, config.use_cache, config.tie_word_embeddings) == (32, False, False)
    config.save_pretrained(tmp_path / "new")
    assert {**AutoConfig.from_pretrained(tmp_path / "new").to_dict(), "_name_or_path": ""} == {
        **config.to_dict(),
        "_name_or_path": "",
    }


# What clients read


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_clients_read_stands_in_the_dictionary_and_once_in_the_file(backbone, tmp_path):
    config = StatefulGPTConfig(text_config=BACKBONES[backbone]())
    fields = config.to_dict()
    assert {name: fields[name] for name in READ_THROUGH} == {name: getattr(config, name) for name in READ_THROUGH}
    assert fields["tie_word_embeddings"] is False and fields["hidden_size"] == 32
    config.save_pretrained(tmp_path)
    assert READ_THROUGH & json.loads((tmp_path / "config.json").read_text()).keys() == set()


VALUES = {
    "tie_word_embeddings": st.booleans(),
    "use_cache": st.booleans(),
    "pad_token_id": st.none() | st.integers(0, 9),
}
CHANGES = st.sampled_from(READ_THROUGH).flatmap(lambda n: st.tuples(st.just(n), VALUES.get(n, st.integers(50, 99))))


@given(st.sampled_from(sorted(BACKBONES)), st.lists(st.tuples(CHANGES, st.booleans()), max_size=4))
def test_the_top_level_and_the_language_model_never_differ(backbone, changes):
    config = StatefulGPTConfig(text_config=BACKBONES[backbone]())
    expected = {name: getattr(config, name) for name in READ_THROUGH}
    for (name, value), at_the_top in changes:
        setattr(config if at_the_top else config.text_config, name, value)
        expected[name] = value
    for seen in (config, config.text_config):
        assert {name: getattr(seen, name) for name in READ_THROUGH} == expected
    assert {**config.to_dict(), **expected} == config.to_dict()


@pytest.mark.parametrize("text_config", [None, {"model_type": "gpt2"}, "object"])
def test_what_is_given_at_the_top_level_reaches_the_language_model(text_config):
    text_config = GateLoopConfig() if text_config == "object" else text_config
    config = StatefulGPTConfig(text_config=text_config, use_cache=False, vocab_size=60, tie_word_embeddings=False)
    text = config.text_config
    assert (text.use_cache, text.vocab_size, text.tie_word_embeddings) == (False, 60, False)


def test_what_follows_from_a_size_follows_from_one_given_at_the_top_level(tmp_path):
    config = StatefulGPTConfig(hidden_size=64, num_hidden_layers=2)
    assert config.text_config.to_dict() == GateLoopConfig(hidden_size=64, num_hidden_layers=2).to_dict()


@pytest.mark.parametrize("inside", [{"vocab_size": 50}, {"vocab_size": 50, "model_type": "gpt2"}])
def test_two_values_of_one_field_are_refused(inside):
    fields = StatefulGPTConfig(text_config=dict(inside)).to_dict()
    fields["text_config"]["vocab_size"] = 60
    refused(StatefulGPTConfig, fields, "vocab_size is 50 at the top level and 60 in text_config")
    refused(StatefulGPTConfig, {**fields, "vocab_size": 70}, "vocab_size is 70 at the top level and 60 in text_config")
    fields = {"text_config": {"model_type": "gpt2", "n_embd": 32}, "hidden_size": 64}
    refused(StatefulGPTConfig, fields, "hidden_size is 64 at the top level and 32 in text_config")


def test_one_value_of_a_field_is_given_by_either_of_its_names():
    for name in ("n_embd", "hidden_size"):
        refused(
            StatefulGPTConfig,
            {"text_config": {"model_type": "gpt2", name: 32}, "hidden_size": 64},
            "hidden_size is 64 at the top level and 32 in text_config",
        )


def test_the_dropout_of_a_classifier_is_a_probability():
    refused(GateLoopConfig, {**LLAMA_LIKE, "classifier_dropout": NAN}, "classifier_dropout is nan")
