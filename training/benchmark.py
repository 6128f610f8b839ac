"""What the feedback costs: training steps of every kind and decoded tokens, as ratios to the plain model.

    python training/benchmark.py
    python training/benchmark.py --hidden_size 64 --num_hidden_layers 2 --block_size 128 --batch_size 16

Both sides of a ratio run in turn in one process, and the ratio is taken pair by pair, so that it holds when the
machine's speed drifts. One JSON line per ratio: the median, and the smallest and largest pair. Close everything else.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from train import run_command

from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.feedback import FUSIONS
from modeling_stateful_gpt.warm_start import StateStore


def paired_ratio(measured: Callable[[], object], reference: Callable[[], object], pairs: int, what: str) -> dict:
    """How many times as long `measured` takes as `reference`."""
    measured()
    reference()
    ratios, seconds = [], []
    for _ in tqdm(range(pairs), desc=what, leave=False):
        times = []
        for work in (reference, measured):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    return {
        "what": what,
        "ratio": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
        "reference_ms": round(1000 * statistics.median(seconds), 2),
    }


def resident(field: str) -> float:
    """MiB of this process in memory: `VmRSS`, now; `VmHWM`, at most since `reset_peak` (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak() -> None:
    """Sets `VmHWM` back to what is in use."""
    Path("/proc/self/clear_refs").write_text("5")


def passes(solver: str, with_gradient: int, without: int = 0, **more) -> dict:
    return {"training_solver": solver, "num_passes": with_gradient, "num_no_grad_passes": without, **more}


MODES: dict[str, dict] = {
    "1 pass, plain": passes("jacobi", 1),
    "token shift": passes("jacobi", 1, feedback_source="embedding"),
    "2 passes": passes("jacobi", 2),
    "2 passes, gradient through the last": passes("jacobi", 1, 1),
    "3 passes": passes("jacobi", 3),
    "3 passes, gradient through the last": passes("jacobi", 1, 2),
    "2 cyclic passes": passes("cyclic", 2),
    "3 cyclic passes": passes("cyclic", 3),
    "3 cyclic passes, gradient through the last": passes("cyclic", 1, 2),
    "warm start": passes("jacobi", 1),
    "warm start, 2 passes": passes("jacobi", 2),
    "token by token": passes("sequential", 1),
}
"""Fields of `StatefulGPTConfig` for each way to train."""

DECODING = "decoding"


def model(feedback: str | None, decoder: dict, **config) -> StatefulGPTForCausalLM:
    torch.manual_seed(0)
    return StatefulGPTForCausalLM(StatefulGPTConfig(text_config=GateLoopConfig(**decoder), feedback=feedback, **config))


def training_steps(feedback: str, mode: str, arguments: argparse.Namespace) -> dict:
    """A step (forward, backward, AdamW) against a plain one. That of a warm start reads its states from a file and
    writes them to another."""
    batch, length, width = arguments.batch_size, arguments.block_size, arguments.hidden_size
    ids = torch.randint(0, 256, (batch, length))
    start = torch.arange(batch) * length
    sizes = {"hidden_size": width, "num_hidden_layers": arguments.num_hidden_layers, "max_position_embeddings": length}
    steps = []
    with TemporaryDirectory() as folder:
        for kind in (feedback, None):
            network = model(kind, sizes, **MODES[mode]).train()
            optimizer = torch.optim.AdamW(network.parameters())
            store = None
            if kind and mode.startswith("warm"):
                store = StateStore(folder, num_tokens=ids.numel(), width=width)
                store.write(0, start, torch.randn(batch, length, width))

            def step(network=network, optimizer=optimizer, store=store) -> None:
                optimizer.zero_grad()
                states = None if store is None else store.read(1, start, length).float()
                outputs = network(ids, labels=ids, use_cache=False, initial_states=states)
                outputs.loss.backward()
                optimizer.step()
                if store is not None:
                    store.write(1, start, outputs.states)

            steps.append(step)
        measured, reference = steps
        return paired_ratio(measured, reference, arguments.pairs, f"training step, {feedback}, {mode}")


def decoding(feedback: str, pairs: int, tokens: int = 64) -> dict:
    """Greedy decoding of `tokens` tokens through `generate()`: width 512, 6 layers, batch 1, a prompt of 1 token."""
    prompt = torch.zeros(1, 1, dtype=torch.long)
    runs = []
    for kind in (feedback, None):
        network = model(kind, {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}).eval()

        def run(network=network) -> None:
            network.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        runs.append(run)
    measured, reference = runs
    return paired_ratio(measured, reference, pairs, f"decoding {tokens} tokens, {feedback}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--modes", nargs="+", default=[*MODES, DECODING], choices=[*MODES, DECODING])
    parser.add_argument("--feedback", nargs="+", default=[*FUSIONS], choices=[*FUSIONS])
    of_steps = parser.add_argument_group("of the training steps")
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "block_size": 256, "batch_size": 8}
    for name, value in sizes.items():
        of_steps.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in sizes}
    for name in ("pairs", *sizes):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    try:
        model(None, {name: chosen[name] for name in ("hidden_size", "num_hidden_layers")})
    except StrictDataclassError as error:
        parser.error(str(error.__cause__ or error))
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **chosen}))
    for feedback in arguments.feedback:
        for mode in arguments.modes:
            if mode == DECODING:
                result = decoding(feedback, arguments.pairs)
            else:
                result = training_steps(feedback, mode, arguments)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_command(main)
