"""The reversible cell: undone bit for bit, and its gradients are those of plain backpropagation through time."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv import by_a_scan
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM
from modeling_stateful_gpt.fixed_point import (
    GATE_BITS,
    WORD_BITS,
    Words,
    divide,
    fixed_point,
    floating_point,
    multiply,
    renormalize,
    undo_renormalize,
)
from modeling_stateful_gpt.reversible import FORMS, Forgetting, ReversibleCell, soften
from modeling_stateful_gpt.rwkv_memory import KeyValueMemory


def cell(form, dtype=torch.float64, inputs=5, size=4, scale=3.0):
    torch.manual_seed(0)
    made = ReversibleCell(inputs, size, form).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=scale / parameter.shape[-1] ** 0.5)
    return made


def through_time(cell, x, states, real=None, starts=None):
    """The slow, obvious reference: the equations, with everything stored by autograd. Returns `[B, T, 2 S]`.

    Each result is checked against `states` and takes their value, so that the rounding of the fixed point, as the
    identity to gradients, is the only difference that is left.
    """

    def rounded(exact, to):
        torch.testing.assert_close(exact, to, rtol=1e-6, atol=2 * 2.0 ** (GATE_BITS - 30))
        return exact + (to - exact).detach()

    def changed(half, a):
        q, p, *r = a.chunk(cell.form.parts, -1)
        update = p.sigmoid() * q.tanh()
        if r:
            z = r[0].sigmoid()
            half = half * (z + ((z * 2**GATE_BITS).round().clamp(min=1) / 2**GATE_BITS - z).detach())
        return half + update

    def limited(s):
        return s / (1 + s.square().mean(-1, keepdim=True)).sqrt()

    first, second = x.new_zeros(2, len(x), cell.state_size)
    result = []
    for t in range(x.shape[1]):
        if starts is not None:
            first, second = (s * ~starts[:, t, None] for s in (first, second))
        here = torch.ones(len(x), 1, dtype=torch.bool) if real is None else real[:, t, None]
        to_first, to_second = states[:, t].detach().chunk(2, -1)
        a1, a2 = cell.x_proj(x[:, t]).chunk(2, -1)
        new_first = changed(first, a1 + limited(second) @ cell.state_weight[0].T)
        first = rounded(torch.where(here, new_first, first), to_first)
        new_second = changed(second, a2 + limited(first) @ cell.state_weight[1].T)
        second = rounded(torch.where(here, new_second, second), to_second)
        result.append(torch.cat([first, second], -1))
    return torch.stack(result, 1)


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=60)
def test_what_is_run_forwards_runs_backwards_bit_for_bit(form, batch, length, padded, seed):
    torch.manual_seed(seed)
    dtype = (torch.float32, torch.float64)[seed % 2]
    made, words = cell(form, dtype, scale=5.0), Words()
    x = torch.randn(batch, length, 5, dtype=dtype)
    real = torch.rand(batch, length) < 0.7 if padded else None
    before = made(x.flip(1), words=words)[1]
    kept = words.nbytes
    states, after, _ = made(x, before, real, words=words)
    again, undone, _ = made(x, after, real, words=words, backwards=True)
    assert torch.equal(undone, before) and torch.equal(again, states) and words.nbytes == kept


@pytest.mark.parametrize("form", FORMS)
def test_a_long_past_is_undone_step_by_step_as_well(form):
    made, words = cell(form, torch.float32), Words()
    inputs = torch.randn(3000, 2, 5)
    state = made.initial_state(2)
    for x in inputs:
        state, _ = made.step(state, x, words)
    assert not torch.equal(state, made.initial_state(2))
    for x in inputs.flip(0):
        state, _ = made.unstep(state, x, words)
    assert torch.equal(state, made.initial_state(2)) and words.nbytes == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 7), (3, 33)])
@pytest.mark.parametrize("inputs", ["plain", "padded", "packed", "both"])
@pytest.mark.parametrize("backwards", [False, True])
def test_states_and_gradients_are_those_of_plain_backpropagation_through_time(
    form, dtype, batch, length, inputs, backwards
):
    made = cell(form, dtype, scale=1.0)
    x = torch.randn(batch, length, 5, dtype=dtype)
    real = torch.rand(batch, length) < 0.7 if inputs in ("padded", "both") else None
    starts = torch.rand(batch, length) < 0.2 if inputs in ("packed", "both") else None
    weights = torch.randn(batch, length, 8, dtype=dtype)

    def gradients(states, x):
        (states * weights).sum().backward()
        found = [x.grad.clone(), *(p.grad.clone() for p in made.parameters())]
        made.zero_grad()
        return found

    ours, reference = (x.clone().requires_grad_() for _ in range(2))
    if backwards:
        if starts is not None:
            with pytest.raises(ValueError, match="over the start of a sequence"):
                made(x, None, real, starts, words=Words(), backwards=True)
            return
        words = Words()
        after = made(x, None, real, words=words)[1]
        states = made(ours, after, real, words=words, backwards=True)[0]
    else:
        states = made(ours, None, real, starts)[0]
    expected = through_time(made, reference, states, real, starts)
    limit = 1e-11 if dtype == torch.float64 else 2e-5
    for mine, theirs in zip(gradients(states, ours), gradients(expected, reference), strict=True):
        assert (mine - theirs).norm() <= limit * (1 + theirs.norm())


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_reaches_the_state_before_through_its_carrier(form):
    """In pieces, each with its own backward pass, the gradients are those of the whole."""
    made = cell(form, scale=1.0)
    x = torch.randn(2, 24, 5, dtype=torch.float64)
    weights = torch.randn(2, 24, 8, dtype=torch.float64)

    whole = x.clone().requires_grad_()
    (made(whole)[0] * weights).sum().backward()
    expected = [whole.grad, *(p.grad.clone() for p in made.parameters())]
    made.zero_grad()

    words, state = Words(), None
    with torch.no_grad():
        for piece in x.split(7, 1):
            _, state, _ = made(piece, state, words=words)
    pieces = x.clone().requires_grad_()
    gradient = torch.zeros(2, 2, 4, dtype=torch.float64)
    for piece, weight in reversed(list(zip(pieces.split(7, 1), weights.split(7, 1), strict=True))):
        carrier = torch.zeros_like(gradient, requires_grad=True)
        states, state, after = made(piece, state, carrier=carrier, words=words, backwards=True)
        torch.autograd.backward([(states * weight).sum(), after], [None, gradient])
        gradient = carrier.grad
    assert torch.equal(state, made.initial_state(2))
    for mine, theirs in zip([pieces.grad, *(p.grad for p in made.parameters())], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_forgetting_state_stores_what_it_forgets_and_little_more(batch):
    """-log2(z) bits for each unit in each step, in words and in buffers, and where the words were."""
    made, words, left = cell("forgetting", torch.float32, size=64, scale=0.5), Words(), []
    push = words.push
    words.push = lambda buffers, leaving: left.append(leaving.sum().item()) or push(buffers, leaving)
    x = torch.randn(batch, 2000, 5)
    states, state, _ = made(x, words=words)
    a = made.x_proj(x[:, 1:]).unflatten(-1, (2, 3, 64))[..., 2, :]
    halves = soften(states.unflatten(-1, (2, 64)))
    seen = torch.stack([halves[:, :-1, 1], halves[:, 1:, 0]], 2)
    a = a + torch.einsum("bths,hps->bthp", seen, made.state_weight[:, 128:])
    lost = -a.sigmoid().log2().sum().item()
    in_buffers = (state[:, :, 1] + 1).log2().sum().item()
    assert sum(left) * WORD_BITS + in_buffers == pytest.approx(lost, rel=0.01)
    assert 8 * words.nbytes + in_buffers < 1.2 * lost


@given(st.integers(1, 3), st.integers(0, 99), st.sampled_from([(1, 1), (1, 2), (1, 1024), (1023, 1024), (1024, 1024)]))
@settings(max_examples=30)
def test_nothing_overflows_and_all_is_undone_at_the_most_extreme_gates(batch, seed, gates):
    torch.manual_seed(seed)
    values, buffer, words = (
        torch.randint(-(2**40), 2**40, (batch, 9)),
        torch.zeros(batch, 9, dtype=torch.int64),
        Words(),
    )
    past = []
    for _ in range(100):
        past.append((values, buffer, z := torch.randint(gates[0], gates[1] + 1, (batch, 9))))
        values, buffer = multiply(values, buffer, z)
        # z · values, and what the buffers have added.
        assert ((values - past[-1][0] * z // 1024).abs() <= 1024).all() and (buffer >= 0).all()
        buffer = renormalize(buffer, words)
    for before, buffer_before, z in reversed(past):
        values, buffer = divide(values, undo_renormalize(buffer, words), z)
        assert torch.equal(values, before) and torch.equal(buffer, buffer_before)
    assert words.nbytes == 0


def test_without_the_lost_bits_a_forgetting_state_is_not_run_backwards():
    made = cell("forgetting")
    with pytest.raises(ValueError, match="without the words"):
        made.unstep(made.initial_state(1), torch.zeros(1, 5, dtype=torch.float64))


@given(st.integers(-(2**40), 2**40))
def test_fixed_point_numbers_are_exact(number):
    value = torch.tensor([number])
    assert torch.equal(fixed_point(floating_point(value, torch.float64)), value)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        ReversibleCell(4, 4, "subtractive")


def test_gates_start_with_horizons_from_one_step_to_the_longest():
    bias = ReversibleCell(3, 64, "forgetting").x_proj.bias.view(2, 3, 64)
    horizons = -1 / bias[:, 2].sigmoid().log()
    assert horizons.min() > 1 and horizons.max() < Forgetting.LONGEST_HORIZON and not bias[:, :2].any()
    torch.testing.assert_close(horizons[0].log().diff(), torch.full((63,), horizons[0].log().diff()[0].item()))


@torch.no_grad()
def test_an_untrained_additive_state_holds_what_came_first_through_silence():
    torch.manual_seed(0)
    made, x = ReversibleCell(16, 16), torch.zeros(4, 300, 16)
    x[:, 0] = torch.randn(4, 16)
    outputs, *_ = made(x)
    after = outputs.norm(dim=-1)
    assert after[:, 0].min() > 1e-3 and (after[:, -1] < 2 * after[:, 0]).all()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_gate(form):
    """In bf16 the gates of long horizons would be 1."""
    made, x = cell(form, torch.float32, scale=1.0), torch.randn(2, 20, 5)
    expected = made(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x)[0], expected)


# RWKV's memory


def memory(dtype=torch.float64, size=6):
    """With decays that are multiples of 2^-GATE_BITS, from an eighth that stays to nearly all, but not to the limit,
    whose gradient is 1 before torch 2.14, and 0 since."""
    torch.manual_seed(0)
    made = KeyValueMemory(size).to(dtype)
    with torch.no_grad():
        z = torch.linspace(2**GATE_BITS / 8, 2**GATE_BITS - 2, size, dtype=torch.float64).round() / 2**GATE_BITS
        made.time_decay.copy_((-z.log()).log())
        made.time_first.normal_(std=0.5)
    return made


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_memory_is_that_of_transformers_rwkv_though_it_is_read_after_it_is_written(batch, length):
    made, x = memory(), torch.randn(batch, length, 12, dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    weights = torch.randn(batch, length, 6, dtype=torch.float64)
    expected, _ = rwkv_linear_attention_cpu(made.time_decay, made.time_first, *theirs.chunk(2, -1))
    (expected * weights).sum().backward()
    gradients = [theirs.grad, *(p.grad for p in made.parameters())]
    made.zero_grad()
    wkv, _, _ = made(ours)
    torch.testing.assert_close(wkv, expected, rtol=1e-5, atol=1e-5)
    (wkv * weights).sum().backward()
    same([ours.grad, *(p.grad for p in made.parameters())], gradients)


def same(ours, theirs):
    """To what the fixed point adds and rounds."""
    for mine, reference in zip(ours, theirs, strict=True):
        reference = torch.zeros_like(mine) if reference is None else reference
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def wkv_by_a_loop(made, x, real, starts):
    """The slow, obvious reference, read before it is written, in floating point."""
    k, v = x.chunk(2, -1)
    z, bonus = torch.exp(-torch.exp(made.time_decay)), made.time_first.exp()
    num = den = torch.zeros_like(k[:, 0])
    result = []
    for t in range(x.shape[1]):
        new = starts[:, t, None]
        num, den, e = num.masked_fill(new, 0), den.masked_fill(new, 0), k[:, t].exp()
        result.append((num + bonus * e * v[:, t]) / (den + bonus * e))
        here = real[:, t, None]
        num, den = torch.where(here, z * num + e * v[:, t], num), torch.where(here, z * den + e, den)
    return torch.stack(result, 1).masked_fill(~real[..., None], 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 23])
def test_padding_and_packing_in_the_memory_are_those_of_a_loop_forwards_and_backwards(length, dtype):
    made, x = memory(dtype), torch.randn(3, length, 12, dtype=dtype)
    real, starts = torch.rand(3, length) < 0.7, torch.rand(3, length) < 0.2
    weights = torch.randn(3, length, 6, dtype=dtype)
    found = []
    for evaluate in (made, lambda *inputs: [wkv_by_a_loop(made, *inputs)]):
        inputs = x.clone().requires_grad_()
        wkv = evaluate(inputs, None, real, starts)[0] if evaluate is made else evaluate(inputs, real, starts)[0]
        wkv = wkv.masked_fill(~real[..., None], 0)
        (wkv * weights).sum().backward()
        found.append([wkv.detach(), inputs.grad, *(p.grad for p in made.parameters())])
        made.zero_grad()
    same(*found)


@given(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_the_memory_runs_backwards_bit_for_bit(batch, length, padded, seed):
    torch.manual_seed(seed)
    dtype = (torch.float32, torch.float64)[seed % 2]
    made, words = memory(dtype), Words()
    x = 5 * torch.randn(batch, length, 12, dtype=dtype)  # Some keys are beyond the largest.
    x[:, :3, 6:] *= 1e6  # And some values.
    real = torch.rand(batch, length) < 0.7 if padded else None
    before = made(x.flip(1), words=words)[1]
    kept = words.nbytes
    wkv, after, _ = made(x, before, real, words=words)
    again, undone, _ = made(x, after, real, words=words, backwards=True)
    assert torch.equal(undone, before) and torch.equal(again, wkv) and words.nbytes == kept
    assert wkv.isfinite().all()


def test_the_memory_goes_no_way_back_over_the_start_of_a_sequence():
    with pytest.raises(ValueError, match="over the start of a sequence"):
        memory()(torch.zeros(1, 2, 12), None, None, torch.ones(1, 2), words=Words(), backwards=True)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_scan_by_which_transformers_rwkv_is_trained_is_its_loop(length):
    made, x = memory(torch.float32), torch.randn(3, length, 12)
    weights = torch.randn(3, length, 6)
    found = []
    for evaluate in (by_a_scan, rwkv_linear_attention_cpu):
        inputs = x.clone().requires_grad_()
        wkv, _ = evaluate(made.time_decay, made.time_first, *inputs.chunk(2, -1))
        (wkv * weights).sum().backward()
        found.append([wkv.detach(), inputs.grad, *(p.grad for p in made.parameters())])
        made.zero_grad()
    same(*found)


IMPORTED_IN_ANOTHER_MODE = """
import sys, torch
torch.set_default_dtype(torch.float16)
with torch.inference_mode():
    import modeling_stateful_gpt
torch.set_default_dtype(torch.float32)
from modeling_stateful_gpt import GateLoopForCausalLM
for folder in sys.argv[1:]:
    model = GateLoopForCausalLM.from_pretrained(folder).train()
    ids = torch.arange(40)[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    print(loss.item(), model.model.embed_tokens.weight.grad.abs().sum().item())
"""


OURS = {"modeling_stateful_gpt", *(file.stem for file in (Path(__file__).parents[1] / "training").glob("*.py"))}


def test_a_model_computes_the_same_whatever_mode_the_package_was_imported_in(tmp_path):
    expected, folders, ids = [], [], torch.arange(40)[None]
    for layer_types, form in ((["reversible", "rwkv"], "additive"), (["reversible"], "forgetting")):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": len(layer_types)}
        config = GateLoopConfig(**sizes, layer_types=layer_types, reversible_form=form, initializer_range=0.3)
        model = GateLoopForCausalLM(config).train()
        folders.append(str(tmp_path / form))
        model.save_pretrained(folders[-1])
        loss = model(ids, labels=ids).loss
        loss.backward()
        expected += [loss.item(), model.model.embed_tokens.weight.grad.abs().sum().item()]
    seen = run_fresh("-c", IMPORTED_IN_ANOTHER_MODE, *folders)
    assert [float(number) for number in seen.split()] == pytest.approx(expected, rel=1e-5)


def test_no_file_keeps_a_tensor_that_was_made_when_it_was_imported():
    """It would be of the type, on the device and in the mode that the caller had set."""

    def tensors(value, depth=3):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        if isinstance(value, type) and value.__module__.split(".")[0] in OURS:
            parts = list(vars(value).values())
        return [tensor for part in parts for tensor in tensors(part, depth - 1)] if depth else []

    package = Path(__file__).parents[1] / "modeling_stateful_gpt"
    for name in (*OURS, *(f"modeling_stateful_gpt.{file.stem}" for file in package.glob("*.py"))):
        importlib.import_module(name)
    files = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OURS}
    assert {"modeling_stateful_gpt.reversible", "modeling_stateful_gpt.unbounded", "train"} <= set(files)
    assert not [name for name, module in files.items() if tensors(dict(vars(module)))]
