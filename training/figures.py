"""The figures and tables of docs/how-it-works.md.

    python training/figures.py
    python training/figures.py --only contraction reversible

Trains a GPT and a Stateful GPT, each of two layers, for a few minutes in total, or takes those that an earlier run has
left in `--models`. Then makes the parts one after the other: a picture in `figures` beside the page, and a table
between two markers in the page. Ctrl-C saves; the same command again goes on from there.
"""

import argparse
import copy
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from benchmark_solvers import error, errors_by_pass
from benchmark_unbounded import floating_drift
from data import sample_blocks
from tqdm.auto import tqdm
from train import load_model, parse, prepare_data, run_command, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_stateful_gpt.fixed_point import Words
from modeling_stateful_gpt.gate_loop import chunk_gate_loop, gate_loop, recurrent_gate_loop, scan_gate_loop
from modeling_stateful_gpt.recurrence import LanguageModelRecurrence
from modeling_stateful_gpt.reversible import FORMS, ReversibleCell
from modeling_stateful_gpt.solvers import cyclic, relative_change

matplotlib.use("Agg")
from matplotlib import path as paths
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch

OPTIONS = ["--hidden_size=64", "--num_hidden_layers=2", "--block_size=128", "--max_train_bytes=1000000"]
OPTIONS += ["--max_steps=500"]
SENTENCE = "My dog has fleas"
COLOURS = pyplot.get_cmap("viridis")
Table = list[list[str]]


@dataclass
class Trained:
    gpt: PreTrainedModel
    stateful: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: torch.Tensor
    """`[8, 128]`, which neither model has seen."""


def trained(folder: Path) -> Trained:
    """The two models; trains what is not finished."""
    data = cache(lambda: prepare_data(parse([*OPTIONS, "--output_dir", str(folder)])[1]))
    models = []
    for preset in ("gpt", "stateful"):
        if train(*parse([*OPTIONS, "--preset", preset, "--output_dir", str(folder / preset)]), data) is None:
            sys.exit(1)
        models.append(load_model(str(folder / preset)).eval())
    blocks = sample_blocks(data().validation, 8)
    gpt, stateful = models
    return Trained(gpt, stateful, data().tokenizer, torch.tensor(blocks["input_ids"]))


def save(figure: pyplot.Figure, path: Path) -> None:
    """As a short SVG, to a hundredth of a point, whose bytes are the same for the same numbers."""
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    pyplot.close(figure)
    svg = re.sub(r"(\d+\.\d\d)\d{3,}", r"\1", text.getvalue())
    path.write_text(re.sub(r"M (\S+) (\S+) \nL (\S+) \2 \nL \3 (\S+) \nL \1 \4 \nz\n", r"M\1 \2H\3V\4H\1z", svg))


def squares(axes: Axes, values: np.ndarray, levels: list[float], top: int = 0) -> None:
    """Draws a matrix `[rows, columns]`, row `top` above, in a colour from each of the `levels` on; NaN is left out."""
    level = np.where(np.isnan(values), 0, np.digitize(values, levels))
    for number, colour in enumerate(COLOURS(np.linspace(0, 1, len(levels))), start=1):
        boxes = []
        for row, line in enumerate(level, start=top):
            edges = np.flatnonzero(np.diff(np.pad((line == number).astype(int), 1)))
            for left, right in edges.reshape(-1, 2) - 0.5:  # Squares side by side are drawn as one.
                corners = [(left, row - 0.5), (right, row - 0.5), (right, row + 0.5), (left, row + 0.5), (0, 0)]
                boxes.append(paths.Path(corners, closed=True))
        if boxes:
            axes.add_patch(PathPatch(paths.Path.make_compound_path(*boxes), facecolor=colour, edgecolor="none"))
        axes.plot([], [], "s", color=colour, label=f"from {levels[number - 1]:g}")
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(top + len(values) - 0.5, top - 0.5))


def scale(models: Trained, figures: Path) -> Table:
    """What 1/√d does to the weights of 64 random keys."""
    table = [["d", "std of q·k", "largest weight of softmax(q·k)", "std of q·k/√d", "… of softmax(q·k/√d)"]]
    for d in (4, 16, 64, 256):
        set_seed(0)
        scores = torch.einsum("bd,bkd->bk", torch.randn(1000, d), torch.randn(1000, 64, d))
        cells = [(s.std().item(), s.softmax(-1).amax(-1).mean().item()) for s in (scores, scores / d**0.5)]
        table.append([str(d), *(f"{number:.2f}" for pair in cells for number in pair)])
    return table


def attention(models: Trained, figures: Path) -> Table:
    """The weights of the last layer, each byte's in the picture and each word's in the table."""
    models.gpt.set_attn_implementation("eager")
    ids = torch.tensor([models.tokenizer(SENTENCE)["input_ids"]])
    weights = models.gpt(ids, output_attentions=True, use_cache=False).attentions[-1][0]
    figure, axes = pyplot.subplots(1, len(weights), figsize=(12, 3.6), layout="constrained", sharey=True)
    letters = [character.replace(" ", "␣") for character in SENTENCE]
    for head, (panel, values) in enumerate(zip(axes, weights.numpy(), strict=True), start=1):
        future = np.triu(np.ones_like(values, dtype=bool), 1)
        squares(panel, np.where(future, np.nan, values), [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
        panel.set(title=f"head {head}", aspect="equal", xlabel="is read", ylabel="reads" if head == 1 else "")
        panel.set_xticks(range(len(letters)), letters)
        panel.set_yticks(range(len(letters)), letters)
    axes[0].legend(fontsize=7, title="weight", title_fontsize=7)
    save(figure, figures / "attention.svg")
    # A space belongs to the word behind it.
    word = torch.tensor([SENTENCE[: i + 1].count(" ") for i in range(len(SENTENCE))])
    member = torch.nn.functional.one_hot(word).float()
    equal = torch.ones_like(weights[0]).tril()
    by_word = [
        member.T / member.sum(0)[:, None] @ w @ member for w in (weights.mean(0), equal / equal.sum(-1)[:, None])
    ]
    names = SENTENCE.split()
    table = [["reads ↓, is read →", *names]]
    for i, name in enumerate(names):
        cells = [f"{by_word[0][i, j]:.2f} ({by_word[1][i, j]:.2f})" if j <= i else "0" for j in range(len(names))]
        table.append([name, *cells])
    return table


def losses(models: Trained, figures: Path) -> Table:
    """Of the trained model, in bits per byte, after so many passes and stepped."""
    table = [["passes", "1", "2", "3", "4", "6", "stepped"]]
    for solver in ("jacobi", "cyclic"):
        ways: list[dict] = [{"num_passes": n, "solver": solver} for n in (1, 2, 3, 4, 6)] + [{"solver": "sequential"}]
        nats = [models.stateful(models.texts, labels=models.texts, use_cache=False, **way).loss.item() for way in ways]
        table.append([solver, *(f"{n / np.log(2):.3f}" for n in nats)])
    return table


def passes(models: Trained, figures: Path) -> Table:
    """How far each state is from the stepped one, by pass and position: the worst of four texts."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    table = [
        [
            "",
            "error after 3 passes",
            "after 6",
            "after 12",
            "passes until the error is below 1e-4",
            "until all is exact",
        ]
    ]
    for panel, groups in zip(axes, (1, 4, 8), strict=True):
        errors = errors_by_pass(models.stateful, models.texts[:4], groups, 48)
        blocks = errors[:36].unfold(1, 4, 4).amax(-1)
        squares(panel, blocks.numpy(), [0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1], top=1)
        name = "Jacobi" if groups == 1 else f"cyclic, {groups} groups"
        panel.set(title=name, xlabel="position")
        panel.set_xticks(range(0, 32, 8), range(0, 128, 32))
        exact = errors.shape[1] // groups + (groups > 1)
        cells = [*(f"{errors[n - 1].max():.0e}" for n in (3, 6, 12)), settled(errors.amax(1).tolist()), str(exact)]
        table.append([name, *cells])
    axes[0].set(ylabel="pass")
    axes[-1].legend(fontsize=8, title="error", title_fontsize=8, loc="lower right")
    save(figure, figures / "passes.svg")
    return table


def settled(errors: list[float], first: int = 1) -> str:
    """The pass from which on all are below 1e-4, where the first of them is of pass `first`."""
    return str(first + max((i + 1 for i, off in enumerate(errors) if off >= 1e-4), default=0))


def residuals(model: PreTrainedModel, ids: torch.Tensor, groups: int, number: int) -> list[float]:
    """The largest change of an element in each pass from the second on."""
    recurrence = LanguageModelRecurrence(model.model.backbone, model.model.feedback, model.get_input_embeddings()(ids))
    every = cyclic(recurrence, number, num_groups=groups).pass_hidden_states
    pairs = zip(every[1:], every[:-1], strict=True)
    return [relative_change(after, before, recurrence.real).max().item() for after, before in pairs]


def contraction(models: Trained, figures: Path) -> Table:
    """What passes do where the value that the fusion makes of the state is multiplied by a factor."""
    ids = models.texts[:1]
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    table = [["factor", "residual of pass 4", "of pass 8", "of pass 32", "below 1e-4 from pass", "… cyclic"]]
    table[0] += ["the solver `jacobi`", "`cyclic` from stepping, fp64", "… fp32"]
    for factor, shade in ((0.25, 0), (0.5, 0.3), (1, 0.6), (4, 0.8), (64, 0.95)):
        model, single = copy.deepcopy(models.stateful).double(), copy.deepcopy(models.stateful)
        for z in (*model.model.feedback.value.parameters(), *single.model.feedback.value.parameters()):
            z.mul_(factor)
        changes = residuals(model, ids, 1, ids.shape[1] + 1)
        heights = np.clip(changes, 1e-15, None)
        axes.semilogy(range(2, len(changes) + 2), heights, color=COLOURS(shade), label=f"factor {factor}")
        needed = [settled(changes, first=2), settled(residuals(model, ids, 8, 18), first=2)]
        jacobi = model.model(ids, solver="jacobi", use_cache=False)
        needed.append(f"{jacobi.passes} passes" if jacobi.stepped_from is None else f"steps from {jacobi.stepped_from}")
        for network in (model, single):
            solved, exact = (network.model(ids, solver=name, use_cache=False) for name in ("cyclic", "sequential"))
            needed.append(f"{error(solved.last_hidden_state, exact.last_hidden_state).max():.0e}")
        table.append([str(factor), *(f"{changes[n - 2]:.0e}" for n in (4, 8, 32)), *needed])
    axes.set(xlabel="Jacobi pass", ylabel="residual")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, figures / "contraction.svg")
    return table


def chunks(models: Trained, figures: Path) -> Table:
    """How far each evaluation of GateLoop is from a loop in fp64, and with which weights it reads the past."""
    table = [["T", "loop, fp32", "scan, fp32", "chunks, fp32", "scan, fp64", "chunks, fp64"]]
    for length in (64, 256, 1024, 4096):
        set_seed(0)
        q, k, v = torch.randn(3, 1, length, 4, 16, dtype=torch.float64).unbind()
        g = torch.nn.functional.logsigmoid(2 + torch.randn(1, length, 4, dtype=torch.float64))
        inputs = (q, k, v, g, torch.randn(1, length, 4, dtype=torch.float64))
        exact, _ = recurrent_gate_loop(*inputs)
        single = [z.float() for z in inputs]
        results = [evaluate(*single)[0] for evaluate in (recurrent_gate_loop, scan_gate_loop, chunk_gate_loop)]
        results += [evaluate(*inputs)[0] for evaluate in (scan_gate_loop, chunk_gate_loop)]
        table.append([f"{length:,}", *(f"{((y - exact).norm() / exact.norm()).item():.0e}" for y in results)])
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
    ones, identity = torch.ones(1, 32, 1, 1), torch.eye(32)[None, :, None]
    set_seed(0)
    g, phase = torch.nn.functional.logsigmoid(2 + torch.randn(1, 32, 1)), 0.4 * torch.randn(1, 32, 1)
    for panel, angle, name in zip(axes, (None, phase), ("positive transitions", "complex transitions"), strict=True):
        weights = gate_loop(ones, ones, identity, g, angle)[0][0, :, 0].numpy()
        future = np.triu(np.ones_like(weights, dtype=bool), 1)
        squares(panel, np.where(future, np.nan, weights), [-1, -0.3, -0.1, -0.01, 0.01, 0.1, 0.3, 0.6])
        for border in range(8, 32, 8):
            panel.plot([-0.5, border - 0.5, border - 0.5], [border - 0.5, border - 0.5, 31.5], "w", linewidth=1)
        panel.set(title=name, xlabel="position j, written", aspect="equal")
    axes[0].set(ylabel="position i, reads")
    axes[1].legend(fontsize=8, title="Re(a_{j+1} ⋯ a_i)", title_fontsize=8, loc="upper right")
    save(figure, figures / "gateloop.svg")
    return table


def reversible(models: Trained, figures: Path) -> Table:
    """How far a state is from where it began, after so many steps and back."""
    lengths, table = [10, 100, 1000, 10_000], [["steps and back"]]
    table += [[f"{length:,}"] for length in lengths]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for form in FORMS:
        table[0] += [f"{form}: values that differ", "bits kept, per step and unit"]
        for row, steps in zip(table[1:], lengths, strict=True):
            set_seed(0)
            cell, words = ReversibleCell(64, 32, form), Words()
            x, start = torch.randn(1, steps, 64), cell.initial_state(1)
            _, state, _ = cell(x, start, words=words)
            bits = 8 * words.nbytes / (steps * 64)
            _, state, _ = cell(x, state, words=words, backwards=True)
            row += [str(state.ne(start).sum().item()), f"{bits:.2f}"]
    set_seed(0)
    cell = ReversibleCell(64, 32)
    for dtype in (torch.float32, torch.float64):
        _, errors = floating_drift(cell, dtype, lengths[-1])
        name = str(dtype).removeprefix("torch.")
        axes.loglog(lengths, errors, "o-", color=COLOURS(0.2 if name == "float32" else 0.7), label=name)
        table[0].append(f"{name}: error")
        for row, off in zip(table[1:], errors, strict=True):
            row.append(f"{off:.0e}")
    axes.axhline(1e-19, color="black", label="fixed point: 0")
    axes.set(xlabel="steps forwards and back", ylabel="largest error of the state")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, figures / "reversible.svg")
    return table


PARTS: dict[str, Callable[[Trained, Path], Table]] = {
    part.__name__: part for part in (scale, attention, losses, passes, contraction, chunks, reversible)
}


def write_table(page: Path, name: str, table: Table) -> None:
    """Puts the table between its markers in the page; a kill leaves the page as it was or as it will be."""
    begin, end = f"<!-- training/figures.py wrote this: {name} -->\n", "<!-- to here -->"
    before, rest = page.read_text().split(begin)
    lines = [f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:])]
    new = page.with_name(f"{page.name}.new")
    new.write_text(before + begin + "\n".join(lines) + "\n" + rest[rest.index(end) :])
    new.replace(page)


@torch.no_grad()
def make(models: Trained, names: list[str], page: Path) -> None:
    figures = page.parent / "figures"
    figures.mkdir(exist_ok=True)
    for name in tqdm(names):
        write_table(page, name, PARTS[name](models, figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/figures"), help="where the trained models are")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "how-it-works.md")
    parser.add_argument("--only", nargs="+", default=[*PARTS], choices=[*PARTS])
    arguments = parser.parse_args()
    pyplot.rcParams.update({"svg.hashsalt": "figures", "svg.fonttype": "none", "font.size": 10})
    make(trained(arguments.models), arguments.only, arguments.page)


if __name__ == "__main__":
    run_command(main)
