"""A state as a file of its own: saved, loaded around its language model, switched off, published."""

import json

import pytest
import torch
from data import byte_tokenizer
from fresh import run_fresh
from hub_server import HubServer, online
from huggingface_hub import ModelCard
from tiny import LLAMA_LIKE, import_peft, tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_imports

import hub_upload
from modeling_stateful_gpt import StatefulGPTForCausalLM, save_state, without_state

BASE = {**LLAMA_LIKE, "vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**BASE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stateful(base, **config):
    model = StatefulGPTForCausalLM.from_backbone(base, **config).eval()
    torch.manual_seed(1)
    for parameter in model.model.feedback.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def with_lora(model):
    peft = import_peft()
    config = peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["feedback"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.get_base_model().model.feedback.modules_to_save["default"].requires_grad_(False)
    for parameter in adapted.get_base_model().model.feedback.modules_to_save["default"].parameters():
        parameter += 0.1
    return adapted


@pytest.mark.parametrize("feedback", ["correction", "gated_add", "glu"])
def test_a_state_is_loaded_around_its_language_model(feedback, base, tmp_path):
    model, ids = stateful(base, feedback=feedback, num_groups=4, decode_mode="plain_prompt"), tokens(2, 9)
    save_state(model, tmp_path)
    assert (tmp_path / "state.safetensors").stat().st_size < 40_000
    again = StatefulGPTForCausalLM.from_backbone(base, state=tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    for field in ("feedback", "num_groups", "decode_mode"):
        assert getattr(again.config, field) == getattr(model.config, field)
    assert StatefulGPTForCausalLM.from_backbone(base, state=tmp_path, num_groups=2).config.num_groups == 2


@pytest.mark.parametrize("adapted", [False, True])
def test_switched_off_it_is_the_language_model_bit_for_bit(adapted, base, tmp_path):
    plain, ids = LlamaForCausalLM.from_pretrained(base).eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = stateful(base)
    save_state(with_lora(model) if adapted else model, tmp_path)
    model = StatefulGPTForCausalLM.from_backbone(base, state=tmp_path)
    how = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        on = model.eval()(ids, attention_mask=mask).logits
        with without_state(model):
            off = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            generated = model.generate(ids, **how)
        expected = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert torch.equal(off[mask.bool()], expected[mask.bool()])
        assert torch.equal(generated, plain.generate(ids, **how))
        assert torch.equal(model(ids, attention_mask=mask).logits, on) and not torch.allclose(on, off, atol=1e-3)


def test_lora_weights_lie_beside_it(base, tmp_path):
    model, ids = with_lora(stateful(base)), tokens(2, 9)
    save_state(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "README.md").exists()
    again = StatefulGPTForCausalLM.from_backbone(base, state=tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    whole = StatefulGPTForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_inside_the_fusion_is_left_to_peft(targets, base, tmp_path):
    peft = import_peft()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    model, ids = peft.get_peft_model(stateful(base), config).eval(), tokens(2, 9)
    save_state(model, tmp_path)
    again = StatefulGPTForCausalLM.from_backbone(base, state=tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    save_state(model.unload(), tmp_path)
    assert not hasattr(StatefulGPTForCausalLM.from_backbone(base, state=tmp_path), "disable_adapter")


def test_what_clients_write_into_a_configuration_keeps_no_state_from_its_model(base, tmp_path):
    model = stateful(base)
    model.config.text_config.pad_token_id, model.config.text_config.attention_dropout = None, 0.1
    model.config.note = "of a client"
    save_state(model, tmp_path)
    assert StatefulGPTForCausalLM.from_backbone(base, state=tmp_path).config.feedback == "correction"


def test_a_state_around_a_model_with_other_names_is_published(tmp_path):
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4))
    save_state(StatefulGPTForCausalLM.from_backbone(plain), tmp_path)
    hub_upload.main([str(tmp_path), "me/state", "--dry-run"])


def test_remote_code_asks_for_torch_and_transformers_alone(base, tmp_path):
    save_state(stateful(base), tmp_path)
    needed = {name for file in tmp_path.glob("*.py") for name in get_imports(file)}
    assert not needed & {"peft", "accelerate", "datasets", "trl", "rich", "matplotlib"}


def test_another_language_model_is_refused_by_name(base, tmp_path):
    save_state(stateful(base), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM: num_hidden_layers is 3, there 2"):
        other = LlamaForCausalLM(LlamaConfig(**{**BASE, "num_hidden_layers": 3}))
        StatefulGPTForCausalLM.from_backbone(other, state=tmp_path)
    with pytest.raises(ValueError, match=r"holds no state: there is no state_config.json"):
        StatefulGPTForCausalLM.from_backbone(base, state=base)
    with pytest.raises(ValueError, match="there is no state to save"):
        save_state(StatefulGPTForCausalLM.from_backbone(base, feedback=None), tmp_path)


STRANGER = """
import json, os, sys
sys.modules["modeling_stateful_gpt"] = None
token = os.environ.pop("HF_TOKEN")
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
code = "modeling_stateful_gpt.StatefulGPTForCausalLM"
kind = get_class_from_dynamic_module(code, "me/state", revision="v1", token=token)
model = kind.from_backbone("me/base", state="me/state", state_revision="v1", token=token).eval()
print(json.dumps(model(torch.tensor([[72, 101, 108, 108, 111]])).logits.tolist()))
"""


@pytest.mark.client("huggingface-hub", "`hub_upload.py` of a state, without its language model")
def test_a_published_state_loads_where_the_package_is_unknown(base, tmp_path, monkeypatch, capsys):
    with HubServer() as hub:
        online(monkeypatch, hub)
        LlamaForCausalLM.from_pretrained(base).push_to_hub("me/base")
        byte_tokenizer().push_to_hub("me/base")
        model = stateful("me/base")
        save_state(model, tmp_path / "state")
        hub_upload.main([str(tmp_path / "state"), "me/state", "--private"])
        files = hub.repos["me/state"].commit("main").files
        assert {"state.safetensors", "state_config.json", "modeling_stateful_gpt.py", "LICENSE"} <= set(files)
        assert "model.safetensors" not in files and sum(map(len, files.values())) < 400_000
        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "me/base" and card.data.base_model_relation == "adapter"
        assert 'state="me/state"' in card.text and json.loads(files["state_config.json"])["base_revision"]
        assert 'state_revision="v1"' in card.text
        with torch.no_grad():  # What comes after the tag is another state.
            later = stateful("me/base")
            later.model.feedback.down.weight.add_(1.0)
        save_state(later, tmp_path / "later")
        hub_upload.main([str(tmp_path / "later"), "me/state", "--tag=v2"])
        environment = hub.environment(tmp_path / "home")
        logits = json.loads(run_fresh("-c", STRANGER, env=environment).splitlines()[-1])
        assert hub.unknown == []
    expected = model(torch.tensor([[72, 101, 108, 108, 111]])).logits
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "not finite", "without its code"])
def test_a_damaged_state_is_not_published(damage, base, tmp_path):
    model = stateful(base)
    if damage == "not finite":
        model.model.feedback.down.weight.data[0, 0] = torch.nan
    save_state(model, tmp_path)
    if damage == "truncated":
        (tmp_path / "state.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:100])
    elif damage == "without its code":
        (tmp_path / "modeling_stateful_gpt.py").unlink()
    with pytest.raises(SystemExit, match=r"cannot be used|is not finite|lacks its code"):
        hub_upload.main([str(tmp_path), "me/state", "--dry-run"])
