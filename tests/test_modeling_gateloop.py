import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA_LIKE, VOCAB, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, GateLoopModel


def gpt(dtype=torch.float64, **config):
    torch.manual_seed(0)
    model = GateLoopForCausalLM(GateLoopConfig(**{**LLAMA_LIKE, **config})).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_same_weights_it_computes_what_llama_computes(dtype):
    ours = gpt(dtype, mlp_type="swiglu")
    names = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mixer": "self_attn"}
    weights = {
        ".".join(names.get(part, part) for part in name.split(".")): value for name, value in ours.state_dict().items()
    }
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)).to(dtype).eval()
    llama.load_state_dict(weights)
    ids = tokens(3, 17)
    logits = [model(ids, labels=ids) for model in (ours, llama)]
    # Llama's norm rounds to fp32 whatever the model's type.
    torch.testing.assert_close(logits[0].logits, logits[1].logits, atol=1e-5, rtol=1e-4)
    gradients = []
    for model, out in zip((ours, llama), logits, strict=True):
        out.loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [{}, {"num_key_value_heads": 4}, {"head_dim": 6}, {"position_embedding_type": "none"}]
)
def test_attention_implementations_agree(config):
    model = gpt(**config)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.exhaustive)])
def test_flex_attention_agrees(stance):
    model, ids = gpt(torch.float32), tokens(2, 11)
    with torch.no_grad(), torch.compiler.set_stance(stance):
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


LAYERS = {
    "attention": {},
    "attention without positions": {"position_embedding_type": "none"},
    "gateloop": {"layer_types": ["gateloop"] * 2},
    "hybrid": {"layer_types": ["gateloop", "full_attention"], "gateloop_num_heads": 4, "state_transition": "signed"},
}


@pytest.mark.parametrize("layers", LAYERS)
@given(st.integers(1, 13), st.lists(st.integers(0, 6), min_size=1, max_size=3), st.booleans())
def test_padding_on_either_side_changes_no_real_token(layers, length, pads, left):
    model = gpt(**LAYERS[layers])
    width = length + max(pads)
    ids, mask = tokens(len(pads), width), torch.zeros(len(pads), width, dtype=torch.long)
    rows = [slice(pad, pad + length) if left else slice(0, length) for pad in pads]
    for row, real in enumerate(rows):
        mask[row, real] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for row, real in enumerate(rows):
            torch.testing.assert_close(padded[row, real], model(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("layers", LAYERS)
def test_packed_sequences_do_not_see_each_other(layers):
    model, ids = gpt(**LAYERS[layers]), tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).logits)


def test_without_positions_the_order_of_the_past_does_not_matter():
    model = gpt(position_embedding_type="none", num_hidden_layers=1)
    ids = tokens(1, 9)
    shuffled = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, -1], model(shuffled).logits[:, -1])
        rope = gpt(num_hidden_layers=1)
        assert not torch.allclose(rope(ids).logits[:, -1], rope(shuffled).logits[:, -1])


def test_outputs_and_attention_weights_are_recorded():
    model = gpt()
    model.set_attn_implementation("eager")
    out = model(tokens(2, 7), output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 7, 32)] * 3
    for weights in out.attentions:
        assert weights.shape == (2, 4, 7, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
        assert weights.triu(1).abs().max() == 0


@pytest.mark.parametrize("layers", LAYERS)
def test_gradient_checkpointing_changes_no_gradient(layers):
    gradients = []
    for checkpointing in (False, True):
        model = gpt(hidden_dropout=0.1, attention_dropout=0.1, **LAYERS[layers]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_are_tied_as_configured(tied, tmp_path):
    model = gpt(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = GateLoopForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits, check_dtype=False)


def test_deeper_models_start_with_smaller_residual_projections():
    torch.manual_seed(0)
    scales = []
    for depth in (2, 16):
        model = GateLoopModel(GateLoopConfig(**{**LLAMA_LIKE, "num_hidden_layers": depth, "hidden_size": 64}))
        scales.append(model.layers[0].mlp.down_proj.weight.std().item() * depth**0.5)
    assert scales[0] == pytest.approx(scales[1], rel=0.1)


def test_bad_input_is_refused_by_name():
    model = gpt()
    with pytest.raises(ValueError, match=r"max_position_embeddings is 64"):
        model(tokens(1, 65))
    cache = model(tokens(1, 60), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"The sequence has 65 tokens"):
        model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(IndexError, match=f"contains {VOCAB}.*{VOCAB} tokens.*resize_token_embeddings"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(ValueError, match="all padding"):
        model(tokens(1, 5), attention_mask=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(Exception, match=r"'fft' does not exist; choose from .*'gateloop', 'reversible'"):
        GateLoopConfig(**LLAMA_LIKE, layer_types=["full_attention", "fft"])
    with pytest.raises(Exception, match="layer_types has 1 entries; num_hidden_layers is 2"):
        GateLoopConfig(**LLAMA_LIKE, layer_types=["full_attention"])
    with pytest.raises(Exception, match="num_attention_heads is 0; it must be at least 1"):
        GateLoopConfig(num_attention_heads=0)
    with pytest.raises(Exception, match=r"hidden_size \(256\) must be a multiple of num_attention_heads \(3\)"):
        GateLoopConfig(num_attention_heads=3)
    with pytest.raises(Exception, match=r"head_dim \(3;.*must be even"):
        GateLoopConfig(hidden_size=12, num_attention_heads=4)
    GateLoopConfig(hidden_size=12, num_attention_heads=4, position_embedding_type="none")
    with pytest.raises(Exception, match="hidden_size is 0"):
        GateLoopConfig(hidden_size=0)
    with pytest.raises(Exception, match=r"'learned' does not exist; choose from \['none', 'rope'\]"):
        GateLoopConfig(position_embedding_type="learned")
