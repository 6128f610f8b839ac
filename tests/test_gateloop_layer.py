"""The GateLoop layers on their own, in somebody's network."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, silu

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, GateLoopLayer, SimpleGateLoopLayer
from modeling_stateful_gpt.gateloop_layer import TRANSITIONS

WIDTH = 12
every_transition = pytest.mark.parametrize("transition", TRANSITIONS)
every_head_count = pytest.mark.parametrize("heads", [1, 4, WIDTH])


def make(layer=GateLoopLayer, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = layer(WIDTH, **options).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def transitions(layer, name, x):
    """a as the docstrings define it, `[B, T, H]`, complex."""
    part = layer.transition
    if name == "cartesian":
        z = torch.view_as_complex(part.z(x).unflatten(-1, (-1, 2)))
        return z.abs().sigmoid() * z / z.abs()
    magnitude = part.magnitude(x).sigmoid()
    if name == "positive":
        return magnitude + 0j
    angle = part.phase(x)
    return magnitude * angle.cos() + 0j if name == "signed" else torch.polar(magnitude, angle)


@every_transition
@every_head_count
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 101])
def test_the_layer_is_the_papers_equations(transition, heads, norm, dtype, length):
    layer = make(num_heads=heads, state_transition=transition, output_norm=norm, dtype=dtype)
    x = torch.randn(2, length, WIDTH, dtype=dtype)
    y, state = layer(x, output_final_state=True)

    layer, x = layer.double(), x.double()
    q, k, v = (proj(x).view(2, length, heads, -1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    a = transitions(layer, transition, x)
    expected_state, outputs = 0, []
    for t in range(length):
        expected_state = a[:, t, :, None, None] * expected_state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], expected_state.real).flatten(1))
    mixed = torch.stack(outputs, dim=1)
    if norm:
        mixed = layer_norm(mixed, (WIDTH,), layer.norm.weight, layer.norm.bias)
    tolerance = {"atol": 1e-10, "rtol": 1e-8} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(y.double(), layer.o_proj(silu(layer.gate_proj(x)) * mixed), **tolerance)
    assert state.is_complex() == (transition in ("complex", "cartesian"))
    torch.testing.assert_close(state.to(torch.complex128), expected_state, **tolerance)


@every_transition
@every_head_count
@given(st.lists(st.integers(1, 80), min_size=1, max_size=4))
def test_in_pieces_is_at_once(transition, heads, pieces):
    layer, x = make(num_heads=heads, state_transition=transition), torch.randn(2, sum(pieces), WIDTH).double()
    whole, final_state = layer(x, output_final_state=True)
    state, parts = None, []
    for piece in x.split(pieces, dim=1):
        part, state = layer(piece, initial_state=state, output_final_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final_state)
    assert layer(x)[1] is None


@every_transition
@every_head_count
def test_padding_holds_the_state_and_a_start_empties_it(transition, heads):
    layer, x = make(num_heads=heads, state_transition=transition), torch.randn(1, 90, WIDTH).double()
    real = torch.rand(1, 90) < 0.5
    y, state = layer(x, real=real.long(), output_final_state=True)
    alone, alone_state = layer(x[real][None], output_final_state=True)
    torch.testing.assert_close(y[real][None], alone)
    torch.testing.assert_close(state, alone_state)

    starts = torch.zeros(1, 90, dtype=torch.bool)
    starts[0, [0, 17, 70]] = True
    y, state = layer(x, starts=starts, output_final_state=True)
    for piece in (slice(0, 17), slice(17, 70), slice(70, 90)):
        alone, alone_state = layer(x[:, piece], output_final_state=True)
        torch.testing.assert_close(y[:, piece], alone)
    torch.testing.assert_close(state, alone_state)


@pytest.mark.parametrize("heads", [1, 2, 64])
@pytest.mark.parametrize("make_model", [True, False])
def test_at_the_beginning_memory_horizons_lie_between_one_step_and_32_evenly_in_their_logarithm(heads, make_model):
    if make_model:
        config = GateLoopConfig(hidden_size=64, num_hidden_layers=1, layer_types=["gateloop"], gateloop_num_heads=heads)
        layer = GateLoopForCausalLM(config).model.layers[0].mixer
    else:
        layer = GateLoopLayer(64, heads)
    g, _ = layer.transition(torch.zeros(1, 1, 64))
    horizons = -1 / g[0, 0].double()
    torch.testing.assert_close(horizons[0], torch.tensor(32 ** (0.5 / heads)).double(), atol=1e-4, rtol=1e-4)
    if heads > 1:
        steps = horizons.log().diff()
        phases = layer.transition(torch.zeros(1, 1, 64))[1]
        if heads == 64:
            assert phases.min() < -2.5 and phases.max() > 2.5 and phases.mean().abs() < 0.8
        torch.testing.assert_close(steps, torch.full_like(steps, math.log(32) / heads), atol=1e-3, rtol=1e-2)


@every_transition
def test_zeros_and_bf16_are_no_trouble(transition):
    layer = make(num_heads=4, state_transition=transition, dtype=torch.float32)
    for parameter in layer.transition.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.zeros(1, 9, WIDTH).requires_grad_()
    layer(x)[0].sum().backward()
    for tensor in (x, *layer.parameters()):
        assert torch.isfinite(tensor.grad).all()

    layer = make(num_heads=4, state_transition=transition, dtype=torch.float32)
    x = torch.randn(2, 70, WIDTH)
    expected, _ = layer(x)
    y, state = layer.bfloat16()(x.bfloat16(), output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype in (torch.float32, torch.complex64)
    assert (y - expected).norm() < 0.1 * expected.norm()
    # The transitions are exact: those that fp32 gives with the rounded weights.
    rounded = layer.transition(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.float().transition(x.bfloat16().float())
    for a, b, c in zip(rounded, under_autocast, layer.transition(x.bfloat16().float()), strict=True):
        if a is not None:
            assert torch.equal(a, c) and torch.equal(b, c)


def simple_loop(layer, x):
    normed = layer.norm(x)
    a, kv, h, y = layer.a_proj(normed).sigmoid(), layer.kv_proj(normed), 0, []
    for t in range(x.shape[1]):
        h = a[:, t] * h + kv[:, t]
        y.append(layer.q_proj(normed[:, t]) * h)
    return torch.stack(y, dim=1), h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 7, 131])
def test_the_simple_layer_is_its_loop_and_in_reverse_the_loop_from_the_end(dtype, length):
    x = torch.randn(2, length, WIDTH, dtype=dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}
    for reverse in (False, True):
        layer = make(SimpleGateLoopLayer, reverse=reverse, dtype=dtype)
        turn = (lambda z: z.flip(1)) if reverse else (lambda z: z)
        inputs = x.clone().requires_grad_()
        y, state = layer(inputs, output_final_state=True)
        expected, expected_state = simple_loop(layer, turn(x))
        torch.testing.assert_close(y, turn(expected), **tolerance)
        torch.testing.assert_close(state, expected_state, **tolerance)
        reference = x.clone().requires_grad_()
        simple_loop(layer, turn(reference))[0].square().sum().backward()
        y.square().sum().backward()
        torch.testing.assert_close(inputs.grad, reference.grad, **tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_the_simple_layer_in_pieces_and_over_padding(reverse, pieces):
    layer, x = make(SimpleGateLoopLayer, reverse=reverse), torch.randn(2, sum(pieces), WIDTH).double()
    whole, final_state = layer(x, output_final_state=True)
    state, parts = None, {}
    split = list(enumerate(x.split(pieces, dim=1)))
    for i, piece in reversed(split) if reverse else split:
        parts[i], state = layer(piece, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([parts[i] for i in sorted(parts)], dim=1), whole)
    torch.testing.assert_close(state, final_state)

    real = torch.rand(1, x.shape[1]) < 0.5
    real[0, 0] = True
    y, state = layer(x[:1], real=real.long(), output_final_state=True)
    alone, alone_state = layer(x[:1][real][None], output_final_state=True)
    torch.testing.assert_close(y[real][None], alone)
    torch.testing.assert_close(state, alone_state)


def test_sizes_and_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"hidden_size \(12\) must be a multiple of num_heads \(5\)"):
        GateLoopLayer(12, 5)
    with pytest.raises(ValueError, match=r"must be a multiple of num_heads \(0\)"):
        GateLoopLayer(12, 0)
    for shape in ((1, 0, 12), (5, 12)):
        for layer in (SimpleGateLoopLayer(12), GateLoopLayer(12)):
            with pytest.raises(ValueError, match=r"must be .*B, T"):
                layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"state_transition 'real' does not exist; choose from .*'complex'.*'signed'"):
        GateLoopLayer(12, state_transition="real")
    with pytest.raises(Exception, match=r"must be a multiple of gateloop_num_heads \(7\)"):
        GateLoopConfig(hidden_size=64, gateloop_num_heads=7)
