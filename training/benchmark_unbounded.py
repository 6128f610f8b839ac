"""What it takes to train over long documents: exactness, memory and time, on this machine's CPU.

    python training/benchmark_unbounded.py drift     # a state run forwards and backwards, in fixed and floating point
    python training/benchmark_unbounded.py memory    # peak memory of a training step against the document's length
    python training/benchmark_unbounded.py time      # seconds per token against storing everything

JSON lines, and a picture for the first two. The ways to compute the gradient of a document are `unbounded` (see
`unbounded.py`), `stored` (plain backpropagation through time), `checkpointed` (it in √T pieces of √T tokens, of which
only the states between them are stored and the rest computed again, Chen et al. 2016, arXiv 1604.06174) and
`truncated`. Peak memory is that of one step in a process of its own, above what the process took before it. Close
everything else.
"""

import argparse
import json
import math
import multiprocessing
from functools import partial
from pathlib import Path

import matplotlib
import torch
from benchmark import paired_ratio, reset_peak, resident
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from train import RunError, load_model, run_command
from transformers import set_seed

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM
from modeling_stateful_gpt.fixed_point import FRACTION_BITS, Words
from modeling_stateful_gpt.reversible import FORMS, ReversibleCell, soften
from modeling_stateful_gpt.unbounded import Batch, backward_through_time, truncated_backward

matplotlib.use("Agg")
from matplotlib import pyplot

WIDTH, DEPTH, CHUNK = 64, 2, 1000
DECODERS: dict[str, dict] = {
    "reversible": {"layer_types": ["reversible"] * DEPTH},
    "forgetting": {"layer_types": ["reversible"] * DEPTH, "reversible_form": "forgetting"},
    "gateloop": {"layer_types": ["gateloop"] * DEPTH},
}


def decoder(name: str) -> GateLoopForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "hidden_dropout": 0.1}
    return GateLoopForCausalLM(GateLoopConfig(**sizes, **DECODERS[name])).train()


def stored(model: GateLoopForCausalLM, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    batch = Batch(model, ids, ids, chunk_size, None, None)
    layers = batch.layers()
    loss = torch.stack([batch.read(start, layers) for start in batch.starts]).sum()
    loss.backward()
    return loss.detach()


def checkpointed(model: GateLoopForCausalLM, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    batch = Batch(model, ids, ids, math.isqrt(ids.shape[1]), None, None)

    def piece(start: int, *before: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        layers = batch.layers()
        for layer, state, carrier in zip(layers, before[::2], before[1::2], strict=True):
            layer.state, layer.carrier = state, carrier
        loss = batch.read(start, layers)
        return loss, *(z for layer in layers for z in (layer.state, getattr(layer, "carrier", None)))

    states: tuple[torch.Tensor | None, ...] = (None,) * (2 * DEPTH)
    losses = []
    for start in batch.starts:
        loss, *states = checkpoint(piece, start, *states, use_reentrant=False)
        losses.append(loss)
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach()


def unbounded(model: GateLoopForCausalLM, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    return backward_through_time(model, ids, ids, chunk_size)


def truncated(model: GateLoopForCausalLM, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    return truncated_backward(model, ids, ids, chunk_size)


WAYS = {way.__name__: way for way in (unbounded, stored, checkpointed, truncated)}


def peak_memory(name: str, way: str, length: int) -> dict:
    """Of one training step, in MiB; in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, way, length))


def _peak_memory(name: str, way: str, length: int) -> dict:
    torch.set_num_threads(1)
    model = decoder(name)
    # What a first step takes for good is not of the document.
    WAYS[way](model, torch.randint(256, (1, CHUNK)), CHUNK)
    model.zero_grad()
    ids = torch.randint(256, (1, length))
    before = resident("VmRSS")
    reset_peak()
    WAYS[way](model, ids, CHUNK)
    peak = resident("VmHWM")
    return {
        "peak_MiB": round(peak - before, 1),
        "process_MiB": round(peak, 1),
        "input_MiB": round(ids.nbytes / 2**20, 2),
    }


def memory(arguments: argparse.Namespace) -> None:
    cases = [("reversible", way) for way in ("unbounded", "stored", "checkpointed")]
    cases += [("forgetting", "unbounded"), ("gateloop", "unbounded")]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, way in cases:
        lengths = [n for n in arguments.lengths if way == "unbounded" or n <= arguments.longest_stored]
        found = []
        for length in lengths:
            measured = peak_memory(name, way, length)
            found.append(measured["peak_MiB"])
            print(json.dumps({"layers": name, "way": way, "T": length, **measured}), flush=True)
        axes.loglog(lengths, found, "o-", label=f"{name}, {way}")
    axes.set(xlabel="T, tokens of the document", ylabel="peak memory of a training step, MiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.picture, dpi=150)


def time(arguments: argparse.Namespace) -> None:
    for name in DECODERS:
        model, ids = decoder(name), torch.randint(256, (1, arguments.length))
        for way in ("unbounded", "checkpointed", "truncated"):
            what = f"{name}, {way} against stored, T = {arguments.length}"
            measured, reference = (partial(WAYS[kind], model, ids, CHUNK) for kind in (way, "stored"))
            print(json.dumps(paired_ratio(measured, reference, arguments.pairs, what)), flush=True)


@torch.no_grad()
def drift(arguments: argparse.Namespace) -> None:
    """Bits that differ after running forwards and backwards, and how far states of floating point come off."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    cells: dict[str, ReversibleCell] = {}
    for form in FORMS:
        model = load_model(arguments.checkpoint[form]) if form in arguments.checkpoint else None
        set_seed(0)
        cell = ReversibleCell(WIDTH, WIDTH // 2, form) if model is None else model.model.layers[0].mixer.cell
        if cell.form is not FORMS[form]:
            raise RunError(f"The first layer of {arguments.checkpoint[form]} is not of the {form} form.")
        cells[form] = cell
        words, state = Words(), cell.initial_state(1)
        pieces = [torch.Generator().manual_seed(n) for n in range(math.ceil(arguments.steps / CHUNK))]
        inputs = [partial(torch.randn, 1, CHUNK, cell.x_proj.in_features, generator=g) for g in pieces]
        for piece in tqdm(inputs, desc=f"{form}, forwards", leave=False):
            _, state, _ = cell(piece(), state, words=words)
        stored_bits, far = 8 * words.nbytes, state
        for generator, (seed, piece) in zip(reversed(pieces), reversed(list(enumerate(inputs))), strict=True):
            generator.manual_seed(seed)
            _, state, _ = cell(piece(), state, words=words, backwards=True)
        differing = (state ^ cell.initial_state(1)).ne(0).sum().item() + words.nbytes
        steps = len(inputs) * CHUNK
        report = {
            "form": form,
            "trained": form in arguments.checkpoint,
            "steps": steps,
            "words_that_differ": differing,
            "largest_state": round((far[:, :, 0].abs().max() * 2.0**-FRACTION_BITS).item(), 2),
            "bits_per_step_and_unit": round(stored_bits / (steps * 2 * cell.state_size), 4),
        }
        print(json.dumps(report), flush=True)
    for dtype in (torch.float32, torch.float64):
        lengths, errors = floating_drift(cells["additive"], dtype, arguments.steps)
        axes.loglog(lengths, errors, label=str(dtype).removeprefix("torch."))
        print(json.dumps({"dtype": str(dtype), "steps": lengths[-1], "error": errors[-1]}), flush=True)
    axes.axhline(1e-17, color="black", label="fixed point: 0")
    axes.set(xlabel="steps forwards and back", ylabel="largest error of the state")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.picture, dpi=150)


def floating_drift(cell: ReversibleCell, dtype: torch.dtype, steps: int) -> tuple[list[int], list[float]]:
    """How far an additive state of floating point is from where it began, after so many steps and back."""
    x_proj, weight = cell.x_proj.weight.to(dtype), cell.state_weight.to(dtype)

    def update(other: torch.Tensor, a: torch.Tensor, half: int) -> torch.Tensor:
        q, p = (a + weight[half] @ soften(other)).chunk(2)
        return q.tanh() * p.sigmoid()

    lengths = [*(10**n for n in range(1, 7) if 10**n < steps), steps]
    errors = []
    for length in tqdm(lengths, desc=str(dtype), leave=False):
        first = second = torch.zeros(cell.state_size, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(length, x_proj.shape[1], generator=generator).to(dtype) @ x_proj.T
        inputs += cell.x_proj.bias.to(dtype)
        for a in inputs:
            a1, a2 = a.chunk(2)
            first = first + update(second, a1, 0)
            second = second + update(first, a2, 1)
        for a in inputs.flip(0):
            a1, a2 = a.chunk(2)
            second = second - update(first, a2, 1)
            first = first - update(second, a1, 0)
        errors.append(max(first.abs().max().item(), second.abs().max().item()))
    return lengths, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("drift")
    command.add_argument("--steps", type=int, default=1_000_000)
    command.add_argument("--additive", help="a checkpoint whose first layer is of that form; default: random weights")
    command.add_argument("--forgetting")
    command.add_argument("--picture", type=Path, default=Path("drift.png"))
    command.set_defaults(run=drift)
    command = commands.add_parser("memory")
    command.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 10_000, 16_384, 100_000, 1_000_000])
    command.add_argument("--longest_stored", type=int, default=16_384)
    command.add_argument("--picture", type=Path, default=Path("memory.png"))
    command.set_defaults(run=memory)
    command = commands.add_parser("time")
    command.add_argument("--length", type=int, default=4096)
    command.add_argument("--pairs", type=int, default=5)
    command.set_defaults(run=time)
    arguments = parser.parse_args()
    if arguments.run is drift:
        given = {"additive": arguments.additive, "forgetting": arguments.forgetting}
        arguments.checkpoint = {form: path for form, path in given.items() if path}
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
