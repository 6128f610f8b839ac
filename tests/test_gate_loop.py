"""Three evaluations of the GateLoop recurrence, held to a loop that is written out here."""

import inspect
from itertools import product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import MANY, few
from torch.utils.checkpoint import checkpoint

import modeling_stateful_gpt.gate_loop as module
from modeling_stateful_gpt.gate_loop import (
    chunk_gate_loop,
    fused_gate_loop,
    gate_loop,
    recurrent_gate_loop,
    scan_gate_loop,
)
from modeling_stateful_gpt.linear_scan import linear_scan, linear_scan_backward

EVALUATIONS = {"recurrent": recurrent_gate_loop, "scan": scan_gate_loop, "chunk": chunk_gate_loop, "picked": gate_loop}
KINDS = ["complex", "signed", "positive"]
every_evaluation = pytest.mark.parametrize("evaluation", EVALUATIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = ["q", "k", "v", "g", "phase", "initial_state"]


def inputs(batch, length, heads, key, value, kind, dtype=torch.float64, seed=0):
    """Random arguments by name, magnitudes from 1e-4 to 1. Drawn in fp32, so that both types see the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    magnitude = 1e-4 ** torch.rand(batch, length, heads, generator=generator) ** 4
    state = normal(batch, heads, key, value)
    return {
        "q": normal(batch, length, heads, key),
        "k": normal(batch, length, heads, key),
        "v": normal(batch, length, heads, value),
        "g": magnitude.log().to(dtype),
        "phase": {"complex": 3 * normal(batch, length, heads), "signed": normal(batch, length, heads) > 0}.get(kind),
        "initial_state": torch.complex(state, normal(batch, heads, key, value)) if kind == "complex" else state,
    }


def loop(q, k, v, g, phase, initial_state):
    """The definition, in fp64."""
    state, y = initial_state, []
    for t in range(q.shape[1]):
        a = g[:, t].exp()
        if phase is not None and phase.dtype == torch.bool:
            a = a * (1 - 2 * phase[:, t].double())
        elif phase is not None:
            a = a * torch.exp(1j * phase[:, t])
        state = a[:, :, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        y.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.real))
    return torch.stack(y, 1), state


def results(evaluate, arguments, dtype):
    """y, the final state and the gradient of every input, of a loss that depends on all of y and the state."""
    arguments = {
        name: z if z is None or z.dtype == torch.bool else z.to(dtype.to_complex() if z.is_complex() else dtype)
        for name, z in arguments.items()
    }
    variables = [z.requires_grad_() for z in arguments.values() if z is not None and z.dtype != torch.bool]
    y, state = evaluate(**arguments)
    parts = [y, state.real, state.imag] if state.is_complex() else [y, state]
    parts = torch.cat([part.flatten() for part in parts])
    weights = torch.randn(parts.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, state, *torch.autograd.grad((parts * weights).sum(), variables)]


def assert_close(actual, expected, tolerance):
    """Relative to the size of the whole tensor."""
    for a, b in zip(actual, expected, strict=True):
        error = (a.to(b.dtype) - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert error <= tolerance, float(error)
        assert torch.isfinite(torch.view_as_real(a) if a.is_complex() else a).all()


def with_state(evaluate):
    return lambda **arguments: evaluate(**arguments, output_final_state=True)


def check(evaluation, arguments):
    expected = results(loop, arguments, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        assert_close(results(with_state(EVALUATIONS[evaluation]), arguments, dtype), expected, tolerance)


evaluations, kinds = st.sampled_from(sorted(EVALUATIONS)), st.sampled_from(KINDS)


@MANY
@given(
    evaluations, kinds, st.integers(1, 2), st.integers(1, 150), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)
)
def test_every_evaluation_is_the_loop_forward_and_backward(evaluation, kind, batch, length, heads, key, value):
    check(evaluation, inputs(batch, length, heads, key, value, kind))


SIZES = [(4099, 3, 1, 1), (4099, 1, 8, 3), (997, 2, 16, 32), (321, 1, 64, 64), (64, 2, 64, 1)]


@pytest.mark.parametrize(
    "evaluation,kind,size",
    few(
        product(EVALUATIONS, KINDS, SIZES),
        [("scan", "complex", SIZES[0]), ("chunk", "complex", SIZES[2]), ("chunk", "signed", SIZES[3])]
        + [("picked", kind, SIZES[4]) for kind in KINDS],
    ),
)
def test_long_sequences_and_wide_heads(evaluation, kind, size):
    length, heads, key, value = size
    check(evaluation, inputs(1, length, heads, key, value, kind))


@MANY
@given(evaluations, kinds, st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([1, 3, 16]))
def test_in_pieces_is_at_once(evaluation, kind, pieces, size):
    evaluate, arguments = EVALUATIONS[evaluation], inputs(2, sum(pieces), 2, size, size, kind)
    y, final_state = evaluate(**arguments, output_final_state=True)
    state, parts = arguments.pop("initial_state"), []
    split = [z.split(pieces, 1) if z is not None else [None] * len(pieces) for z in arguments.values()]
    for piece in zip(*split, strict=True):
        part, state = evaluate(*piece, initial_state=state, output_final_state=True)
        parts.append(part)
    assert_close([torch.cat(parts, 1), state], [y, final_state], 1e-10)


@every_evaluation
@every_kind
def test_without_an_initial_state_it_starts_from_zeros_and_without_asking_returns_none(evaluation, kind):
    arguments = inputs(2, 70, 2, 3, 4, kind)
    arguments["initial_state"] = torch.zeros_like(arguments["initial_state"])
    expected, _ = loop(**arguments)
    del arguments["initial_state"]
    y, state = EVALUATIONS[evaluation](**arguments)
    assert_close([y], [expected], 1e-10)
    assert state is None


@every_kind
@pytest.mark.parametrize("evaluation,size", [("scan", 1), ("chunk", 4)])
def test_phases_and_long_memories_stay_accurate_over_65536_positions(evaluation, size, kind):
    arguments = inputs(1, 65536, 2, size, size, kind)
    arguments["g"] *= 0
    if kind == "complex":
        arguments["phase"] = arguments["phase"].abs()  # so that their sum grows, to about 150,000
    arguments.pop("initial_state")
    q, k, v, _, phase = arguments.values()
    total = torch.zeros_like(q[..., 0])
    if kind != "positive":
        total = (phase.double() * (torch.pi if kind == "signed" else 1)).cumsum(1)

    def summed(angle):
        """Without forgetting, the recurrence is a sum in a frame that turns."""
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[..., None, None]
        state = (turn.conj() * k[..., None] * v[..., None, :]).cumsum(1)
        return (q[..., None] * (turn * state).real).sum(-2)

    expected = summed(total)
    y, _ = EVALUATIONS[evaluation](**{name: None if z is None else z.float() if z.dtype != torch.bool else z
                                      for name, z in arguments.items()})  # fmt: skip
    assert_close([y], [expected], 1e-4)
    if kind == "complex":
        naive = (summed(phase.float().cumsum(1)) - expected).abs().max() / expected.abs().max()
        assert naive > 1e-3


@MANY
@given(evaluations, kinds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([-9.2, -1e3, -torch.inf]))
@example("scan", "complex", torch.float32, -torch.inf)
@example("chunk", "complex", torch.float32, -torch.inf)
@example("chunk", "signed", torch.float64, -torch.inf)
def test_nothing_overflows_and_what_is_forgotten_leaves_no_trace(evaluation, kind, dtype, forgets):
    arguments = inputs(1, 150, 2, 3, 3, kind, dtype)
    arguments["g"] = torch.zeros_like(arguments["g"])
    arguments["g"][:, 40:110] = forgets
    check(evaluation, arguments)
    if forgets > -1e3:
        return
    changed = {name: None if z is None else z.clone() for name, z in arguments.items()}
    for name in ("q", "k", "v"):
        changed[name][:, :40] += 1
    changed["initial_state"] += 1
    tails = [EVALUATIONS[evaluation](**kwargs)[0][:, 40:] for kwargs in (arguments, changed)]
    assert torch.equal(*tails)


@every_evaluation
@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_are_computed_in_fp32(evaluation, kind, autocast):
    arguments = inputs(2, 130, 2, 4, 4, kind, torch.float32)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].bfloat16()
    expected, expected_state = loop(
        **{n: z if z is None or z.dtype == torch.bool or z.is_complex() else z.double() for n, z in arguments.items()}
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = EVALUATIONS[evaluation](**arguments, output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == (torch.complex64 if kind == "complex" else torch.float32)
    assert_close([state], [expected_state], 1e-5)
    assert_close([y], [expected], 2**-8)


@pytest.mark.parametrize(
    "kind,evaluation,size",
    few(product(KINDS, ["scan"], [2]), [("complex", "scan", 2)])
    + few(product(KINDS, ["chunk"], [16]), [("signed", "chunk", 16)]),
)
def test_compiled_and_checkpointed_it_computes_the_same(evaluation, size, kind):
    evaluate, arguments = with_state(EVALUATIONS[evaluation]), inputs(1, 130, 2, size, size, kind)
    expected = results(evaluate, arguments, torch.float64)
    compiled = torch.compile(evaluate, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, arguments, torch.float64), expected, 1e-10)
    recomputed = results(lambda **a: checkpoint(evaluate, **a, use_reentrant=False), arguments, torch.float64)
    assert_close(recomputed, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 21, 3), (1, 1, 2), pytest.param((1, 70, 1), marks=pytest.mark.exhaustive)])
def test_the_scan_is_a_proper_operator_with_the_right_gradients(dtype, shape):
    torch.manual_seed(0)
    for a_shape in (shape, (*shape[:-1], 1)):
        arguments = [torch.randn(s, dtype=dtype).requires_grad_() for s in (a_shape, shape, (shape[0], shape[2]))]
        torch.library.opcheck(linear_scan, arguments)
        assert torch.autograd.gradcheck(linear_scan, arguments)
    real = torch.randn(shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear_scan, [arguments[0], real, arguments[2]])


@pytest.mark.parametrize(
    "dtype,permuted",
    few(
        product([torch.float64, torch.complex128], ["a", "x", "initial", "grad", "h"]),
        [(torch.float64, "x"), (torch.complex128, "a"), (torch.complex128, "grad")],
    ),
)
def test_compilers_are_told_the_layout_of_the_results_whatever_that_of_the_inputs(dtype, permuted):
    torch.manual_seed(0)
    shapes = {"a": (2, 9, 3, 4), "x": (2, 9, 3, 4), "initial": (2, 3, 4), "grad": (2, 9, 3, 4), "h": (2, 9, 3, 4)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    shape = shapes[permuted]
    tensors[permuted] = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
    a, x, initial, grad, h = tensors.values()
    torch.library.opcheck(linear_scan, [z.requires_grad_() for z in (a, x, initial)])
    for x_is_real in (False, True):
        torch.library.opcheck(linear_scan_backward, [grad, a.detach(), initial.detach(), h, x_is_real])


@pytest.mark.parametrize("kind", ["complex", "positive"])
def test_the_backward_pass_of_the_scan_keeps_the_states_and_nothing_in_between(kind):
    length, heads = 2048, 8
    arguments = inputs(1, length, heads, 1, 1, kind, torch.float32)
    kept = {}

    def note(z):
        kept[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
        return z

    variables = {n: z.requires_grad_() if z is not None else None for n, z in arguments.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda z: z):
        scan_gate_loop(**variables)
    state = 4 * length * heads * (2 if kind == "complex" else 1)
    # The states and the transitions, the five inputs (real), and what exp, cos and sin keep of themselves.
    assert sum(kept.values()) <= 2 * state + 9 * 4 * length * heads + 1000


@every_kind
def test_phases_can_be_left_to_a_kernel_without_phases(kind, monkeypatch):
    """`fused_gate_loop` has only a GPU kernel to call; here the loop stands in, with that kernel's signature."""

    def kernel(q, k, v, g, scale, initial_state, output_final_state):
        assert scale == 1.0 and output_final_state
        return loop(q, k, v, g, None, initial_state)

    monkeypatch.setattr(module, "chunk_simple_gla", kernel)
    arguments = inputs(2, 33, 2, 3, 4, kind)
    expected = results(loop, arguments, torch.float64)
    assert_close(results(with_state(fused_gate_loop), arguments, torch.float64), expected, 1e-10)


@pytest.mark.parametrize(
    "name,shape,message",
    [
        ("q", (2, 5, 3), r"q and v must be \[B, T, H, K\]"),
        ("q", (2, 0, 3, 4), r"T at least 1"),
        ("q", (5,), r"q and v must be"),
        ("k", (2, 5, 3, 5), r"k is \[2, 5, 3, 5\]; with q \[2, 5, 3, 4\] it must be \[2, 5, 3, 4\]"),
        ("v", (2, 5, 1, 2), r"v is .* must be \[2, 5, 3, 2\]"),
        ("g", (2, 5, 3, 4), r"g is .* must be \[2, 5, 3\]"),
        ("phase", (2, 5), r"phase is .* must be \[2, 5, 3\]"),
        ("initial_state", (2, 3, 2, 4), r"initial_state is .* must be \[2, 3, 4, 2\]"),
    ],
)
@every_evaluation
def test_shapes_that_do_not_fit_are_named(evaluation, name, shape, message):
    arguments = inputs(2, 5, 3, 4, 2, "complex")
    arguments[name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        EVALUATIONS[evaluation](**arguments)


def test_all_evaluations_have_the_same_signature():
    assert {str(inspect.signature(evaluate)) for evaluate in EVALUATIONS.values()} == {
        str(inspect.signature(gate_loop))
    }


@every_evaluation
def test_one_fp64_input_makes_all_fp64_and_a_complex_state_needs_phases(evaluation):
    arguments = inputs(1, 5, 2, 3, 3, "complex", torch.float32)
    for name in ("g", "phase", "initial_state"):
        z = arguments[name]
        wide = {**arguments, name: z.to(torch.complex128 if z.is_complex() else torch.float64)}
        assert EVALUATIONS[evaluation](**wide, output_final_state=True)[1].dtype == torch.complex128
    with pytest.raises(ValueError, match="initial_state is complex; without a phase in radians the state is real"):
        EVALUATIONS[evaluation](**{**arguments, "phase": None})


def test_jax_computes_the_same_from_the_same_numbers():
    """The operator as JAX users write it: an associative scan over (transition, input) pairs."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jnp = jax.numpy
    arguments = inputs(2, 37, 3, 4, 2, "complex", torch.float32)
    del arguments["initial_state"]
    q, k, v, g, phase = (jnp.asarray(z.numpy()) for z in arguments.values())

    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def operator(q, k, v, g, phase):
        a = jnp.exp(g + 1j * phase)[..., None, None] * jnp.ones((1, 1, 1, k.shape[-1], v.shape[-1]))
        kv = jnp.einsum("bthk,bthv->bthkv", k, v).astype(a.dtype)
        _, states = jax.lax.associative_scan(combine, (a, kv), axis=1)
        return jnp.einsum("bthk,bthkv->bthv", q, states.real)

    expected, pull_back = jax.vjp(operator, q, k, v, g, phase)
    variables = {name: z.requires_grad_() for name, z in arguments.items()}
    for evaluate in EVALUATIONS.values():
        y, _ = evaluate(**variables)
        gradients = torch.autograd.grad(y, list(variables.values()), torch.ones_like(y))
        theirs = [expected, *pull_back(jnp.ones_like(expected))]
        assert_close([y, *gradients], [torch.from_numpy(jax.device_get(z).copy()) for z in theirs], 1e-5)
