import pytest
import torch
from torch.nn.functional import gelu, linear

from modeling_stateful_gpt.feedback import FUSIONS

D = 6


def case(name):
    torch.manual_seed(0)
    fusion = FUSIONS[name](D).double()
    for parameter in fusion.parameters():
        parameter.data = torch.randn_like(parameter)
    e, h = torch.randn(2, 3, 5, D, dtype=torch.float64)
    return fusion, e, h


def test_gated_add_is_the_seeds_formula():
    f, e, h = case("gated_add")
    key, query, value = (linear(x, m.weight, m.bias) for x, m in ((h, f.key), (e, f.query), (h, f.value)))
    torch.testing.assert_close(f(e, h), e + value * (key * query).clamp(min=0))


def test_glu_is_its_formula_and_has_unit_scale():
    f, e, h = case("glu")
    product = linear(h, f.value.weight, f.value.bias) / (1 + torch.exp(-linear(e, f.gate.weight, f.gate.bias)))
    expected = product / (product.square().mean(-1, keepdim=True) + 1e-6).sqrt() * f.norm.weight
    torch.testing.assert_close(f(e, h), expected)


def test_correction_is_its_formula():
    f, e, h = case("correction")
    inner = gelu(linear(torch.cat([e, h], -1), f.up.weight, f.up.bias))
    torch.testing.assert_close(f(e, h), e + linear(inner, f.down.weight, f.down.bias))


@pytest.mark.parametrize("name", ["gated_add", "correction"])
def test_identity_start_returns_the_embedding_bit_for_bit_and_still_learns(name):
    fusion, e, h = case(name)
    fusion.start_at_identity()
    out = fusion(e, h)
    assert torch.equal(out, e)
    out.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())


def test_correction_starts_as_the_plain_model():
    e, h = torch.randn(2, 4, D)
    assert torch.equal(FUSIONS["correction"](D)(e, h), e)
