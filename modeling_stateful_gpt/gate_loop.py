"""The GateLoop recurrence as pure functions (Katsch 2023, arXiv 2311.01927, section 3).

    S_t = a_t S_{t-1} + k_t ⊗ v_t,    y_t = q_t · Re(S_t),    a_t = exp(g_t + i·phase_t)

Three evaluations of the same equation, with the layouts of flash-linear-attention:

- `recurrent_gate_loop`, a loop over the sequence: the reference, and a step of decoding;
- `scan_gate_loop`, all states by a blocked scan: best for narrow heads, whose state is a few numbers;
- `chunk_gate_loop`, matrix products within chunks and a scan over chunks: best for wide heads.

`gate_loop` picks one. All take

- `q`, `k`: `[B, T, H, K]`; `v`: `[B, T, H, V]`;
- `g`: the log of the transition's magnitude, at most 0, `[B, T, H]`; −∞ forgets all of the past;
- `phase`: the transition's angle, `[B, T, H]`, in radians; or a boolean tensor, True where the transition is negative;
  or None, where it is positive. In the last two cases the state is real;
- `initial_state`: S before the first position, `[B, H, K, V]`; None for zeros;

and return `y`, `[B, T, H, V]`, of the type of v, and with `output_final_state` the state after the last position (else
None). They compute in fp32, or in fp64 where an input is fp64, whatever autocast says; the state is of that type, or of
its complex one. Gradients flow to every input but a boolean one, in reverse mode and once: there are no second and no
forward-mode derivatives. What does not fit together raises a ValueError.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from .compat import maybe_autocast
from .linear_scan import linear_scan

try:
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_simple_gla = None

Result = tuple[torch.Tensor, torch.Tensor | None]

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}

SCAN_MAX_STATE = 64
"""K·V up to which the scan, which writes every state to memory, is faster than chunks."""
CHUNK = 64
FORGET = -1000.0
"""What stands for g = −∞ where it is summed: its exponential is zero in every type, its differences are numbers."""


def evaluation(evaluate: Callable) -> Callable[..., Result]:
    """Checks the arguments, has them in one type, and hands back what a caller expects."""

    @functools.wraps(evaluate, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def wrapper(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        phase: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> Result:
        check(q, k, v, g, phase, initial_state)
        turns = phase is not None and phase.dtype != torch.bool
        given = [q, k, v, g, *([phase] if turns else []), *([] if initial_state is None else [initial_state.real])]
        dtype = functools.reduce(torch.promote_types, (z.dtype for z in given), torch.float32)
        state_dtype = COMPLEX[dtype] if turns else dtype
        with maybe_autocast(q.device.type, enabled=False):
            if initial_state is None:
                state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=state_dtype)
            else:
                state = initial_state.to(state_dtype)
            q, k, v_, g = (z.to(dtype) for z in (q, k, v, g))
            y, state = evaluate(q, k, v_, g, phase.to(dtype) if turns else phase, state)
        return y.to(v.dtype), state if output_final_state else None

    del wrapper.__wrapped__  # The signature that help() shows is the wrapper's.
    return wrapper


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    phase: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q and v must be [B, T, H, K] and [B, T, H, V], T at least 1; got {q.shape} and {v.shape}.")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("g", g)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a floating-point type.")
    expected = {
        "k": (k, q.shape),
        "v": (v, (*q.shape[:3], v.shape[-1])),
        "g": (g, q.shape[:3]),
        "phase": (phase, q.shape[:3]),
        "initial_state": (initial_state, (q.shape[0], *q.shape[2:], v.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} is {list(tensor.shape)}; with q {list(q.shape)} it must be {list(shape)}.")
    if initial_state is not None and initial_state.is_complex() and (phase is None or phase.dtype == torch.bool):
        raise ValueError("initial_state is complex; without a phase in radians the state is real.")


def transition(g: torch.Tensor, phase: torch.Tensor | None) -> torch.Tensor:
    """a = exp(g + i·phase), `[B, T, H]`; real where the phase is a sign or None."""
    if phase is None:
        return g.exp()
    if phase.dtype == torch.bool:
        return torch.where(phase, -g.exp(), g.exp())
    magnitude = g.exp()
    return torch.complex(magnitude * phase.cos().to(g.dtype), magnitude * phase.sin().to(g.dtype))


@evaluation
def recurrent_gate_loop(q, k, v, g, phase, state):
    """The recurrence as it is written, one position after the other."""
    a = transition(g, phase)[..., None, None]
    y = []
    for t in range(q.shape[1]):
        state = a[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None]
        y.append((q[:, t, :, None] @ state.real)[:, :, 0])
    return torch.stack(y, dim=1), state


@evaluation
def scan_gate_loop(q, k, v, g, phase, state):
    """All states, elementwise, by `linear_scan`. The backward pass needs the states, T·H·K·V numbers, and no more."""
    states = linear_scan(transition(g, phase)[..., None, None], k[..., None] * v[..., None, :], state)
    return (q[..., None] * states.real).sum(-2), states[:, -1].clone()


@evaluation
def chunk_gate_loop(q, k, v, g, phase, state):
    """Within a chunk, causal attention with the weights `(q_i · k_j) Re(a_{j+1} ⋯ a_i)`; from chunk to chunk, the
    recurrence (the block decomposition of Dao and Gu 2024, arXiv 2405.21060, section 6)."""
    length = q.shape[1]
    # Positions that are appended neither forget nor add.
    q, k, v, g, phase = (in_chunks(z) for z in (q, k, v, g.clamp(min=FORGET), phase))
    g, phase = precise(g).cumsum(-1), sum_of(phase, -1)
    states = states_after_chunks(k, v, g, phase, state)
    before = side_by_side(torch.cat([state[:, None], states[:, :-1]], dim=1))
    y = ChunkRead.apply(turned(q, phase), turned(k, phase), v, g, before)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], states[:, -1].clone()


def states_after_chunks(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, phase: torch.Tensor | None, state: torch.Tensor
) -> torch.Tensor:
    """The states `[B, chunks, H, K, V]` at the ends of the chunks; g and phase are summed within each."""
    to_end = (g[..., -1:] - g).exp().to(k.dtype)[..., None]
    added = turned(k * to_end, phase_to_end(phase)).transpose(-1, -2) @ v
    if state.is_complex():
        added = torch.complex(*added.chunk(2, dim=-2))
    a = transition(g[..., -1], None if phase is None else phase[..., -1])[..., None, None].to(state.dtype)
    return linear_scan(a, added, state)


class ChunkRead(torch.autograd.Function):
    """What queries read: of the state before their chunk, and of the keys and values within it. For each chunk,

        y_i = exp(G_i) q_i · state + Σ_{j ≤ i} exp(G_i - G_j) (q_i · k_j) v_j

    with q and k `[…, CHUNK, K]`, v `[…, CHUNK, V]`, sums of log magnitudes G `[…, CHUNK]` and the state `[…, K, V]`.
    The backward pass computes the weights again, where autograd would keep them several times over.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, state):
        ctx.save_for_backward(q, k, v, g, state)
        y = (q @ state).mul_(g.exp().to(q.dtype)[..., None])
        return y.add_((q @ k.transpose(-1, -2)).mul_(ChunkRead.decay(g, q.dtype)) @ v)

    @staticmethod
    def decay(g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`exp(G_i - G_j)` where j ≤ i, else 0."""
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).triu(1)
        return (g[..., :, None] - g[..., None, :]).to(dtype).masked_fill_(later, -torch.inf).exp_()

    @staticmethod
    def backward(ctx, dy):
        q, k, v, g, state = ctx.saved_tensors
        decay, dy = ChunkRead.decay(g, q.dtype), dy.contiguous()
        dv = (q @ k.transpose(-1, -2)).mul_(decay).transpose(-1, -2) @ dy
        dweights = (dy @ v.transpose(-1, -2)).mul_(decay)
        dk = dweights.transpose(-1, -2) @ q
        dq = dweights @ k
        del decay, dweights
        dy = dy * g.exp().to(dy.dtype)[..., None]
        dq += dy @ state.transpose(-1, -2)
        # G_i scales all that q_i reads, and -G_j what is read of k_j within the chunk.
        dg = (torch.linalg.vecdot(q, dq) - torch.linalg.vecdot(k, dk)).to(g.dtype)
        return dq, dk, dv, dg, q.transpose(-1, -2) @ dy


@evaluation
def fused_gate_loop(q, k, v, g, phase, state):
    """`chunk_gate_loop` by a kernel of flash-linear-attention."""
    phase = sum_of(phase, 1)
    y, state = chunk_simple_gla(
        turned(q, phase),
        turned(k, phase),
        v,
        g.clamp(min=FORGET),
        scale=1.0,
        initial_state=side_by_side(state),
        output_final_state=True,
    )
    return y, turned_back(state, None if phase is None else phase[:, -1])


def in_chunks(z: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, T, H, …]` → `[B, chunks, H, CHUNK, …]`, with zeros behind."""
    if z is None:
        return None
    if missing := -z.shape[1] % CHUNK:
        z = pad(z, (0, 0) * (z.ndim - 2) + (0, missing))
    return z.unflatten(1, (-1, CHUNK)).transpose(2, 3).contiguous()


def precise(z: torch.Tensor) -> torch.Tensor:
    """For sums whose differences matter: fp64, where the device has it."""
    return z if z.device.type == "mps" else z.double()


# A recurrence with phases is one without: with Φ_t = phase_1 + … + phase_t, `exp(-iΦ_t) S_t` has the real transition
# exp(g_t) and the input `exp(-iΦ_t) k_t ⊗ v_t`, and is read by `exp(iΦ_t) q_t`. Real and imaginary parts stand side by
# side, so that the keys are twice as wide.


def sum_of(phase: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """Φ: the sums of the phases so far along `dim`."""
    if phase is None:
        return None
    return phase.cumsum(dim) % 2 == 1 if phase.dtype == torch.bool else precise(phase).cumsum(dim)


def phase_to_end(total: torch.Tensor | None) -> torch.Tensor | None:
    """From each position's Φ on to that at the end of its chunk, `[…, CHUNK]`."""
    if total is None:
        return None
    last = total[..., -1:]
    return total ^ last if total.dtype == torch.bool else last - total


def turned(z: torch.Tensor, phase: torch.Tensor | None) -> torch.Tensor:
    """q or k `[…, K]`, turned by Φ `[…]`; with angles, `[…, 2K]`."""
    if phase is None:
        return z
    if phase.dtype == torch.bool:
        return torch.where(phase[..., None], -z, z)
    cos, sin = phase.cos().to(z.dtype)[..., None], phase.sin().to(z.dtype)[..., None]
    return torch.cat([z * cos, z * sin], dim=-1)


def side_by_side(state: torch.Tensor) -> torch.Tensor:
    """A complex state `[…, K, V]` as turned queries read it, `[…, 2K, V]`; a real one as it is."""
    return torch.cat([state.real, -state.imag], dim=-2) if state.is_complex() else state


def turned_back(state: torch.Tensor, phase: torch.Tensor | None) -> torch.Tensor:
    """The state `[…, K, V]` of the recurrence with phases, whose sum is `phase` `[…]`, from that of the one without."""
    if phase is None:
        return state
    if phase.dtype == torch.bool:
        return torch.where(phase[..., None, None], -state, state)
    real, minus_imag = state.chunk(2, dim=-2)
    turn = torch.complex(phase.cos().to(state.dtype), phase.sin().to(state.dtype))
    return torch.complex(real, -minus_imag) * turn[..., None, None]


def gate_loop(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    phase: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> Result:
    """The recurrence (see the top of this file) by the evaluation that is fastest for these shapes.

    On a GPU, wide heads go through flash-linear-attention's kernel where that package is installed. That path has not
    been measured.
    """
    if q.ndim == 4 and q.shape[1] == 1:
        evaluate = recurrent_gate_loop
    elif q.shape[-1] * v.shape[-1] <= SCAN_MAX_STATE:
        evaluate = scan_gate_loop
    elif chunk_simple_gla is not None and q.is_cuda and q.dtype != torch.float64:
        evaluate = fused_gate_loop
    else:
        evaluate = chunk_gate_loop
    return evaluate(q, k, v, g, phase, initial_state, output_final_state)
