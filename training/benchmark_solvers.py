"""How the solvers reach the states that stepping gives, on a trained model and real text.

    python training/train.py --preset stateful --num_hidden_layers 4 --block_size 1024 \\
        --per_device_train_batch_size 4 --max_steps 1000 --output_dir runs/long
    python training/benchmark_solvers.py runs/long

For each solver, a JSON line with the passes that single texts take, and one for each batch size with how much faster it
is than stepping (with keys and values in a cache): the two run in turn in one process, and the ratio is taken pair by
pair. `error` is how far the states are from the stepped ones: the largest difference of an element, in units of its
state's root mean square. Draws the error against passes, and along the sequence. Close everything else.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import matplotlib
import torch
from benchmark import paired_ratio
from data import load_corpus, read_text, sample_blocks, token_blocks
from tqdm.auto import tqdm
from train import RunError, load_model, load_tokenizer, run_command
from transformers import PreTrainedModel

from modeling_stateful_gpt import solvers
from modeling_stateful_gpt.generation_gateloop import position_limit
from modeling_stateful_gpt.recurrence import LanguageModelRecurrence

matplotlib.use("Agg")
from matplotlib import pyplot

BLOCK = 16
"""Positions that make one point of the picture."""


def error(states: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`[B, T]`: the largest difference of an element at each position, in units of the state's root mean square."""
    return (states - exact).abs().amax(-1) / exact.square().mean(-1).sqrt()


def count(model: PreTrainedModel, texts: torch.Tensor, solver: str) -> dict:
    """The passes that each of the `texts` `[N, T]` takes alone, if the solver never steps, and the largest error."""
    patience, solvers.PATIENCE = solvers.PATIENCE, texts.shape[1]
    passes, errors = [], []
    for ids in tqdm(texts.split(1), desc=f"{solver}, {model.config.num_groups} groups", leave=False):
        solved = model.model(ids, solver=solver, use_cache=False)
        exact = model.model(ids, solver="sequential", use_cache=False).last_hidden_state
        passes.append(solved.passes)
        errors.append(error(solved.last_hidden_state, exact).max().item())
    solvers.PATIENCE = patience
    return {
        "passes": statistics.median(passes),
        "least": min(passes),
        "most": max(passes),
        "error": float(f"{max(errors):.2g}"),
    }


def measure(model: PreTrainedModel, ids: torch.Tensor, solver: str, name: str, pairs: int) -> dict:
    """How many times as fast as stepping, over the batch `ids`, and what the solver did."""
    solved = model.model(ids, solver=solver, use_cache=False)
    exact = model.model(ids, solver="sequential", use_cache=False).last_hidden_state
    stepping, solving = (partial(model.model, ids, solver=s, use_cache=False) for s in ("sequential", solver))
    ratio = paired_ratio(stepping, solving, pairs, name)
    return {
        "times_as_fast_as_stepping": ratio["ratio"],
        "min": ratio["min"],
        "max": ratio["max"],
        "ms": ratio["reference_ms"],
        "passes": solved.passes,
        "stepped_from": solved.stepped_from,
        "error": float(f"{error(solved.last_hidden_state, exact).max():.2g}"),
    }


def errors_by_pass(model: PreTrainedModel, ids: torch.Tensor, num_groups: int, passes: int) -> torch.Tensor:
    """`[passes, T]`, the largest over the batch."""
    embeds = model.get_input_embeddings()(ids)
    recurrence = LanguageModelRecurrence(model.model.backbone, model.model.feedback, embeds)
    exact = model.model(ids, solver="sequential", use_cache=False).last_hidden_state
    every = solvers.cyclic(recurrence, passes, num_groups=num_groups).pass_hidden_states
    return torch.stack([error(states, exact).amax(0) for states in every])


def draw(model: PreTrainedModel, ids: torch.Tensor, groups: list[int], passes: int, path: Path) -> None:
    figure, (against_passes, along) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for num_groups in groups:
        errors = errors_by_pass(model, ids, num_groups, passes)
        name = "Jacobi" if num_groups == 1 else f"cyclic, {num_groups} groups"
        (line,) = against_passes.semilogy(range(1, passes + 1), errors.amax(1).clamp(min=1e-7), label=name, linewidth=2)
        if num_groups in (1, 8):
            for number, style in zip((2, 4, 8), ("-", "--", ":"), strict=True):
                if number > passes:
                    continue
                blocks = errors[number - 1].unfold(0, BLOCK, BLOCK).amax(-1).clamp(min=1e-7)
                along.semilogy(
                    torch.arange(len(blocks)) * BLOCK,
                    blocks,
                    style,
                    color=line.get_color(),
                    label=f"{name}, pass {number}",
                )
    against_passes.axhline(1e-4, color="grey", linewidth=0.8)
    label = "largest |Δh|, in units of the state's RMS"
    against_passes.set(xlabel="passes", ylabel=label, title="error against stepping")
    along.set(xlabel="position in the sequence", ylabel=label, title="where it sits")
    for axes in (against_passes, along):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def flat(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text_file", nargs="+", help="default: the default validation text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--texts", type=int, default=8, help="for which passes are counted")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="1 is Jacobi")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--passes", type=int, default=40, help="in the picture")
    parser.add_argument("--picture", type=Path, default=Path("solvers.png"))
    arguments = parser.parse_args()
    for option in ("batch_sizes", "texts", "groups", "pairs", "passes"):
        if min(flat(getattr(arguments, option))) < 1:
            raise RunError(f"--{option} must be at least 1.")
    if arguments.length < BLOCK:
        raise RunError(f"--length must be at least {BLOCK}.")
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(arguments.checkpoint).eval(), load_tokenizer(arguments.checkpoint)
    if getattr(model.config, "feedback", None) is None:
        raise RunError(f"{arguments.checkpoint} has no feedback: there is nothing to solve.")
    limit = position_limit(model.config.get_text_config())
    if limit is not None and arguments.length > limit:
        raise RunError(f"--length {arguments.length} is more than the model's max_position_embeddings ({limit}).")
    model.config.decode_mode = "solved"
    files = arguments.text_file
    documents = [read_text(Path(name)) for name in files] if files else load_corpus().validation
    largest = max(*arguments.batch_sizes, arguments.texts)
    blocks = sample_blocks(token_blocks(documents, tokenizer, arguments.length), largest)
    if len(blocks) < largest:
        raise RunError(
            f"The text has only {len(blocks)} blocks of {arguments.length} tokens; lower --batch_sizes and --texts."
        )
    ids = torch.tensor(blocks["input_ids"])
    texts = ids[: arguments.texts]
    sizes = {"hidden_size": model.config.hidden_size, "num_hidden_layers": model.config.num_hidden_layers}
    print(json.dumps({**sizes, "torch": torch.__version__, "threads": torch.get_num_threads()}))
    for model.config.num_groups in arguments.groups:
        solver = "jacobi" if model.config.num_groups == 1 else "cyclic"
        name = {"solver": solver, "groups": model.config.num_groups}
        print(json.dumps({**name, "texts": len(texts), **count(model, texts, solver)}), flush=True)
        for batch in arguments.batch_sizes:
            what = f"{solver}, {model.config.num_groups} groups, batch {batch}"
            measured = measure(model, ids[:batch], solver, what, arguments.pairs)
            print(json.dumps({**name, "batch": batch, **measured}), flush=True)
    draw(model, ids[:1], arguments.groups, min(arguments.passes, arguments.length), arguments.picture)
    print(f"Drawn: {arguments.picture}")


if __name__ == "__main__":
    run_command(main)
