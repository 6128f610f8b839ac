"""Weights of 8 and 4 bits by torchao, through transformers' TorchAoConfig, on a CPU."""

import pytest
import torch
from tiny import BACKBONES, LLAMA_LIKE, shared, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from modeling_stateful_gpt import GateLoopForCausalLM, StatefulGPTForCausalLM
from modeling_stateful_gpt.linear import FullPrecisionLinear

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra: clients)")
int4 = pytest.importorskip("torchao.prototype.quantization.int4", reason="needs torchao 0.18")


KINDS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(16)
    ),
    "packed int4": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=32),
}
# Of the spread of the logits: rounding weights to so many bits costs so much, in models of random weights.
LARGEST_ERROR = {"int8": 0.1, "int4": 1.0, "packed int4": 1.0}
MODELS = {
    "hybrid": lambda: GateLoopForCausalLM(BACKBONES["gateloop-hybrid"]()).eval(),
    **{f"stateful around {b}": lambda b=b: shared(b, torch.float32) for b in ("gateloop-hybrid", "llama")},
}


def quantized(path, kind, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=TorchAoConfig(KINDS[kind]()), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.client("torchao", f"{k} weights")) for k in KINDS])
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_generates_what_it_computes(name, kind, dtype, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    small, ids = quantized(tmp_path, kind, dtype), tokens(2, 12)
    with torch.no_grad():
        expected, logits = model(ids).logits, small(ids).logits.float()
        assert 0 < (logits - expected).abs().max() / expected.std() < LARGEST_ERROR[kind]

        out = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert out.shape == (2, 20)
        scores = small(out[:, :-1]).logits[:, 11:].float()
        # In bf16 a token may be one of two that forward and single steps round to either side.
        chosen = scores.gather(-1, out[:, 12:, None])[..., 0]
        assert (scores.amax(-1) - chosen).max() <= (1e-4 if dtype == torch.float32 else 0.02)


def quantized_names(model):
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor}


@pytest.mark.parametrize(
    "kind", ["int8", "int4"]
)  # Packed, 48 columns are no multiple of the group and stay as they are.
def test_everything_linear_is_quantized_but_the_transitions_and_the_head(kind, tmp_path):
    shared("gateloop-hybrid", torch.float32).save_pretrained(tmp_path)
    model = quantized(tmp_path, kind)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {name for name, module in linear.items() if isinstance(module, FullPrecisionLinear)} | {"lm_head"}
    assert {"model.feedback.value", "model.language_model.layers.0.mixer.q_proj"} <= quantized_names(model)
    assert quantized_names(model) == set(linear) - left and len(left) == 3


def test_feedback_around_a_quantized_model_is_saved_and_loads_again(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "hidden_size": 64})).save_pretrained(tmp_path / "base")
    how = TorchAoConfig(KINDS["int8"]())
    model = StatefulGPTForCausalLM.from_backbone(tmp_path / "base", quantization_config=how).eval()
    torch.nn.init.normal_(model.model.feedback.down.weight, std=0.02)
    model.save_pretrained(tmp_path / "again")
    again, ids = StatefulGPTForCausalLM.from_pretrained(tmp_path / "again").eval(), tokens(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert "Int8" in type(again.model.language_model.layers[0].mlp.up_proj.weight).__name__


def test_a_quantized_model_is_saved_and_loads_again(tmp_path):
    shared("gateloop-hybrid", torch.float32).save_pretrained(tmp_path / "whole")
    model, ids = quantized(tmp_path / "whole", "int8"), tokens(2, 9)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert quantized_names(again) == quantized_names(model)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    whole, small = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("whole", "small"))
    assert small < 0.6 * whole


@pytest.mark.parametrize("name", ["hybrid", "stateful around gateloop-hybrid"])
def test_loaded_in_fp16_the_transitions_stay_in_fp32(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    kinds = {("transition" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float16)}
    model(tokens(2, 5), labels=tokens(2, 5)).loss.backward()
