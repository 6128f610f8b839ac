"""peft around the models: default modules, adapters that are really called, merging, several at once, saving, prompts."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import BACKBONES, FUSIONS, stateful, text_config, tokens
from transformers import AutoModelForCausalLM

from modeling_stateful_gpt import GateLoopForCausalLM, StatefulGPTForCausalLM

peft = pytest.importorskip("peft", reason="peft is not installed")

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
NAMES = ["hybrid", "stateful", "stateful around hybrid", "stateful around gpt2", "stateful around llama"]
EACH = pytest.mark.parametrize("name", NAMES)


def perturbed(model, strength=0.1):
    """In eval mode and fp64, with weights that all matter."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(strength * torch.randn_like(parameter))
    return model


def hybrid():
    return perturbed(GateLoopForCausalLM(text_config("gateloop-hybrid")))


def small(name):
    """Stateful models make three passes in training, without dropout."""
    if name == "hybrid":
        return hybrid()
    backbone = {"stateful": "gateloop", "stateful around hybrid": "gateloop-hybrid"}.get(name, name.split()[-1])
    model = stateful(backbone, feedback="correction", num_passes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def lora(**config):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "lora_dropout": 0.0, **config})


def adapted(model, config=None, **kwargs):
    """With weights that matter, where adapters would start as the identity."""
    model = peft.get_peft_model(model, config or lora(), **kwargs)
    shake(model)
    return model.eval()


@torch.no_grad()
def shake(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def stepped_logits(model, ids):
    steps, cache = [], None
    for position in range(ids.shape[1]):
        outputs = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        steps, cache = [*steps, outputs.logits], outputs.past_key_values
    return torch.cat(steps, dim=1)


def train(model, steps=15, learning_rate=2e-2):
    """The losses of learning one batch by heart."""
    ids, losses = tokens(4, 12), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def greedy(model, ids, new_tokens):
    """Each token from a forward over all the ones before it: no cache, no `generate`."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def generated(model, ids, new_tokens=8, **kwargs):
    return model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


# What is adapted


def ends(model):
    """The last two parts of the names of the adapted modules."""
    return {".".join(name.split(".")[-2:]) for name in model.base_model.targeted_module_names}


DEFAULTS = {
    "hybrid": {"mixer.q_proj", "mixer.v_proj"},
    "stateful": {"mixer.q_proj", "mixer.v_proj", "feedback.up", "feedback.down"},
    "stateful around hybrid": {"mixer.q_proj", "mixer.v_proj", "feedback.up", "feedback.down"},
    "stateful around gpt2": {"attn.c_attn", "feedback.up", "feedback.down"},
    "stateful around llama": {"self_attn.q_proj", "self_attn.v_proj", "feedback.up", "feedback.down"},
}


@EACH
def test_by_default_lora_takes_what_it_takes_in_the_language_model_and_the_fusion(name):
    assert ends(peft.get_peft_model(small(name), lora())) == DEFAULTS[name]


def test_the_defaults_are_those_of_the_model_at_hand_whatever_was_adapted_before():
    for name in [*NAMES, *reversed(NAMES)]:
        assert ends(peft.get_peft_model(small(name), lora())) == DEFAULTS[name]


@pytest.mark.parametrize("feedback", FUSIONS)
def test_every_linear_layer_of_every_fusion_is_adapted_by_default(feedback):
    model = stateful("llama", feedback=feedback)
    linear = {f"feedback.{n}" for n, m in model.model.feedback.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear and linear == {end for end in ends(adapted(model)) if end.startswith("feedback")}


@EACH
def test_all_linear_takes_every_linear_layer_but_the_head(name):
    model = small(name)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"}
    assert any("feedback" in n or "transition" in n for n in linear)
    found = peft.get_peft_model(model, lora(target_modules="all-linear")).base_model.targeted_module_names
    assert set(found) == linear - {"lm_head"}


def test_a_language_model_without_defaults_has_none_with_feedback_either():
    model = small("stateful around llama")
    adapted(copy.deepcopy(model))
    model.config.text_config.model_type = "unheard_of"
    for config in (lora(), peft.IA3Config(task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            peft.get_peft_model(model, config)


METHODS = {
    "AdaLora": lambda: peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "LNTuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM"),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["hybrid", "stateful", "stateful around llama"])
def test_other_methods_have_defaults_and_learn(name, method):
    model = peft.get_peft_model(small(name).float(), METHODS[method]())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    ids = tokens(2, 6)
    assert generated(model, ids).equal(greedy(model, ids, 8))


# Every adapter is called


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default", "all-linear"])
@EACH
def test_every_adapter_counts_in_training_in_evaluation_and_in_a_step(name, targets):
    model, ids = adapted(small(name), lora(target_modules=targets)), tokens(2, 5)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in parameter_name)
        if parameter.requires_grad:
            assert parameter.grad.any(), parameter_name

    model.eval()
    whole, stepped = logits(model, ids), stepped_logits(model, ids)
    torch.testing.assert_close(whole, stepped, **CLOSE)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(model.base_model.targeted_module_names)
    for layer in layers:
        scaling, layer.scaling["default"] = layer.scaling["default"], 0.0
        for before, now in ((whole, logits(model, ids)), (stepped, stepped_logits(model, ids))):
            assert (now - before).abs().max() > 1e-4
        layer.scaling["default"] = scaling


@EACH
def test_generation_goes_through_the_adapters(name):
    model, ids = adapted(small(name), lora(target_modules="all-linear")), tokens(2, 6)
    expected = greedy(model, ids, 8)
    assert generated(model, ids).equal(expected)
    assert not generated(model.get_base_model(), ids).equal(generated(small(name), ids))
    with model.disable_adapter():
        assert generated(model, ids).equal(generated(small(name), ids))


@pytest.mark.parametrize("reentrant", [False, True])
@EACH
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    def gradients(model):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    ids = tokens(2, 7)
    expected = gradients(adapted(small(name), lora(target_modules="all-linear")))
    base = small(name)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert base.is_gradient_checkpointing
    model = adapted(base, lora(target_modules="all-linear"))
    calls = []
    attention = next(m for n, m in base.named_modules() if n.endswith(("q_proj", "c_attn")))
    attention.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    assert len(calls) == (2 if name == "hybrid" else 6)  # each pass forward, and again in the backward pass


@pytest.mark.parametrize("name", ["hybrid", "stateful around llama"])
def test_in_bf16_the_transitions_stay_precise_and_adapters_learn(name):
    model = peft.get_peft_model(small(name).bfloat16(), lora(target_modules="all-linear"))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and "transition" in getattr(layer, "current_key", ""):
            assert layer(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.float32


# The fusion trained fully


def test_a_trained_model_is_given_a_state_by_lora_and_a_fusion_trained_fully():
    """A letter drawn at random decides whether what follows is the same or its complement, ..."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(BACKBONES["llama"]())
    ids = tokens(4, 12)
    expected = logits(plain.eval(), ids)
    model = StatefulGPTForCausalLM.from_backbone(plain, feedback="correction")
    before = copy.deepcopy(model.state_dict())
    model = peft.get_peft_model(model, lora(modules_to_save=["feedback"]))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "feedback.modules_to_save.default" in n for n in trainable)
    assert ends(model) == {"self_attn.q_proj", "self_attn.v_proj"}

    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    feedback = model.get_base_model().model.feedback
    for parameter in feedback.modules_to_save["default"].parameters():
        assert parameter.grad is None or parameter.any()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - model(input_ids=ids, num_passes=1).logits).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    after = model.unload().state_dict()
    assert set(after) == set(before)
    for parameter_name, weight in before.items():
        if parameter_name != "model.batches_seen":
            torch.testing.assert_close(after[parameter_name], weight, rtol=0, atol=0)
