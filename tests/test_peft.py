"""peft around the models: default modules, adapters that are really called, merging, saving, prompts."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from fresh import run_fresh
from packaging.version import Version
from safetensors.torch import load_file
from tiny import BACKBONES, FUSIONS, JACOBI, few, import_peft, stateful, text_config, tokens
from transformers import AutoModelForCausalLM

from modeling_stateful_gpt import GateLoopForCausalLM, StatefulGPTForCausalLM

peft = import_peft()

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
NAMES = ["hybrid", "stateful", "stateful around hybrid", "stateful around gpt2", "stateful around llama"]
EACH = pytest.mark.parametrize("name", NAMES)


def small(name):
    """In eval mode and fp64, with weights that all matter; without dropout. Three passes in training."""
    if name == "hybrid":
        torch.manual_seed(0)
        model = GateLoopForCausalLM(text_config("gateloop-hybrid")).double().eval()
        shake(model, 0.2)
        return model
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
def shake(model, strength=0.3, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(strength * torch.randn_like(parameter))


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


@pytest.mark.client("peft", "LoRA with default target modules")
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


@pytest.mark.client("peft", "LoRA on `all-linear`")
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


@pytest.mark.client("peft", "IA³ and other methods")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["hybrid", "stateful", "stateful around llama"])
def test_other_methods_have_defaults_and_learn(name, method):
    model = peft.get_peft_model(small(name).float(), METHODS[method]())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    ids = tokens(2, 6)
    assert generated(model, ids).equal(greedy(model, ids, 8))


# Every adapter is called


@pytest.mark.client("peft", "LoRA with default target modules")
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


@pytest.mark.parametrize("name", ["hybrid", "stateful around hybrid"])
def test_in_bf16_the_transitions_stay_precise_and_adapters_learn(name):
    model = peft.get_peft_model(small(name).bfloat16(), lora(target_modules="all-linear"))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    layers = [model.get_submodule(f"base_model.model.{target}") for target in model.base_model.targeted_module_names]
    transitions = [layer for layer in layers if "Magnitude" in repr(layer.base_layer)]
    for layer in transitions:
        assert layer(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert len(transitions) == 1


# The fusion trained fully


@pytest.mark.client("peft", "the fusion trained fully by `modules_to_save`")
def test_a_trained_model_is_given_a_state_by_lora_and_a_fusion_trained_fully(tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(BACKBONES["llama"]()).eval()
    ids = tokens(4, 12)
    expected, language_model = logits(plain, ids), copy.deepcopy(plain.base_model.state_dict())
    model = StatefulGPTForCausalLM.from_backbone(plain, feedback="correction", **JACOBI, num_passes=2)
    model = peft.get_peft_model(model, lora(modules_to_save=["feedback"]))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    assert ends(model) == {"self_attn.q_proj", "self_attn.v_proj"}  # not within the fusion, which is trained itself

    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        fed_back = model(input_ids=ids).logits - model(input_ids=ids, num_passes=1).logits
    assert fed_back.abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    fusion = {name: weight for name, weight in saved.items() if "lora_" not in name}
    assert {name.removeprefix("base_model.model.model.") for name in fusion} == {
        f"feedback.{layer}.{part}" for layer in ("up", "down") for part in ("weight", "bias")
    }
    trained = logits(model, ids)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload(), ids), trained, atol=1e-5, rtol=1e-5)
    # Unloaded, the language model is as it was; what was trained fully stays, as peft has it.
    unloaded = model.unload().model
    torch.testing.assert_close(unloaded.language_model.state_dict(), language_model, rtol=0, atol=0)
    for name, weight in fusion.items():
        torch.testing.assert_close(unloaded.get_parameter(name.removeprefix("base_model.model.model.")).data, weight)


# Merging, several adapters


@pytest.mark.client("peft", "merge and unload")
@pytest.mark.parametrize("config", [lora(target_modules="all-linear"), peft.IA3Config(task_type="CAUSAL_LM")])
@EACH
def test_merged_a_model_computes_what_it_did_with_the_adapter(name, config, tmp_path):
    base, ids = small(name), tokens(2, 6)
    plain, kind = logits(base, ids), type(base)
    model = adapted(base, copy.deepcopy(config))
    expected, text = logits(model, ids), generated(model, ids)
    assert (expected - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    assert type(merged) is kind and not [n for n in merged.state_dict() if "lora" in n or "ia3" in n]
    torch.testing.assert_close(logits(merged, ids), expected, **CLOSE)
    assert generated(merged, ids).equal(text)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(kind.from_pretrained(tmp_path), ids), expected, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", ["gpt2", "llama", "gateloop-hybrid"])
def test_merged_a_model_keeps_the_tokens_that_were_trained(backbone, tied):
    """Where the head is the embedding, peft trains the tokens in both; it asks the configuration's dictionary."""
    model = adapted(
        stateful(backbone, feedback="correction", tie_word_embeddings=tied), lora(trainable_token_indices=[1, 2, 3])
    )
    ids = torch.tensor([[1, 2, 3, 4, 5, 1]])
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(merged, ids), expected, **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_warns_of_an_adapter_on_a_tied_embedding(tied):
    model = peft.get_peft_model(
        stateful("llama", feedback="correction", tie_word_embeddings=tied), lora(target_modules=["embed_tokens"])
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_and_unload()
    assert any("tie_word_embeddings=True" in str(warning.message) for warning in caught) == tied


@EACH
def test_unloaded_a_model_is_as_it_was(name):
    ids = tokens(2, 6)
    unloaded = adapted(small(name), lora(target_modules="all-linear")).unload()
    torch.testing.assert_close(unloaded.state_dict(), small(name).state_dict(), rtol=0, atol=0)
    # To the last bit, small products depend on where in memory the weights lie.
    torch.testing.assert_close(logits(unloaded, ids), logits(small(name), ids), rtol=1e-12, atol=1e-12)


@pytest.mark.client("peft", "several adapters")
@EACH
def test_several_adapters_on_one_model(name):
    ids = tokens(2, 6)

    def alone(seed):
        model = adapted(small(name))
        shake(model, seed=seed)
        return model

    first, second = alone(2), alone(3)
    model = peft.get_peft_model(small(name), lora(), adapter_name="first")
    model.add_adapter("second", lora())
    for adapter, other in (("first", first), ("second", second)):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other), adapter_name=adapter)
    for adapter, other in (("first", first), ("second", second), ("first", first)):
        model.set_adapter(adapter)
        model.eval()
        torch.testing.assert_close(logits(model, ids), logits(other, ids), **CLOSE)
        assert generated(model, ids).equal(generated(other, ids))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(small(name), ids), **CLOSE)

    model.add_weighted_adapter(["first", "second"], [1.0, 0.0], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    torch.testing.assert_close(logits(model, ids), logits(first, ids), **CLOSE)
    model.delete_adapter("mixed")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    mixed = logits(model, ids)
    for other in (first, second):
        assert (mixed - logits(other, ids)).abs().max() > 1e-2


@EACH
def test_rows_of_a_batch_may_have_different_adapters(name):
    ids = tokens(2, 6)
    model = adapted(small(name), adapter_name="first")
    model.add_adapter("second", lora())
    model.set_adapter("second")
    shake(model, seed=5)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["first", "second"], use_cache=False).logits
    texts = generated(model, ids, adapter_names=["first", "second"])
    for row, adapter in enumerate(["first", "second"]):
        model.set_adapter(adapter)
        torch.testing.assert_close(mixed[row], logits(model, ids)[row], **CLOSE)
        assert texts[row].equal(generated(model, ids)[row])


# Saving


STRANGER = """
import json, sys
sys.modules["modeling_stateful_gpt"] = None  # any import of the package now fails
import torch
import transformers
from transformers import AutoModelForCausalLM
order, *folders = sys.argv[1:]
if order == "peft first":
    import peft
ids, seen = torch.load(folders[0] + "/ids.pt"), {}
for folder in folders:
    base = lambda: AutoModelForCausalLM.from_pretrained(folder + "/base", trust_remote_code=True).eval()
    model = base()
    import peft
    model = peft.PeftModel.from_pretrained(model, folder + "/adapter").eval()
    assert type(model.get_base_model()).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits]
        text = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        by_name = peft.AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter", trust_remote_code=True).eval()
        by_transformers = AutoModelForCausalLM.from_pretrained(folder + "/adapter", trust_remote_code=True).eval()
        added = base()
        added.load_adapter(folder + "/adapter")
        logits += [other(input_ids=ids).logits for other in (by_name, by_transformers, added.eval())]
    fresh = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM"))
    torch.save((logits, text, fresh.base_model.targeted_module_names), folder + "/seen.pt")
"""


@pytest.mark.client("peft", "saved adapters on a remote-code base")
@pytest.mark.parametrize("order", few(["peft first", "peft last"], ["peft last"]))
def test_saved_adapters_load_onto_a_base_with_code_where_the_package_cannot_be_imported(order, tmp_path):
    ids, folders, models = tokens(2, 6), [], {}
    for name in NAMES:
        folder = tmp_path / name
        small(name).save_pretrained(folder / "base")
        torch.save(ids, folder / "ids.pt")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        models[name] = adapted(base, lora(modules_to_save=None if name == "hybrid" else ["feedback"]))
        models[name].save_pretrained(folder / "adapter")
        assert {path.name for path in (folder / "adapter").iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors"
        }  # fmt: skip
        folders.append(str(folder))
    run_fresh("-c", STRANGER, order, *folders, cwd=tmp_path)
    for name in NAMES:
        seen, text, targets = torch.load(tmp_path / name / "seen.pt")
        if Version(transformers.__version__) < Version("5.18") and name != "hybrid":
            seen = seen[:2]  # Its own `load_adapter` loses `modules_to_save` there, and reports so.
        for other in seen:
            torch.testing.assert_close(other, logits(models[name], ids), **CLOSE)
        assert text.equal(generated(models[name], ids))
        assert {".".join(target.split(".")[-2:]) for target in targets} == DEFAULTS[name]


@EACH
def test_transformers_own_adapters(name, tmp_path):
    model, ids = small(name), tokens(2, 6)
    model.add_adapter(lora(task_type=None))
    shake(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model.disable_adapters()
    torch.testing.assert_close(logits(model, ids), logits(small(name), ids), **CLOSE)
    other = small(name)
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other, ids), expected, **CLOSE)


def test_sft_trainer_takes_a_lora_configuration(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from data import byte_tokenizer
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, eos_token_id=256))
    trainer = trl.SFTTrainer(
        StatefulGPTForCausalLM.from_backbone(plain),
        trl.SFTConfig(
            tmp_path, max_steps=20, logging_steps=1, learning_rate=2e-2, max_length=32, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": ["hello, hello"] * 8}),
        processing_class=byte_tokenizer(),
        peft_config=lora(modules_to_save=["feedback"]),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    trainer.save_model()
    assert any("feedback" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


# Prompts


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def prefix():
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.client("peft", "prompt tuning")
@pytest.mark.parametrize("method", PROMPTS)
@EACH
def test_virtual_tokens_stand_before_the_text(name, method, tmp_path):
    base, ids = small(name), tokens(2, 6)
    model = peft.get_peft_model(base, PROMPTS[method]())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    prompt = model.get_prompt(2).detach()
    with torch.no_grad():
        embeds = torch.cat([prompt, base.get_input_embeddings()(ids)], dim=1)
        expected = small(name)(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert generated(model, ids).equal(greedy(model, ids, 8))

    # Padding on the left is passed over as without virtual tokens in front of it.
    padded = torch.cat([ids.new_zeros(2, 3), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    with torch.no_grad():
        beside = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, -6:]
    torch.testing.assert_close(beside, expected[:, -6:], **CLOSE)
    assert generated(model, padded, attention_mask=mask)[:, 3:].equal(generated(model, ids))

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small(name), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), expected, **CLOSE)


@pytest.mark.client("peft", "prefix tuning of layers without a state; refused for others")
@pytest.mark.parametrize("name", ["gpt", "stateful", "stateful around gpt2", "stateful around llama"])
def test_prefixes_of_keys_and_values_work_where_all_layers_attend(name):
    if name == "gpt":
        torch.manual_seed(0)
        base = GateLoopForCausalLM(text_config("gateloop")).double()
    else:
        base = small(name)
    ids = tokens(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, prefix())
        model.prompt_encoder.double()
        losses = train(model, learning_rate=0.1)
        assert losses[-1] < losses[0] - 0.02
        with torch.no_grad():
            # The prefix is a cache, so that there is none to leave out; each call makes a new one.
            text = ids
            for _ in range(8):
                text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
        assert generated(model, ids).equal(text)


@pytest.mark.client("peft", "prefix tuning of layers without a state; refused for others")
@pytest.mark.parametrize("name", ["hybrid", "stateful around hybrid"])
def test_prefixes_of_keys_and_values_are_refused_for_layers_with_a_state(name):
    model, ids = peft.get_peft_model(small(name).float(), prefix()), tokens(2, 6)
    with pytest.raises(ValueError, match=r"a gateloop layer, whose past is a state.*PrefixTuningConfig.* cannot"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="PromptTuningConfig, PromptEncoderConfig and LoraConfig can"):
        generated(model.eval(), ids)
