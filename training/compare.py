"""Train several arms on the same text, with the same budget and the same data order, and compare them.

    python training/compare.py --arms gpt stateful --output_dir runs/demo
    python training/compare.py --arms gpt 'gpt --dropout 0.2' 'warm_start --dropout 0.2' --seeds 0 1 2 --patience 5 …

An arm is a preset and options of its own; all other options of train.py are for every arm. The budget is `--max_steps`,
`--max_seconds` or `--patience`. An arm may start from what an earlier one has left for the same seed, and what that has
cost is added to its own: 'stateful --model_name_or_path {output_dir}/gpt-seed{seed} --max_steps 100', or without a
preset, to stay what it is. It reads the text in another order than arms from scratch.

Writes a run folder per arm and seed (the arm, with `-` for whatever is no letter, digit, dot or `_`), a line per
evaluation as soon as it is made in `evaluations.jsonl`, a line per finished run in `comparison.jsonl`, the table
`comparison.md` and the picture `comparison.png`; prints the table and a sample of each model. Ctrl-C saves; the same
command again goes on from there.
"""

import copy
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from errors import Diverged, RunError, trying
from evaluate import evaluate
from peft import PeftModel
from plot import draw
from records import append_record, read_records
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from train import (
    PRESETS,
    DataArguments,
    ModelArguments,
    TrainArguments,
    TrainingData,
    check_folder,
    check_place,
    checked_model,
    checked_trainer,
    load_model,
    load_tokenizer,
    parse,
    prepare_data,
    run_command,
    settings_of,
    train,
    warm_start,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from modeling_stateful_gpt import StatefulGPTForCausalLM
from modeling_stateful_gpt.generation_gateloop import position_limit
from modeling_stateful_gpt.warm_start import above

# Wide enough for the table where the output is not a terminal.
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass
class CompareArguments:
    arms: list[str] = field(
        default_factory=lambda: ["gpt", "stateful"],
        metadata={"help": "Presets, each with options of its own; differences are to the first arm."},
    )
    seeds: list[int] = field(default_factory=lambda: [0])
    max_eval_blocks: int = field(default=512, metadata={"help": "Sampled validation blocks for the table."})
    sample_prompt: str = "def "
    sample_tokens: int = 200
    output_dir: str = "runs/comparison"


@dataclass
class Run:
    arm: str
    seed: int
    folder: Path
    model: ModelArguments
    data: DataArguments
    training: TrainArguments


def run_folder(output_dir: str, arm: str, seed: int) -> Path:
    return Path(output_dir, f"{re.sub(r'[^A-Za-z0-9_.]+', '-', arm).strip('-')}-seed{seed}")


@contextmanager
def naming(arm: str) -> Iterator[None]:
    """Says of which arm an error is."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{arm!r}: {error}") from error


def plan(arguments: CompareArguments, rest: list[str]) -> list[Run]:
    """All runs, for each seed every arm in its turn. `rest` are the options of train.py for every arm.

    Raises:
        RunError: an unknown preset, arms that cannot be told apart or that differ in their data, a wrong option.
    """
    runs = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            try:
                words = shlex.split(arm)
            except ValueError as error:
                raise RunError(f"{arm!r} is not a preset and its options ({error}).") from error
            if words and words[0].startswith("--"):
                preset, own = [], words
            elif words and words[0] in PRESETS:
                preset, own = ["--preset", words[0]], words[1:]
            else:
                raise RunError(f"There is no preset {' '.join(words[:1])!r}; choose from {sorted(PRESETS)}.")
            names = {word.split("=")[0].replace("-", "_") for word in [*rest, *own] if word.startswith("--")}
            if fixed := names & {"__preset", "__seed", "__data_seed", "__output_dir"}:
                raise RunError(
                    f"Leave out --{fixed.pop()[2:]}: an arm begins with its preset, the seeds are those of --seeds, "
                    f"and each run has a folder of its own in the --output_dir of all."
                )
            own = [o.replace("{seed}", str(seed)).replace("{output_dir}", arguments.output_dir) for o in own]
            folder = run_folder(arguments.output_dir, arm, seed)
            given = [*preset, "--seed", str(seed), "--output_dir", str(folder)]
            with naming(arm):
                run = Run(arm, seed, folder, *parse([*rest, *own, *given]))
            if not preset and not run.model.model_name_or_path:
                raise RunError(f"{arm!r} has no preset, nor does it go on from anything (--model_name_or_path).")
            # In the order of its start, what goes on would read again what that has just read.
            run.training.data_seed = seed + 1000 if run.model.model_name_or_path else seed
            runs.append(run)
    if len({run.folder for run in runs}) < len(runs):
        raise RunError("Each arm and each seed can be there only once: their run folders would be the same.")
    for run in runs:
        # How the same text is cut into examples may differ.
        cut = {name: getattr(run.data, name) for name in ("random_offsets", "context", "chunk_size")}
        if asdict(run.data) != {**asdict(runs[0].data), **cut}:
            raise RunError(f"{run.arm!r} has data of its own; give what is to be read to all arms.")
    return runs


class WriteEvaluations(TrainerCallback):
    """Appends a line to `evaluations.jsonl` as soon as an evaluation is made. Where a run was killed and went on from a
    checkpoint, the evaluations in between are there twice."""

    def __init__(self, run: Run, data: Callable[[], TrainingData]):
        self.run, self.data = run, data

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.is_world_process_zero:
            line = {"arm": self.run.arm, "seed": self.run.seed, "step": state.global_step}
            line |= {name: metrics[name] for name in ("tokens", "train_seconds", "eval_loss")}
            line["bits_per_byte"] = metrics["eval_loss"] / math.log(2) / self.data().report["bytes_per_token"]
            append_record(self.run.folder.parent / "evaluations.jsonl", line)


def compare(arguments: CompareArguments, rest: list[str]) -> list[dict] | None:
    """Returns the records of all runs but those that diverged, or None if interrupted."""
    if arguments.max_eval_blocks < 1 or arguments.sample_tokens < 1 or not arguments.sample_prompt:
        raise RunError("--max_eval_blocks and --sample_tokens must be at least 1, and --sample_prompt not empty.")
    runs = plan(arguments, rest)
    folder = Path(arguments.output_dir)
    records_file = folder / "comparison.jsonl"
    check_place(folder)
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*/run.json")):
        raise RunError(f"{folder} holds something that is not a comparison; use another --output_dir.")
    records = read_records(records_file)
    # Blocks, if any arm reads them.
    first = next((run for run in runs if run.data.context == "blocks"), runs[0])
    data = cache(lambda: prepare_data(first.data, runs[0].model.model_name_or_path))
    check(runs, data, arguments)
    compared = []
    diverged: set[Path] = set()
    for run in runs:
        console.rule(run.folder.name)
        if source := source_of(run, diverged):
            console.print(f"Left out: it goes on from {source.name}, which diverged.", markup=False)
            diverged.add(run.folder)
            continue
        try:
            results = train(run.model, run.data, run.training, data, [WriteEvaluations(run, data)])
        except Diverged as error:
            console.print(f"{run.arm!r}, seed {run.seed}, diverged: {error}", markup=False)
            diverged.add(run.folder)
            continue
        if results is None:
            return None
        results = {"arm": run.arm, **results, "max_eval_blocks": arguments.max_eval_blocks}
        if known := [record for record in records if without_evaluation(record) == without_evaluation(results)]:
            results = known[0]
        else:
            results["bits_per_byte"] = final_evaluation(run, data(), arguments.max_eval_blocks)
            append_record(records_file, results)
        compared.append(results)
    return compared


def check(runs: list[Run], data: Callable[[], TrainingData], arguments: CompareArguments) -> None:
    """Says what is wrong with the last arm before hours are spent on the first.

    Raises:
        RunError: a folder that holds something else; of what is not finished, a run that could not begin, an arm that
            goes on from one after it, a checkpoint with another tokenizer than the first arm's, or too long a sample.
    """
    folders = {run.folder for run in runs}
    sources = {run.folder: source_of(run, folders) for run in runs}
    earlier: set[Path] = set()
    models: dict[Path, PreTrainedModel] = {}
    for run in runs:
        check_folder(run.folder, settings_of(run.model, run.data, run.training))
        start, source = run.model.model_name_or_path, sources[run.folder]
        if source and source not in earlier:
            raise RunError(f"{run.arm!r} goes on from {start}, which no arm before it leaves; change their order.")
        earlier.add(run.folder)
        if (run.folder / "results.json").exists():
            with naming(run.arm), trying(f"{run.folder} is damaged"):
                check_sample(AutoConfig.from_pretrained(run.folder), data().tokenizer, arguments)
            if run.folder in sources.values():
                models[run.folder] = load_model(str(run.folder))
            continue
        # What an arm leaves has the tokenizer of all.
        with naming(run.arm):
            base = copy.deepcopy(models[source]) if source else load_model(start) if start else None
        other = start and not source and not run.data.tokenizer_name
        if other and load_tokenizer(start).get_vocab() != data().tokenizer.get_vocab():
            raise RunError(
                f"{run.arm!r} goes on from {start}, which has another tokenizer than {runs[0].arm!r}. Let the first "
                f"arm go on from it too, or name one for all arms (--tokenizer_name)."
            )
        with naming(run.arm):
            model = checked_model(run.model, run.data, run.training, data().tokenizer, base)
            check_sample(model.config, data().tokenizer, arguments)
            check_beginning(run, data(), model, above(Path(arguments.output_dir).absolute().parent))
        if run.folder in sources.values():
            models[run.folder] = model.merge_and_unload() if isinstance(model, PeftModel) else model


def check_beginning(run: Run, data: TrainingData, model: PreTrainedModel, disk: Path) -> None:
    """Raises a RunError for a run that could not begin. `disk`: a folder that is where the run's will be."""
    training = copy.copy(run.training)
    with trying("use another --output_dir"), TemporaryDirectory(dir=disk) as training.output_dir:
        checked_trainer(run.model, run.data, training, data, model)


def check_sample(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, arguments: CompareArguments) -> None:
    """Raises a RunError for a sample that is longer than the model can tell positions."""
    limit = position_limit(config.get_text_config())
    length = len(tokenizer(arguments.sample_prompt)["input_ids"]) + arguments.sample_tokens
    if limit is not None and length > limit:
        raise RunError(
            f"the prompt and --sample_tokens are {length} tokens, more than the model's max_position_embeddings "
            f"({limit}); lower --sample_tokens."
        )


def source_of(run: Run, folders: set[Path]) -> Path | None:
    """The run folder in which, or in a checkpoint of which, this run starts."""
    start = run.model.model_name_or_path
    above = [Path(start), *Path(start).parents] if start else []
    return next((path for path in above if path in folders), None)


def without_evaluation(record: dict) -> str:
    """As text, because a loss that is no number is not equal to itself."""
    return json.dumps({**record, "bits_per_byte": None}, sort_keys=True)


def final_evaluation(run: Run, data: TrainingData, max_blocks: int) -> dict[str, float | None]:
    """Bits per byte at one pass, at the trained passes, and of the exact recurrence."""
    model = load_model(str(run.folder)).to(run.training.device)
    warm = warm_start(run.model)
    stateful = isinstance(model, StatefulGPTForCausalLM)
    in_passes = stateful and model.config.training_solver != "sequential" and not warm
    in_passes = in_passes and model.config.trained_passes() is not None
    trained = model.config.trained_passes() if in_passes else 1
    key = str(trained) if in_passes else "exact"
    results = evaluate(
        model,
        data.tokenizer,
        data.validation_documents,
        sorted({1, trained}),
        run.data.block_size,
        max_blocks=max_blocks,
    )
    bits = {key: result["bits_per_byte"] for key, result in results.items()}
    exact = bits["exact"]
    return {
        # A model without feedback has one pass, which is exact.
        "one_pass": bits.get("1", exact),
        "trained_passes": None if warm else bits.get(key, exact),
        "exact": exact,
    }


def paired_difference(values: list[float], baseline: list[float]) -> str:
    """The mean of the differences of runs with the same seed and, from two seeds on, its standard error."""
    differences = np.subtract(values, baseline)
    mean = f"{differences.mean():+.4f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {differences.std(ddof=1) / math.sqrt(len(differences)):.4f}"


def in_seconds(record: dict, seconds: float) -> float:
    """Bits per byte after `seconds` of training: of the best evaluation until then or, if that is lower, of the line
    from the last of them to the next; nan if there was none until then."""
    trained = [entry for entry in record["log"] if entry["step"] > 0]
    before = record.get("before", {}).get("seconds", 0.0)
    # With --max_seconds, every run ends with the step that goes beyond them, which takes another time in each arm.
    begun = [before + (entry["train_seconds"] - before) * (1 - 1 / entry["step"]) for entry in trained]
    losses = [entry["eval_loss"] for entry, start in zip(trained, begun, strict=True) if start <= seconds]
    if losses:
        times = [entry["train_seconds"] for entry in trained]
        between = np.interp(seconds, times, [entry["eval_loss"] for entry in trained])
        losses += [between] if math.isfinite(between) else []  # What diverges later has not yet.
    return np.min(losses or [math.nan]) / math.log(2) / record["data"]["bytes_per_token"]


def tabulate(arguments: CompareArguments, records: list[dict]) -> list[list[str]]:
    """The heading and a row for each arm."""
    several = len(arguments.seeds) > 1
    first = arguments.arms[0]
    heading = ["arm", "parameters", "tokens", "seconds", "one pass", "trained passes", "exact"]
    heading += ["every seed", "worst seed"] if several else []
    rows = [[*heading, f"difference to {first}", "… in the same seconds"]]
    baseline = [record for record in records if record["arm"] == first]
    for arm in arguments.arms:
        runs = [record for record in records if record["arm"] == arm]
        bits = {name: [run["bits_per_byte"][name] for run in runs] for name in runs[0]["bits_per_byte"]}
        exact = bits["exact"]
        row = [arm, f"{runs[0]['parameters']:,}"]
        row += [f"{np.mean([run[name] for run in runs]):,.0f}" for name in ("tokens", "seconds")]
        row += ["" if None in values else f"{np.mean(values):.4f}" for values in bits.values()]
        if several:
            row += [" ".join(f"{value:.4f}" for value in exact), f"{np.max(exact):.4f}"]
        if arm == first:
            rows.append([*row, "", ""])
            continue
        row.append(paired_difference(exact, [run["bits_per_byte"]["exact"] for run in baseline]))
        budgets = [run["seconds"] for run in baseline]
        by_the_clock = (list(map(in_seconds, records_of, budgets)) for records_of in (runs, baseline))
        rows.append([*row, paired_difference(*by_the_clock)])
    return rows


def print_table(rows: list[list[str]], title: str | None = None) -> None:
    """Of which the first is the heading."""
    table = Table(*map(escape, rows[0]), title=title)
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)


def show_table(arguments: CompareArguments, records: list[dict], path: Path) -> None:
    """Prints the table, and writes it to `path` as Markdown."""
    title = f"Validation bits per byte, mean of seeds {', '.join(map(str, arguments.seeds))} (lower is better)"
    notes = (
        "Exact: the recurrence itself, as in decoding. Tokens and seconds: of training, up to the model evaluated. "
        "Difference: its mean over runs of the same seed, and the standard error; in the same seconds: by the "
        "evaluations in training (of --max_eval_samples blocks, not --max_eval_blocks), at the second at which the "
        "first arm has the model evaluated (or, if it was better, before it), nan if there were none."
    )
    if any(record["bits_per_byte"]["trained_passes"] is None for record in records):
        notes += (
            " No trained passes: they start from states of the epoch before, which there are none of for this text."
        )
    heading, *rows = tabulate(arguments, records)
    print_table([heading, *rows], title)
    console.print(notes)
    lines = [heading, ["---"] * len(heading), *rows]
    markdown = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    path.write_text(f"{title}\n\n{markdown}\n\n{notes}\n")


@torch.no_grad()
def show_samples(arguments: CompareArguments, runs: dict[str, list[dict]]) -> None:
    for arm in arguments.arms:
        if not math.isfinite(runs[arm][0]["bits_per_byte"]["exact"]):
            console.print(f"No sample of {arm}: it diverged.", markup=False)
            continue
        run = run_folder(arguments.output_dir, arm, arguments.seeds[0])
        model = AutoModelForCausalLM.from_pretrained(run).eval()
        tokenizer = AutoTokenizer.from_pretrained(run)
        set_seed(0)
        ids = model.generate(
            **tokenizer(arguments.sample_prompt, return_tensors="pt"),
            max_new_tokens=arguments.sample_tokens,
            do_sample=True,
            temperature=0.7,
        )
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        console.print(Panel(text, title=escape(arm)), markup=False)


def parse_comparison(given: list[str]) -> tuple[CompareArguments, list[str]]:
    """The options of a comparison, and those of train.py."""
    # Of the options that follow, some begin like these.
    parser = HfArgumentParser(CompareArguments, description=__doc__, allow_abbrev=False)
    arguments, rest = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    return arguments, rest


def main() -> None:
    arguments, rest = parse_comparison(sys.argv[1:])
    records = compare(arguments, rest)
    if records is None:
        sys.exit(1)
    folder = Path(arguments.output_dir)
    # Differences are between runs of the same seed, so that an arm lacks all seeds or none.
    number = {arm: sum(record["arm"] == arm for record in records) for arm in arguments.arms}
    whole = [arm for arm in arguments.arms if number[arm] == len(arguments.seeds)]
    diverged = [arm for arm in arguments.arms if arm not in whole]
    if whole:
        show(replace(arguments, arms=whole), records, folder)
    if diverged:
        raise RunError(f"{', '.join(map(repr, diverged))} diverged, and cannot be compared; see above for the seeds.")


def show(arguments: CompareArguments, records: list[dict], folder: Path) -> None:
    """The table, the picture and the samples of the given arms."""
    records = [record for record in records if record["arm"] in arguments.arms]
    show_table(arguments, records, folder / "comparison.md")
    runs = {arm: [record for record in records if record["arm"] == arm] for arm in arguments.arms}
    draw(runs, folder / "comparison.png")
    console.print(f"The table and the curves: {folder / 'comparison.md'}, {folder / 'comparison.png'}")
    show_samples(arguments, runs)
    console.print(f"Each run folder in {folder} is a checkpoint that AutoModelForCausalLM.from_pretrained loads.")


if __name__ == "__main__":
    run_command(main)
