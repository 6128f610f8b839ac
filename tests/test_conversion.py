"""Models made from weights of the package gateloop-transformer compute what that package computes."""

import pytest
import torch
from tiny import tokens

from modeling_stateful_gpt import convert_gateloop_transformer, convert_simple_gate_loop_layer

theirs = pytest.importorskip("gateloop_transformer", reason="gateloop-transformer is not installed")
SIZES = {"num_tokens": 50, "dim": 48, "depth": 2}


def shaken(module):
    """Biases and norms that are not what they start as."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


@pytest.mark.client("gateloop-transformer", "checkpoints imported")
@pytest.mark.parametrize("length", [1, 37, 256])
@pytest.mark.parametrize(
    "options", [{}, {"gate_loop_heads": 8}, {"gate_loop_heads": 1, "sub_ln": True}, {"ff_mult": 2, "sub_ln": True}]
)
def test_a_converted_transformer_gives_the_same_logits_and_gradients(options, length):
    # That it passes on only nine tenths of a gradient by default is not in the weights.
    original = shaken(theirs.Transformer(**SIZES, frac_gradient_state_transition=1.0, **options))
    model, ids = convert_gateloop_transformer(original.state_dict()), tokens(2, length)
    expected, logits = original(ids), model(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for out in (expected, logits):
        out.square().mean().backward()
    torch.testing.assert_close(
        model.get_input_embeddings().weight.grad, original.token_emb.weight.grad, atol=1e-3, rtol=1e-2
    )


def test_a_converted_transformer_is_a_model_like_any_other(tmp_path):
    original, ids = shaken(theirs.Transformer(**SIZES, gate_loop_heads=8)), tokens(2, 9)
    model = convert_gateloop_transformer(original.state_dict())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, original(ids), atol=1e-4, rtol=1e-4)
    generated = again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    for _ in range(4):
        ids = torch.cat([ids, original(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 37, 256])
def test_a_converted_simple_layer_gives_the_same_output(length, reverse):
    original = shaken(theirs.SimpleGateLoopLayer(48, reverse=reverse))
    layer, x = convert_simple_gate_loop_layer(original.state_dict(), reverse=reverse), torch.randn(2, length, 48)
    torch.testing.assert_close(layer(x)[0], original(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"post_ln_norm": True}, "post_ln_norm=True cannot be converted"),
        ({"use_gate_looped_attn": False}, "use_gate_looped_attn=True"),
        ({"attn_add_swish_gating": False}, "without a gate"),
        ({"dim_gate_looped_attn": 96}, "are 96 wide, the model 48"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        convert_gateloop_transformer(theirs.Transformer(**SIZES, **options).state_dict())
    with pytest.raises(ValueError, match="not those of a gateloop_transformer"):
        convert_gateloop_transformer({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="post_ln=False"):
        convert_simple_gate_loop_layer(theirs.SimpleGateLoopLayer(48, post_ln=True).state_dict())
