"""Train several presets on the same text, with the same budget and the same data order, and compare them.

    python training/compare.py --presets gpt stateful --output_dir runs/demo

Takes every option of train.py besides its own. Writes one run folder per preset and seed, a line per run in
`comparison.jsonl`, and the picture `comparison.png`; prints a table and a sample of each model. Ctrl-C saves; the same
command again goes on from there.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from evaluate import evaluate
from plot import draw
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from train import PRESETS, RunError, TrainingData, load_model, parse, prepare_data, run_command, train
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from modeling_stateful_gpt import StatefulGPTForCausalLM

# Wide enough for the table where the output is not a terminal.
console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass
class CompareArguments:
    presets: list[str] = field(default_factory=lambda: ["gpt", "stateful"])
    seeds: list[int] = field(default_factory=lambda: [0])
    max_eval_blocks: int = field(default=512, metadata={"help": "Sampled validation blocks for the table."})
    sample_prompt: str = "def "
    sample_tokens: int = 200
    output_dir: str = "runs/comparison"


def compare(arguments: CompareArguments, rest: list[str]) -> list[dict] | None:
    """Returns the records of all runs, or None if interrupted."""
    for preset in arguments.presets:
        if preset not in PRESETS:
            raise RunError(f"There is no preset {preset!r}; choose from {sorted(PRESETS)}.")
    if arguments.max_eval_blocks < 1 or not arguments.sample_prompt:
        raise RunError("--max_eval_blocks must be at least 1, and --sample_prompt not empty.")
    folder = Path(arguments.output_dir)
    records_file = folder / "comparison.jsonl"
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*/run.json")):
        raise RunError(f"{folder} holds something that is not a comparison; use another --output_dir.")
    records = [json.loads(line) for line in records_file.read_text().splitlines()] if records_file.exists() else []
    arms = []
    for seed in arguments.seeds:
        for preset in arguments.presets:
            run = folder / f"{preset}-seed{seed}"
            options = ["--preset", preset, "--seed", str(seed), "--data_seed", str(seed), "--output_dir", str(run)]
            arms.append((run, *parse([*rest, *options])))
    _, model_arguments, data_arguments, _ = arms[0]
    data = cache(lambda: prepare_data(data_arguments, model_arguments.model_name_or_path))
    compared = []
    for run, model_arguments, data_arguments, training_arguments in arms:
        console.rule(run.name)
        results = train(model_arguments, data_arguments, training_arguments, data)
        if results is None:
            return None
        results["max_eval_blocks"] = arguments.max_eval_blocks
        known = [r for r in records if {**r, "bits_per_byte": None} == {**results, "bits_per_byte": None}]
        if known:
            results = known[0]
        else:
            bits = final_evaluation(run, data(), data_arguments.block_size, arguments.max_eval_blocks)
            results["bits_per_byte"] = bits
            with records_file.open("a") as file:
                file.write(json.dumps(results) + "\n")
        compared.append(results)
    return compared


def final_evaluation(run: Path, data: TrainingData, block_size: int, max_blocks: int) -> dict[str, float]:
    """Bits per byte at one pass, at the trained passes, and stepped exactly."""
    model = load_model(str(run))
    trained = model.config.trained_passes() if isinstance(model, StatefulGPTForCausalLM) else 1
    passes = sorted({1, trained})
    results = evaluate(model, data.tokenizer, data.validation_documents, passes, block_size, max_blocks=max_blocks)
    exact = results["exact"]
    return {
        name: results.get(key, exact)["bits_per_byte"]
        for name, key in (("one_pass", "1"), ("trained_passes", str(trained)), ("exact", "exact"))
    }


def show_table(arguments: CompareArguments, records: list[dict]) -> None:
    title = f"Validation bits per byte, mean of seeds {', '.join(map(str, arguments.seeds))} (lower is better)"
    table = Table("model", "parameters", "tokens", "seconds", "one pass", "trained passes", "exact", title=title)
    if len(arguments.seeds) > 1:
        table.add_column("exact, worst seed")
    for preset in arguments.presets:
        runs = [record for record in records if record["preset"] == preset]
        bits = {name: [run["bits_per_byte"][name] for run in runs] for name in runs[0]["bits_per_byte"]}
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        row = [f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}"]
        row.append(f"{sum(seconds) / len(seconds):.0f}" if seconds else "interrupted")
        row += [f"{sum(values) / len(values):.4f}" for values in bits.values()]
        if len(arguments.seeds) > 1:
            row.append(f"{max(bits['exact']):.4f}")
        table.add_row(preset, *row)
    console.print(table)
    console.print("Exact: stepped token by token, as in decoding.")


@torch.no_grad()
def show_samples(arguments: CompareArguments, folder: Path) -> None:
    for preset in arguments.presets:
        run = folder / f"{preset}-seed{arguments.seeds[0]}"
        model = AutoModelForCausalLM.from_pretrained(run).eval()
        tokenizer = AutoTokenizer.from_pretrained(run)
        set_seed(0)
        ids = model.generate(
            **tokenizer(arguments.sample_prompt, return_tensors="pt"),
            max_new_tokens=arguments.sample_tokens,
            do_sample=True,
            temperature=0.7,
        )
        console.print(Panel(tokenizer.decode(ids[0], skip_special_tokens=True), title=preset), markup=False)


def main() -> None:
    (arguments, rest) = HfArgumentParser(CompareArguments, description=__doc__).parse_args_into_dataclasses(
        return_remaining_strings=True
    )
    records = compare(arguments, rest)
    if records is None:
        return
    folder = Path(arguments.output_dir)
    show_table(arguments, records)
    runs = {preset: [record for record in records if record["preset"] == preset] for preset in arguments.presets}
    draw(runs, folder / "comparison.png")
    console.print(f"Loss curves: {folder / 'comparison.png'}")
    show_samples(arguments, folder)
    console.print(f"Each run folder in {folder} is a checkpoint that AutoModelForCausalLM.from_pretrained loads.")


if __name__ == "__main__":
    run_command(main)
