"""The commands, run as a user runs them, on a little text and a tiny model."""

import copy
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import by_the_clock
import pytest
import torch
from compare import (
    CompareArguments,
    compare,
    in_seconds,
    paired_difference,
    parse_comparison,
    plan,
    run_folder,
    show_samples,
    show_table,
    tabulate,
    without_evaluation,
)
from compare import main as compare_main
from data import DataError, byte_tokenizer, sample_blocks, token_blocks
from evaluate import evaluate, mean_nats
from evaluate import main as evaluate_main
from fresh import Interpreter, run_fresh_ranks
from hypothesis import given
from hypothesis import strategies as st
from records import append_record, read_records
from safetensors.torch import load, load_file, save_file
from tiny import few
from train import (
    PRESETS,
    RunError,
    build_model,
    count_parameters,
    load_model,
    make_trainer,
    parse,
    prepare_data,
    run_command,
    train,
)
from train import main as train_main
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from modeling_stateful_gpt.warm_start import collate

ROOT = Path(__file__).parent.parent
TINY = [
    "--block_size=32", "--hidden_size=32", "--num_hidden_layers=1", "--max_steps=6", "--eval_steps=3",
    "--logging_steps=1", "--save_steps=2", "--warmup_steps=1", "--per_device_train_batch_size=8", "--use_cpu=true",
    "--max_eval_samples=8", "--disable_tqdm=true", "--validation_fraction=0.3",
]  # fmt: skip


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    paths = []
    for name in ("compound", "debugger", "formatstrings", "types"):
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(topics[name])
    return [str(path) for path in paths]


def options(text_files, output_dir, *more):
    return ["--text_file", *text_files, "--output_dir", str(output_dir), *TINY, *more]


def continued(text_files, output_dir, checkpoint):
    sizes = ("--hidden_size", "--num_hidden_layers")
    arguments = [a for a in options(text_files, output_dir) if not a.startswith(sizes)]
    return [*arguments, "--model_name_or_path", str(checkpoint)]


TRAINING = ROOT / "training"


def run_until(condition, script, arguments):
    """Starts a script and returns it, running, when the condition holds."""
    process = Interpreter(TRAINING / script, *arguments)
    while not condition(process):
        assert process.is_alive(), process.stdout + process.stderr
        time.sleep(0.005)
    return process


def run_and_kill(arguments, losses):
    """Starts train.py and kills it when it has logged so many losses."""
    process = run_until(lambda process: process.stdout.count("'loss'") >= losses, "train.py", arguments)
    process.kill()
    process.wait()


def losses(folder):
    (state,) = sorted(Path(folder).glob("checkpoint-6/trainer_state.json"))
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("preset", few(PRESETS, ["gpt", "hybrid", "rwkv", "token_shift", "stateful", "warm_start"]))
def test_a_run_learns_and_leaves_a_checkpoint_that_loads(preset, text_files, tmp_path):
    # As many as the presets have kinds of layers.
    run = options(text_files, tmp_path / "run", "--preset", preset, "--num_hidden_layers=2")
    results = train(*parse(run))
    log = [entry["eval_loss"] for entry in results["log"]]
    assert log[-1] < log[0] < 5.8
    assert results["tokens"] == 6 * 8 * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert results["parameters"] == count_parameters(model)
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=5)
    assert out.shape[1] == 9
    # The same command again has nothing to do.
    assert train(*parse(run)) == results


@pytest.mark.parametrize("max_norm", [0.5, 0])
def test_a_step_for_each_pass_is_that_of_a_loop_over_the_passes(max_norm, text_files, tmp_path):
    """The original proposal, by hand: the plain loss and a step, the loss of the second pass and a step."""
    arguments = options(text_files, tmp_path / "run", "--preset=step_per_pass", "--lr_scheduler_type=constant")
    arguments += [f"--max_grad_norm={max_norm}", "--weight_decay=0", "--warmup_steps=0", "--max_steps=3"]
    given = parse([*arguments, "--eval_strategy=no", "--eval_on_start=false"])
    data = prepare_data(given[1])
    ours = build_model(given[0], given[1], data.tokenizer, 7).train()
    theirs = copy.deepcopy(ours)
    seen = []

    def record(examples):
        seen.append(collate(examples))
        return seen[-1]

    make_trainer(given[0], given[1], data, model=ours, args=given[2], data_collator=record).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    for batch in seen[:3]:
        states = None
        for _ in range(2):
            outputs = theirs(**batch, initial_states=states, num_passes=1)
            optimizer.zero_grad()
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
            optimizer.step()
            states = outputs.states.detach()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset,compiled", [("stateful", False), ("gpt", True)])
@torch.compiler.set_stance("force_eager")  # to compile would take long, and to Trainer it looks the same
@torch.no_grad()
def test_labels_are_smoothed_over_the_next_tokens(preset, compiled, text_files, tmp_path):
    given = parse(options(text_files, tmp_path / "run", f"--preset={preset}", "--label_smoothing_factor=0.3"))
    data = prepare_data(given[1])
    few = data.validation.select(range(4))
    model = build_model(given[0], given[1], data.tokenizer, 7)
    trainer = make_trainer(
        given[0], given[1], data, model=model, args=given[2], eval_dataset=few, data_collator=collate
    )
    batch = collate([*few])
    if compiled:
        model = torch.compile(model)
    for training in (True, False):
        logits = model.train(training)(batch["input_ids"]).logits
        expected = LabelSmoother(0.3)([logits], batch["labels"], shift_labels=True)
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("rows,steps", [(1, False), (64, True)])
def test_evaluation_steps_through_the_text_only_where_that_is_expected_to_be_faster(text_files, tmp_path, rows, steps):
    size = f"--per_device_eval_batch_size={rows}"
    given = parse(options(text_files, tmp_path / "run", "--preset=stateful", "--block_size=128", size))
    data = prepare_data(given[1])
    texts = data.validation.select(range(rows))
    model = build_model(given[0], given[1], data.tokenizer, 7)
    trainer = make_trainer(
        given[0], given[1], data, model=model, args=given[2], eval_dataset=texts, data_collator=collate
    )
    runs = []
    model.model.language_model.register_forward_pre_hook(lambda *_: runs.append(1))
    found = trainer.evaluate()["eval_loss"]
    assert (len(runs) >= len(texts[0]["input_ids"])) == steps
    model.config.solver = "sequential"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("more", ["--random_offsets=true", "--gradient_accumulation_steps=2", "--warm_start=true"])
def test_a_step_for_each_pass_refuses_other_batches(more, text_files, tmp_path):
    with pytest.raises(RunError, match="leave out"):
        train(*parse(options(text_files, tmp_path / "run", "--preset=step_per_pass", more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers,mlp", [(2, "gelu"), (6, "gelu"), (3, "swiglu")])
def test_presets_of_the_same_size_have_the_same_number_of_parameters(layers, mlp):
    counts = {}
    for preset in PRESETS:
        arguments = ["--preset", preset, f"--num_hidden_layers={layers}", "--output_dir=x", "--use_cpu=true"]
        model_arguments, data_arguments, _ = parse([*arguments, "--decoder_config", json.dumps({"mlp_type": mlp})])
        counts[preset] = count_parameters(build_model(model_arguments, data_arguments, byte_tokenizer(), 0))
    assert max(counts.values()) / min(counts.values()) < 1.005, counts


EVERYTHING_RANDOM = [
    "--preset=stateful", "--dropout=0.1", "--stateful_config",
    json.dumps({
        "pass_probabilities": [0.4, 0.3, 0.3], "feedback_noise": 0.02,
    }),
]  # fmt: skip


@pytest.mark.client("transformers", "`Trainer`, and its resuming")
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(EVERYTHING_RANDOM, id="stateful"),
        pytest.param(
            ["--preset=hybrid", "--num_hidden_layers=2", "--dropout=0.1"], id="hybrid", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_weights(what, text_files, tmp_path, capsys):
    arguments = [*what, "--max_steps=30", "--save_steps=1000", "--eval_strategy=no"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(*parse(options(text_files, whole, *arguments)))

    five_losses = lambda process: process.stdout.count("'loss'") >= 5  # noqa: E731
    process = run_until(five_losses, "train.py", options(text_files, halves, *arguments))
    process.interrupt()
    assert process.wait() == 1 and "Run the same command again to resume." in process.stdout + process.stderr
    assert not (halves / "results.json").exists() and list(halves.glob("checkpoint-*"))

    train(*parse(options(text_files, halves, *arguments)))
    assert "Resuming from" in capsys.readouterr().out
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.exhaustive
def test_a_killed_run_resumes_from_its_last_checkpoint(text_files, tmp_path, capsys):
    arguments = options(text_files, tmp_path / "run", "--max_steps=60", "--save_steps=5", "--eval_strategy=no")
    saved = tmp_path / "run"
    process = run_until(lambda _: list(saved.glob("checkpoint-*/trainer_state.json")), "train.py", arguments)
    process.kill()
    process.wait()
    train(*parse(arguments))
    assert "Resuming from" in capsys.readouterr().out


@pytest.mark.parametrize("written", few([None, "", '{"epoch": 1'], ['{"epoch": 1']))
def test_a_checkpoint_that_a_killed_run_left_unfinished_is_passed_over(written, text_files, tmp_path, capsys):
    folder = tmp_path / "run"
    train(*parse(options(text_files, folder, "--save_steps=2")))
    (folder / "results.json").unlink()
    weights = load_file(folder / "model.safetensors")
    state = folder / "checkpoint-6/trainer_state.json"
    state.unlink()
    if written is not None:
        state.write_text(written)
    capsys.readouterr()
    train(*parse(options(text_files, folder, "--save_steps=2")))
    assert f"Resuming from {folder / 'checkpoint-4'}." in capsys.readouterr().out
    again = load_file(folder / "model.safetensors")
    assert all(again[name].equal(weights[name]) for name in weights)


@pytest.mark.exhaustive
def test_two_processes_give_the_losses_of_one_at_the_same_global_batch(text_files, tmp_path):
    mixture = ["--stateful_config", json.dumps({"pass_probabilities": [0.4, 0.3, 0.3]})]
    train(*parse(options(text_files, tmp_path / "one", *mixture)))
    accumulated = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=2"]
    halves = options(text_files, tmp_path / "two", *mixture, "--per_device_train_batch_size=4")
    run_fresh_ranks("two_cpu_processes.yaml", TRAINING / "train.py", *halves)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    plain = [f"--stateful_config={json.dumps({'num_passes': 2})}"]
    for name, more in (("whole", []), ("accumulated", accumulated)):
        train(*parse(options(text_files, tmp_path / name, *plain, *more)))
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_epochs_or_steps_may_be_given_and_500_steps_are_the_default(text_files, tmp_path):
    without = [a for a in options(text_files, tmp_path) if not a.startswith("--max_steps")]
    lengths = [parse([*without, *more])[2] for more in ([], ["--num_train_epochs=2"], ["--max_steps=7"])]
    assert [(a.max_steps, a.num_train_epochs) for a in lengths] == [(500, 0), (-1, 2), (7, 0)]


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def evaluations(results):
    return [(entry["step"], entry["tokens"], entry["eval_loss"]) for entry in results["log"]]


def test_training_ends_when_validation_has_stopped_improving_and_the_best_is_left(text_files, tmp_path, capsys):
    more = ["--preset=gpt", "--max_steps=-1", "--max_train_bytes=2000", "--patience=3", "--eval_steps=10",
            "--learning_rate=1e-2", "--dropout=0.1"]  # fmt: skip
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    results = train(*parse(options(text_files, whole, *more)))
    losses = {entry["step"]: entry["eval_loss"] for entry in results["log"]}
    best = results["step"]
    assert losses[best] == min(losses.values()) and max(losses) == best + 3 * 10
    (entry,) = (entry for entry in results["log"] if entry["step"] == best)
    assert (results["tokens"], results["seconds"]) == (entry["tokens"], entry["train_seconds"])
    blocks = sample_blocks(prepare_data(parse(options(text_files, whole, *more))[1]).validation, 8)
    assert mean_nats(load_model(str(whole)), blocks, None) == pytest.approx(losses[best], rel=1e-5)
    state = json.loads((whole / f"checkpoint-{best + 20}/trainer_state.json").read_text())
    assert {e["learning_rate"] for e in state["log_history"] if "loss" in e and e["step"] > 1} == {1e-2}

    # Interrupted between two evaluations, or killed after the last checkpoint, it ends where it would have.
    assert train(*parse(options(text_files, halves, *more)), callbacks=[InterruptAt(best + 14)]) is None
    (whole / "results.json").unlink()
    capsys.readouterr()
    for folder, step in ((halves, best + 15), (whole, best + 20)):
        again = train(*parse(options(text_files, folder, *more)))
        assert f"checkpoint-{step}." in capsys.readouterr().out
        assert again["step"] == best and evaluations(again) == evaluations(results)
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


class SleepAtFirst(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 0:
            time.sleep(2)


def test_a_budget_of_seconds_is_for_training_alone_and_kept_over_an_interruption(text_files, tmp_path):
    more = ["--max_steps=-1", "--max_seconds=1.5", "--eval_steps=20", "--save_steps=20", "--save_total_limit=1000"]
    arguments = options(text_files, tmp_path / "run", "--preset=gpt", *more)
    assert train(*parse(arguments), callbacks=[InterruptAt(10), SleepAtFirst()]) is None
    results = train(*parse(arguments))
    assert 1.5 <= results["seconds"] < 3 and results["step"] > 11
    assert results["log"][-1]["step"] == results["step"], "evaluated at its end"
    assert [entry["step"] for entry in results["log"][:-1]] == list(range(0, results["step"], 20))
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    steps = [e for e in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert len(steps) == steps[-1]["step"] > 11
    for before, after in pairwise(steps[1:]):
        cosine = (1 + math.cos(math.pi * before["train_seconds"] / 1.5)) / 2
        assert after["learning_rate"] == pytest.approx(1e-3 * cosine, abs=2e-6)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_few_text_files_are_enough(number, text_files, tmp_path):
    arguments = [a for a in options(text_files[:number], tmp_path / "run") if not a.startswith("--validation")]
    assert train(*parse([*arguments, "--max_steps=1", "--eval_strategy=no"]))["data"]["validation_bytes"] > 0


def test_bf16_and_a_pretrained_tokenizer(text_files, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    more = ["--bf16=true", "--tokenizer_name", str(tmp_path / "tokenizer")]
    results = train(*parse(options(text_files, tmp_path / "run", *more)))
    assert results["log"][-1]["eval_loss"] < results["log"][0]["eval_loss"]


def test_training_goes_on_from_a_checkpoint_and_around_a_backbone(text_files, tmp_path):
    train(*parse(options(text_files, tmp_path / "first", "--preset=gpt")))
    again = train(*parse(continued(text_files, tmp_path / "again", tmp_path / "first")))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.model_type == "gateloop"
    assert again["log"][0]["eval_loss"] < 5.5

    backbone = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    backbone.save_pretrained(tmp_path / "gpt2")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None  # as GPT-2's own
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for name, source, more, kinds in (
        ("around", "gpt2", [], ("stateful_gpt", "gpt2")),
        ("plain", "gpt2", ["--preset=gpt"], ("gpt2", "gpt2")),
        ("ours", "first", ["--preset=stateful"], ("stateful_gpt", "gateloop")),
    ):
        train(*parse([*continued(text_files, tmp_path / name, tmp_path / source), *more]))
        config = AutoModelForCausalLM.from_pretrained(tmp_path / name).config
        assert (config.model_type, config.get_text_config().model_type) == kinds
    for more, message in (
        (["--preset=warm_start", "--trainable=fusion"], "with a warm start the first epoch is plain"),
        (["--preset=gpt", "--trainable=fusion"], "choose a --preset that has it"),
    ):
        with pytest.raises(RunError, match=message):
            train(*parse([*continued(text_files, tmp_path / "x", tmp_path / "first"), *more]))
        assert not (tmp_path / "x").exists()
    for more, message in (
        (["--preset=gpt"], "has its feedback already; leave out --preset"),
        (["--trainable=half"], "--trainable half does not exist; choose from everything, fusion, lora"),
        (["--hidden_size=64"], "--hidden_size is for a model from scratch"),
        (["--stateful_config", '{"num_passes": 7}'], "--stateful_config needs a --preset"),
    ):
        with pytest.raises(RunError, match=message):
            train(*parse([*continued(text_files, tmp_path / "x", tmp_path / "around"), *more]))


@pytest.fixture(scope="session")
def plain_run(text_files, tmp_path_factory):
    """The folder of a trained plain GPT."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(*parse(options(text_files, folder, "--preset=gpt")))
    return folder


@pytest.mark.parametrize("trainable", ["everything", "fusion", "lora"])
def test_of_a_converted_model_the_fusion_alone_may_be_trained(trainable, plain_run, text_files, tmp_path):
    more = ["--preset=stateful", f"--trainable={trainable}", '--stateful_config={"feedback": "correction"}']
    results = train(*parse([*continued(text_files, tmp_path / "run", plain_run), *more]))
    before = load_file(plain_run / "model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    assert after["model.feedback.down.weight"].abs().max() > 0
    changed = {
        name
        for name in before
        if name != "lm_head.weight"
        and not torch.equal(before[name], after[name.replace("model.", "model.language_model.", 1)])
    }
    kinds = {"everything": set(before), "fusion": set(), "lora": {n for n in before if "q_proj" in n or "v_proj" in n}}
    assert changed == kinds[trainable] - {"lm_head.weight"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "stateful_gpt" and count_parameters(model) == results["parameters"]
    assert not list((tmp_path / "run").glob("adapter_*")), "merged"
    # Resumed from a checkpoint, it comes to the same.
    (tmp_path / "run/results.json").unlink()
    (tmp_path / "run/checkpoint-6/trainer_state.json").unlink()
    train(*parse([*continued(text_files, tmp_path / "run", plain_run), *more]))
    again = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_evaluation_is_bits_per_byte_and_passes_approach_the_exact_value(text_files, tmp_path, monkeypatch, capsys):
    train(*parse(options(text_files, tmp_path / "run", "--preset=stateful", "--max_steps=30", "--eval_strategy=no")))
    documents = [topics["compound"][:3000]]
    model = load_model(str(tmp_path / "run"))
    results = evaluate(model, byte_tokenizer(), documents, [1, 2, 4, 32], block_size=32)
    bits = {name: row["bits_per_byte"] for name, row in results.items()}
    assert abs(bits["32"] - bits["exact"]) < 1e-4 < abs(bits["1"] - bits["exact"])

    ids = torch.tensor(token_blocks(documents, byte_tokenizer(), 32)["input_ids"])
    logprobs = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    nats = -logprobs.mean().item()
    bytes_per_token = len(documents[0].encode()) / (len(documents[0].encode()) + 1)
    assert bits["exact"] == pytest.approx(nats / math.log(2) / bytes_per_token, rel=1e-4)
    assert results["exact"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)

    command = ["evaluate.py", str(tmp_path / "run"), "--text_file", text_files[0], "--max_blocks=4", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    evaluate_main()
    assert set(json.loads(capsys.readouterr().out)) == {"1", "2", "3", "exact"}
    record = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert record["text"] == f"{Path(text_files[0]).name}, at most 4 blocks of it"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_comparison_tabulates_draws_samples_and_resumes(text_files, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "all"
    late = "stateful --model_name_or_path {output_dir}/gpt-seed{seed} --max_steps 3 --learning_rate 5e-4"
    arms = ["gpt", """stateful --dropout 0.1 --stateful_config '{"num_passes": 2}'""", late]
    arguments = ["compare.py", "--arms", *arms, "--seeds", "0", "1", "--sample_tokens=5"]
    monkeypatch.setattr(sys, "argv", [*arguments, *options(text_files, folder, "--max_eval_blocks=4")])
    compare_main()
    records = lines(folder / "comparison.jsonl")
    assert [(r["seed"], r["arm"]) for r in records] == [(seed, arm) for seed in (0, 1) for arm in arms]
    assert all(set(r["bits_per_byte"]) == {"one_pass", "trained_passes", "exact"} for r in records)
    config = AutoModelForCausalLM.from_pretrained(
        folder / "stateful-dropout-0.1-stateful_config-num_passes-2-seed1"
    ).config
    assert (config.text_config.hidden_dropout, config.num_passes) == (0.1, 2)
    # What the first phase has cost is part of what the second one has.
    plain, continued = records[0], records[2]
    assert continued["before"] == {"tokens": plain["tokens"], "seconds": plain["seconds"]}
    assert continued["tokens"] == plain["tokens"] + 3 * 8 * 32 and continued["seconds"] > plain["seconds"]
    assert continued["log"][0]["eval_loss"] == pytest.approx(plain["log"][-1]["eval_loss"], rel=1e-5)

    made = lines(folder / "evaluations.jsonl")
    assert [(e["arm"], e["seed"], e["step"]) for e in made] == [
        (r["arm"], r["seed"], entry["step"]) for r in records for entry in r["log"]
    ]
    assert made[2]["bits_per_byte"] == pytest.approx(
        made[2]["eval_loss"] / math.log(2) / plain["data"]["bytes_per_token"]
    )
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "comparison.md").read_text()
    exact = {arm: [r["bits_per_byte"]["exact"] for r in records if r["arm"] == arm] for arm in arms}
    for arm, (a, b) in exact.items():
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {arm} |"))
        assert f"| {(a + b) / 2:.4f} | {a:.4f} {b:.4f} | {max(a, b):.4f} |" in row
        assert arm == "gpt" or row.split(" | ")[-2] == paired_difference([a, b], exact["gpt"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "trained" in printed and "worst" in printed and "def " in printed
    compare_main()
    assert lines(folder / "comparison.jsonl") == records and lines(folder / "evaluations.jsonl") == made
    # A kill has cut the last line short.
    os.truncate(folder / "comparison.jsonl", (folder / "comparison.jsonl").stat().st_size - 9)
    compare_main()
    assert read_records(folder / "comparison.jsonl") == records
    monkeypatch.setattr(sys, "argv", [*arguments, *options(text_files, folder, "--weight_decay=0")])
    with pytest.raises(RunError, match="other settings"):
        compare_main()


@pytest.mark.parametrize(
    "second,message",
    [
        ("gpt", "only once"),
        ("gpt --block_size 16", "data of its own"),
        ("gpt --patience 0", "'gpt --patience 0': --patience must be at least 1"),
        ("gpt --learning_rate=-1", "'gpt --learning_rate=-1': --learning_rate is -1.0"),
        ("gpt --seed=1", "Leave out --seed"),
        ("gpt --data-seed 1", "Leave out --data_seed"),
        ("gpt --preset stateful", "Leave out --preset"),
        ("rnn", "no preset 'rnn'"),
        ("--dropout 0.1", "has no preset, nor does it go on"),
        ("", "no preset ''"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(second, message, tmp_path):
    with pytest.raises(RunError, match=message):
        plan(*parse_comparison(["--arms", "gpt", second, "--output_dir", str(tmp_path / "x")]))


def test_what_an_arm_goes_on_from_is_checked_before_anything_is_trained(text_files, tmp_path, monkeypatch):
    stateful = "stateful --model_name_or_path {output_dir}/gpt-seed{seed} --max_steps=2"
    twice = f"stateful --model_name_or_path {run_folder('{output_dir}', stateful, 0)}"
    for arms, message in (([stateful, "gpt"], "which no arm before it leaves"), (["gpt", stateful, twice], "already")):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--arms", *arms, *options(text_files, tmp_path / "all")])
        with pytest.raises(RunError, match=message):
            compare_main()
        assert not (tmp_path / "all").exists()


def test_a_comparison_says_which_arm_cannot_be_trained_and_where_it_cannot_be_written(text_files, tmp_path):
    (tmp_path / "file").write_text("something")
    for arm, folder, message in (
        ("stateful --dropout 2", tmp_path / "x", "'stateful --dropout 2': attention_dropout is 2.0"),
        ("stateful", Path("/proc/none/x"), "use another --output_dir"),
        ("stateful", tmp_path / ("long" * 100), "use another --output_dir"),
        ("stateful", Path("/dev/null"), "is a file or lies below one"),
        ("stateful", tmp_path / "file", "is a file or lies below one; use another --output_dir"),
        ("stateful", tmp_path / "file/x", "is a file or lies below one; use another --output_dir"),
        ("gpt --report_to foo", tmp_path / "x", "'gpt --report_to foo': --report_to: foo is not supported"),
        ("gpt --lr_scheduler_type warmup_stable_decay", tmp_path / "x", "decay': --lr_scheduler_type"),
        ("stateful --dataloader_drop_last=true --per_device_train_batch_size=9999", tmp_path / "x", "no whole batch"),
        ("gpt --sample_tokens=9999", tmp_path / "x", "'gpt': the prompt and --sample_tokens are 10003 tokens"),
    ):
        arm, *more = arm.split(" --sample")
        with pytest.raises(RunError, match=message):
            arms = ["--arms", "gpt", arm] if not more else ["--arms", arm, f"--sample{more[0]}"]
            compare(*parse_comparison([*arms, *options(text_files, folder)]))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    with pytest.raises(DataError, match=r"The validation text: The text has \d+ tokens, less than one block"):
        train(*parse(options(text_files[:1], tmp_path / "x", "--validation_fraction=0.001", "--block_size=500")))


def test_arms_go_on_from_checkpoints_and_from_arms_that_went_on(text_files, tmp_path, monkeypatch):
    early = "gpt --model_name_or_path {output_dir}/gpt-seed{seed}/checkpoint-4 --max_steps=2"
    stateful = """stateful --model_name_or_path {output_dir}/gpt-seed{seed} --max_steps=2
        --trainable=lora --stateful_config '{"training_solver": "sequential"}'"""
    again = f"--model_name_or_path {run_folder('{output_dir}', stateful, 0)} --max_steps=1 --trainable=fusion"
    without = """stateful --stateful_config '{"feedback": null}'"""
    more = ["--sample_tokens=5", "--max_eval_blocks=4", "--decoder_config", '{"mlp_type": "swiglu"}']
    command = [
        "compare.py",
        "--arms",
        "gpt",
        early,
        stateful,
        again,
        without,
        *options(text_files, tmp_path / "all", *more),
    ]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--arms", "gpt", *command[command.index("--text_file") :]])
    compare_main()
    # One is finished, the others are not begun.
    monkeypatch.setattr(sys, "argv", command)
    compare_main()
    records = {record["arm"]: record for record in lines(tmp_path / "all/comparison.jsonl")}
    assert [record["tokens"] // (8 * 32) for record in records.values()] == [6, 4 + 2, 6 + 2, 6 + 2 + 1, 6]
    spent = [records[arm]["seconds"] for arm in ("gpt", stateful, again)]
    assert spent == sorted(spent) and 0 < records[early]["before"]["seconds"] < spent[0]
    bits = records[stateful]["bits_per_byte"]
    assert bits["trained_passes"] == bits["exact"] != bits["one_pass"]


def test_an_arm_with_another_tokenizer_is_refused_before_anything_is_trained(
    plain_run, text_files, tmp_path, monkeypatch
):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["def"])
    tokenizer.save_pretrained(tmp_path / "words")
    train(*parse(options(text_files, tmp_path / "other", "--preset=gpt", f"--tokenizer_name={tmp_path / 'words'}")))
    for start, message in (
        (tmp_path / "other", "another tokenizer than 'gpt'"),
        (tmp_path / "missing", "cannot be loaded"),
        (plain_run, None),
    ):
        arms = ["--arms", "gpt", f"gpt --model_name_or_path {start}", "--sample_tokens=5", "--max_eval_blocks=4"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *arms, *options(text_files, tmp_path / "all")])
        if message is None:
            compare_main()
        else:
            with pytest.raises(RunError, match=message):
                compare_main()
            assert not (tmp_path / "all").exists()


def test_arms_that_read_documents_and_blocks_can_be_compared(tmp_path, monkeypatch):
    short = [tmp_path / f"{number}.txt" for number in range(8)]
    for number, path in enumerate(short):
        path.write_text(topics["types"][500 * number : 500 * number + 500])
    arms = ["--arms", "reversible --context unbounded --chunk_size 64", "reversible", "--sample_tokens=5"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["compare.py", *arms, *options(map(str, short), tmp_path / "all", "--max_steps=2", "--max_eval_blocks=4")],
    )
    compare_main()
    assert len(lines(tmp_path / "all/comparison.jsonl")) == 2


def test_a_finished_run_is_known_again_though_its_loss_is_no_number():
    diverged = {"arm": "gpt", "log": [{"eval_loss": float("nan")}], "bits_per_byte": {"exact": float("nan")}}
    assert without_evaluation(json.loads(json.dumps(diverged))) == without_evaluation(diverged)


@pytest.mark.parametrize("trained,shown", [(None, ""), (2.5, "2.5000")])
def test_the_trained_passes_of_a_warm_start_have_no_figure_and_the_note_says_so(trained, shown, tmp_path):
    bits = {"one_pass": 3.0, "trained_passes": trained, "exact": 2.0}
    record = {"arm": "warm_start", "parameters": 1, "tokens": 2, "seconds": 3, "bits_per_byte": bits}
    arguments = CompareArguments(arms=["warm_start"])
    assert tabulate(arguments, [record])[1][4:] == ["3.0000", shown, "2.0000", "", ""]
    show_table(arguments, [record], tmp_path / "table.md")
    assert ("No trained passes" in (tmp_path / "table.md").read_text()) == (trained is None)


def test_arms_are_also_compared_in_the_seconds_that_the_first_one_took():
    def record(arm, seed, best, *log):
        # A step takes a second; before the first, nothing is learned.
        times = [(0, 2.0), *log]
        evaluations = [{"step": s, "train_seconds": s, "eval_loss": bits * math.log(2)} for s, bits in times]
        bits = {"exact": min(bits for _, bits in log)}
        run = {"arm": arm, "seed": seed, "parameters": 1, "tokens": 2, "seconds": best, "log": evaluations}
        return {**run, "bits_per_byte": bits, "data": {"bytes_per_token": 1.0}}

    records = [
        record("gpt", 0, 10, (5, 3.0), (10, 2.5), (15, 2.6)),  # At its best at the second 10.
        record("slow", 0, 30, (10, 2.75), (20, 2.5), (30, 2.0)),
        record("late", 0, 30, (12, 2.5), (30, 2.0)),
        record("gpt", 1, 20, (10, 2.5), (20, 2.25)),
        record("slow", 1, 30, (10, 3.0), (21, 2.75), (22, 2.0)),  # 21 ends the step in which second 20 is over.
        record("late", 1, 30, (20, 2.0), (30, 2.0)),
        record("between", 0, 30, (5, 3.0), (15, 2.0)),  # 2.5 at the second 10.
        record("between", 1, 30, (5, 1.0), (30, math.nan)),  # It diverges when the time is over.
    ]
    arms = ["gpt", "slow", "late", "between"]
    heading, gpt, slow, late, between = tabulate(CompareArguments(arms=arms, seeds=[0, 1]), records)
    assert heading[-2:] == ["difference to gpt", "… in the same seconds"]
    assert gpt[-2:] == ["", ""]
    assert slow[-2:] == ["-0.3750 ± 0.1250", "+0.3750 ± 0.1250"]
    assert between[-1] == "-0.6250 ± 0.6250"
    assert late[-1] == "+nan ± nan"  # It was not evaluated as early as that.


def test_the_records_of_a_comparison_say_what_is_best_in_equal_time(tmp_path, monkeypatch, capsys):
    def record(arm, seed, *log):
        best = min(log, key=lambda entry: entry[2])
        names = ("step", "train_seconds", "eval_loss")
        entries = [dict(zip(names, (s, t, b * math.log(2)), strict=True)) | {"tokens": 100 * s} for s, t, b in log]
        run = {"arm": arm, "seed": seed, "tokens": 100 * best[0], "seconds": best[1], "data": {"bytes_per_token": 1.0}}
        return {**run, "log": entries, "bits_per_byte": {"exact": best[2]}}

    again = record("gpt", 0, (0, 0, 9.0), (10, 10, 1.0))
    records = [
        again,
        record("gpt", 0, (0, 0, 9.0), (10, 10, 3.0), (20, 20, 2.0), (30, 30, 2.5), (40, 40, 3.0)),
        # Of its seconds half are of what ran beside it.
        record("other", 0, (0, 0, 9.0), (10, 30, 3.0), (20, 60, 1.5), (30, 90, 2.75), (40, 120, 2.75)),
        record("other", 1, (0, 0, 9.0), (10, 30, 1.0)),
        record("third", 0, (0, 0, 9.0), (10, 10, 2.5), (20, 20, 2.25), (30, 30, 2.0)),
    ]
    # 1.5 times as expensive, "other" is at 13⅓ steps when gpt has made 20.
    heading, gpt, other, third = by_the_clock.tabulate(records, costs=[1.0, 1.5, 1.0])
    assert gpt == ["gpt", "1", "0", "2.0000", "2.0000", "", "", "", ""]
    assert other == ["other", "1.5", "0 1", "1.2500", "1.5000", "-0.5000", "-0.1667", "+nan", "+0.5000"]
    assert third[5:] == ["+0.0000", "-0.2500", "+0.2500", "+0.2500"]
    # At the second of gpt in this table as well.
    without_costs = by_the_clock.tabulate(records, baseline=2)
    assert [row[4:] for row in without_costs[1:]] == [
        ["+0.0000", "+0.2500", "-0.2500"], ["-0.5000", "+0.0833", "+nan"], ["", "", ""]
    ]  # fmt: skip
    assert len(heading) == len(gpt) == len(without_costs[0]) + 2
    assert math.isnan(by_the_clock.best_of_three(records[3]))
    for wrong in ({"baseline": 3}, {"costs": [1.0]}, {"costs": [1.0, 0.0, 1.0]}, {"costs": [1.0, math.nan, 1.0]}):
        with pytest.raises(RunError, match=r"--baseline 3|--costs are"):
            by_the_clock.tabulate(records, **wrong)
    for nothing in ([], [{"step": 1}], [1]):
        with pytest.raises(RunError, match=r"no records of compare\.py"):
            by_the_clock.tabulate(nothing)

    for record in records:
        append_record(tmp_path / "records.jsonl", record)
    monkeypatch.setattr(sys, "argv", ["by_the_clock.py", str(tmp_path / "records.jsonl"), "--costs", "1", "1.5", "1"])
    by_the_clock.main()
    printed = capsys.readouterr().out
    assert "-0.1667" in printed and "+0.5000" in printed
    monkeypatch.setattr(sys, "argv", ["by_the_clock.py", str(tmp_path / "none.jsonl")])
    with pytest.raises(RunError, match=r"none.jsonl does not exist"):
        by_the_clock.main()


def test_an_arm_that_diverged_has_no_sample(capsys):
    show_samples(CompareArguments(arms=["gpt"]), {"gpt": [{"bits_per_byte": {"exact": math.nan}}]})
    assert capsys.readouterr().out == "No sample of gpt: it diverged.\n"


def test_the_other_arms_are_compared_when_one_has_diverged(text_files, tmp_path, monkeypatch, capsys):
    wild = "token_shift --learning_rate=1e39 --max_grad_norm=0 --warmup_steps=0 --weight_decay=0"
    follows = "--model_name_or_path {output_dir}/" + run_folder("", wild, 0).name
    more = ["--max_steps=1", "--eval_strategy=no", "--sample_tokens=2", "--max_eval_blocks=1"]
    given = ["--arms", wild, follows, "gpt", *options(text_files, tmp_path / "all"), *more]
    monkeypatch.setattr(sys, "argv", ["compare.py", *given])
    with pytest.raises(RunError, match=r"^'token_shift .*', '--model_name_or_path .*' diverged, and cannot"):
        compare_main()
    assert f"{wild!r}, seed 0, diverged: The update of step 1" in " ".join(capsys.readouterr().out.split())
    table = (tmp_path / "all/comparison.md").read_text()
    assert "| gpt |" in table and "token_shift" not in table


def test_what_an_arm_went_on_from_is_in_its_seconds_as_it_was():
    def entry(step, seconds, bits):
        return {"step": step, "tokens": 1000 + 100 * step, "train_seconds": seconds, "eval_loss": bits * math.log(2)}

    # 1,000 tokens and 5 seconds behind it; the second of two steps begins at 10 seconds or, by its cost, at 1,300.
    log = [entry(0, 5, 9.0), entry(1, 10, 3.0), entry(2, 15, 2.0)]
    run = {"before": {"tokens": 1000, "seconds": 5}, "log": log, "tokens": 1200, "data": {"bytes_per_token": 1.0}}
    losses = [in_seconds(run, seconds) for seconds in (4, 5, 9.9, 10, 12, 15)]
    assert losses == pytest.approx([math.nan, 3.0, 3.0, 2.0, 2.0, 2.0], nan_ok=True)
    costly = by_the_clock.with_cost(run, 3.0)
    assert costly["seconds"] == 1600
    losses = [in_seconds(costly, seconds) for seconds in (999, 1000, 1299, 1300)]
    assert losses == pytest.approx([math.nan, 3.0, 3.0, 2.0], nan_ok=True)


def test_a_seed_that_diverged_is_in_the_table():
    record = {"arm": "gpt", "parameters": 1, "tokens": 2, "seconds": 3}
    records = [{**record, "bits_per_byte": {"exact": bits}} for bits in (2.0, math.nan, math.inf)]
    _, row = tabulate(CompareArguments(arms=["gpt"], seeds=[0, 1, 2]), records)
    assert row[4:] == ["nan", "2.0000 nan inf", "nan", "", ""]
    assert paired_difference([2.0, math.nan, 2.0], [2.0, 2.0, 2.0]) == "+nan ± nan"


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers()), min_size=1, max_size=4), st.integers(1, 200))
def test_records_survive_a_kill_in_the_middle_of_a_line(records, cut):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.jsonl")
        assert read_records(file) == []
        for record in records:
            append_record(file, record)
        assert read_records(file) == records == lines(file)
        size = file.stat().st_size
        os.truncate(file, max(0, size - cut))
        kept = read_records(file)
        assert kept == records[: len(kept)] and (len(kept) >= len(records) - 1 or cut > len(json.dumps(records[-1])))
        append_record(file, {"next": 1})
        assert read_records(file) == [*kept, {"next": 1}]


@pytest.mark.parametrize("offsets", ["false", "true"])
def test_arms_get_the_same_batches(offsets, text_files, tmp_path):
    more = ["--max_train_bytes=2000", "--max_steps=15", f"--random_offsets={offsets}", "--eval_strategy=no"]
    arms = ["--arms", "gpt", "stateful", "warm_start"]
    batches = []
    for run in plan(*parse_comparison([*arms, *options(text_files, tmp_path, *more, "--eval_on_start=false")])):
        data = prepare_data(run.data)
        model = build_model(run.model, run.data, data.tokenizer, run.seed)
        seen = []

        def record(examples, seen=seen):
            batch = collate(examples)
            seen.append(batch["input_ids"])
            return batch

        make_trainer(run.model, run.data, data, model=model, args=run.training, data_collator=record).train()
        batches.append(torch.cat(seen[:15]))
    assert (batches[0] == batches[1]).all() and (batches[0] == batches[2]).all()
    assert len(batches[0].unique(dim=0)) > (100 if offsets == "true" else 50)


def test_arms_read_the_same_text_in_the_same_order_and_what_goes_on_reads_on(tmp_path):
    late = "stateful --model_name_or_path {output_dir}/gpt-seed{seed}"
    runs = plan(*parse_comparison(["--arms", "gpt", "gpt --random_offsets true", late, "--seeds", "0", "1"]))
    assert [(run.training.seed, run.training.data_seed) for run in runs] == [
        (0, 0), (0, 0), (0, 1000), (1, 1), (1, 1), (1, 1001)
    ]  # fmt: skip
    assert runs[5].model.model_name_or_path == str(runs[3].folder) == "runs/comparison/gpt-seed1"
    assert all({**asdict(run.data), "random_offsets": False} == asdict(runs[0].data) for run in runs)


def test_differences_are_paired_by_seed():
    # -0.1, 0 and -0.2: a mean of -0.1, a standard deviation of 0.1.
    assert paired_difference([2.0, 2.2, 2.4], [2.1, 2.2, 2.6]) == "-0.1000 ± 0.0577"
    assert paired_difference([2.0], [1.75]) == "+0.2500"


def test_a_killed_comparison_loses_nothing(text_files, tmp_path, monkeypatch):
    arguments = ["--arms", "gpt", "stateful", "--sample_tokens=5", "--max_eval_blocks=4", "--eval_steps=1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, *options(text_files, tmp_path / "whole")])
    compare_main()
    file, command = tmp_path / "killed/evaluations.jsonl", [*arguments, *options(text_files, tmp_path / "killed")]
    process = run_until(lambda _: file.exists() and "stateful" in file.read_text(), "compare.py", command)
    process.kill()
    process.wait()
    before = file.read_text()
    monkeypatch.setattr(sys, "argv", ["compare.py", *command])
    compare_main()
    assert file.read_text().startswith(before)
    losses = [
        {(e["arm"], e["step"]): e["eval_loss"] for e in lines(tmp_path / name / "evaluations.jsonl")}
        for name in ("whole", "killed")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# What is refused


def refused(text_files, tmp_path, *more, message):
    output = tmp_path / "refused"
    with pytest.raises(RunError, match=message):
        train(*parse(options(text_files, output, *more)))
    assert not output.exists(), "nothing may be written"


def test_bad_options_are_refused_and_nothing_is_written(text_files, tmp_path):
    refused(text_files, tmp_path, "--preset=rnn", message="no preset 'rnn'; choose from")
    refused(text_files, tmp_path, "--preset=gpt", "--decoder_config", '{"max_position_embeddings": 16}',
            message="--block_size 32 is more than the model's max_position_embeddings")  # fmt: skip
    refused(text_files, tmp_path, "--stateful_config", '{"num_passes": 0}', message="num_passes is 0")
    refused(text_files, tmp_path, "--stateful_config", '{"num_no_grad_passes": 0}', message="A single pass without")
    refused(text_files, tmp_path, "--stateful_config", '{"feedback": "concat"}', message="'concat' does not exist")
    refused(text_files, tmp_path, "--trainable=fusion", message="is for feedback around a checkpoint")
    for preset in ("gpt", "token_shift"):
        refused(text_files, tmp_path, f"--preset={preset}", "--warm_start=true", message="feeds its hidden state back")
    refused(text_files, tmp_path, "--num_hidden_layers=0", message="num_hidden_layers is 0")
    refused(text_files, tmp_path, "--learning_rate=-1", message="--learning_rate is -1.0; it must be at least 0")
    for number in ("nan", "inf"):
        refused(text_files, tmp_path, f"--learning_rate={number}", message=f"--learning_rate is {number}; .* finite")
        refused(text_files, tmp_path, f"--max_seconds={number}", "--max_steps=-1", message="--max_seconds must be")
    refused(text_files, tmp_path, "--num_train_epochs=inf", message="--num_train_epochs is inf")
    refused(text_files, tmp_path, "--patience=2", "--eval_steps=0", message="there must be evaluations")
    for number in ("0", "-5"):
        refused(text_files, tmp_path, f"--max_steps={number}", message=f"--max_steps is {number}; it must be at least")
    refused(text_files, tmp_path, "--per_device_train_batch_size=0", message="_size is 0; it must be at least 1")
    refused(text_files, tmp_path, "--seed=-1", message="--seed and --data_seed must lie between 0 and 4294967295")
    refused(text_files, tmp_path, "--data_see=1", message="--data_see")
    refused(text_files, tmp_path, "--preset=hybrid", message="too few for the pattern gateloop, full_attention")
    refused(text_files, tmp_path, "--decoder_config", '{"layer_types": "gateloop"}', message="must be a list such as")
    refused(text_files, tmp_path, "--max_eval_samples=0", message="--max_eval_samples is 0; it must be")
    refused(text_files, tmp_path, "--preset=gpt", "--stateful_config", '{"num_passes": 2}', message="leave it out")
    refused(text_files, tmp_path, "--decoder_config", '{"mlp": "x"}', message="GateLoopConfig has no field mlp")
    refused(text_files, tmp_path, "--decoder_config", '{"mlp_type": "x"}', message="'x' does not exist")
    refused(text_files, tmp_path, "--stateful_config", "{feedback}", message="--stateful_config is not JSON")
    refused(text_files, tmp_path, "--max_seconds=5", message="leave out --max_steps")
    refused(text_files, tmp_path, "--max_seconds=5", "--max_steps=-1", "--lr_scheduler_type=linear",
            message="goes with --lr_scheduler_type cosine or constant_with_warmup")  # fmt: skip
    refused(text_files, tmp_path, "--max_seconds=0", "--max_steps=-1", message="--max_seconds must be more than 0")
    refused(text_files, tmp_path, "--patience=0", message="--patience must be at least 1")
    refused(text_files, tmp_path, "--label_smoothing_factor=nan", message="label_smoothing_factor is nan")
    refused(
        text_files, tmp_path, "--label_smoothing_factor=1", message="label_smoothing_factor is 1.0; it must be less"
    )
    refused(text_files, tmp_path, "--adam_beta1=1.5", message="adam_beta1 is 1.5; it must be less than 1")
    refused(text_files, tmp_path, "--adam_epsilon=-1", message="adam_epsilon is -1.0")
    refused(text_files, tmp_path, "--dropout=nan", message="--dropout is nan; it must be finite")
    refused(text_files, tmp_path, "--stateful_config=[]", message="--stateful_config is not JSON of the form")
    refused(text_files, tmp_path, "--save_total_limit=-1", message="--save_total_limit is -1")
    refused(text_files, tmp_path, "--progress_seconds=nan", message="--progress_seconds is nan")
    refused(text_files, tmp_path, "--eval_accumulation_steps=0", message="--eval_accumulation_steps is 0")
    refused(text_files, tmp_path, "--include_num_input_tokens_seen=foo", message="choose from all, non_padding, no")
    refused(text_files, tmp_path, "--deepspeed=/nope", message="deepspeed")
    refused(text_files, tmp_path, "--gradient_checkpointing=true", "--stateful_config",
            '{"training_solver": "sequential"}', message="goes without --gradient_checkpointing")  # fmt: skip
    refused(text_files, tmp_path, "--preset=warm_start", "--dataloader_persistent_workers=true",
            "--dataloader_num_workers=1", message="Leave out dataloader_persistent_workers")  # fmt: skip
    refused(text_files, tmp_path, "--report_to=foo", message="foo is not supported")
    refused(text_files, tmp_path, "--dataloader_num_workers=-1", message="dataloader_num_workers is -1")
    refused(text_files, tmp_path, "--metric_for_best_model=foo", message="metric_for_best_model is foo")
    refused(text_files, tmp_path, "--dataloader_drop_last", "--per_device_train_batch_size=9999",
            message="gives no whole batch")  # fmt: skip
    refused(text_files, tmp_path, "--patience=1", "--eval_strategy=no", message="there must be evaluations")


@pytest.mark.parametrize(
    "option,message",
    [
        ("--save_only_model=true", "save_only_model True: no run can go on"),
        ("--ignore_data_skip=true", "ignore_data_skip True: a run that goes on would"),
        ("--auto_find_batch_size=true", "auto_find_batch_size True: the batch size decides"),
        ("--restore_callback_states_from_checkpoint=false", "a run that goes on would not know"),
        ("--train_sampling_strategy=group_by_length", "train_sampling_strategy group_by_length: a run"),
        ("--optim_args=foo", "optim_args has 'foo'; its parts have the form name=value"),
        ("--neftune_noise_alpha=nan", "neftune_noise_alpha is nan"),
        ("--neftune_noise_alpha=-1", "neftune_noise_alpha is -1"),
        ("--dataloader_prefetch_factor=0", "dataloader_prefetch_factor is 0; it must be at least 1"),
        ("--eval_delay=nan", "eval_delay is nan"),
        ("--logging_steps=nan", "logging_steps is nan"),
        ("--save_steps=nan", "save_steps is nan; it must be more than 0"),
        ("--save_steps=0", "save_steps is 0.0; it must be more than 0"),
        ("--save_steps=-1", "save_steps is -1.0; it must be more than 0"),
        ('--accelerator_config={"foo": 1}', "AcceleratorConfig.* unexpected keyword argument 'foo'"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(option, message, text_files, tmp_path):
    with pytest.raises(RunError, match=message):
        parse(options(text_files, tmp_path, option))


SCHEDULE = "--lr_scheduler_type and --lr_scheduler_kwargs: "


@pytest.mark.parametrize(
    "given,message",
    [
        (["--lr_scheduler_type=warmup_stable_decay"], SCHEDULE + ".*num_decay_steps"),
        (["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"lr_end": 1}'], SCHEDULE + ".*lr_end"),
        (["--lr_scheduler_type=cosine_with_min_lr"], SCHEDULE + "One of min_lr"),
        (["--lr_scheduler_kwargs=foo"], SCHEDULE + ".*must be a mapping"),
        (['--lr_scheduler_kwargs={"foo": 1}'], SCHEDULE + ".*'foo'"),
        (['--lr_scheduler_kwargs={"num_cycles": NaN}'], "lr_scheduler_kwargs is .*nan.*; it must be finite"),
        (["--report_to=foo"], "--report_to: foo is not supported"),
        (["--report_to=wandb"], "--report_to: WandbCallback requires wandb"),
        (['--gradient_checkpointing_kwargs={"foo": 1}'], "--gradient_checkpointing_kwargs or .*foo"),
        (["--use_liger_kernel=true"], "--use_liger_kernel: liger-kernel is not installed"),
        (['--decoder_config={"return_dict": false}'], "GateLoopConfig has no field return_dict"),
        (['--decoder_config={"id2label": 5}'], "GateLoopConfig has no field id2label"),
        (['--stateful_config={"dtype": "foo"}'], "StatefulGPTConfig has no field dtype"),
        (['--decoder_config={"rope_parameters": {"rope_type": "yarn"}}'], "'rope_type'='yarn': {'factor'}"),
        (['--decoder_config={"layer_types": [["a"]]}'], "layer_types must be a list such as"),
        (['--decoder_config={"eos_token_id": 9999}'], "eos_token_id is 9999, but the vocabulary has 258 tokens"),
        pytest.param(["--torch_compile_mode=foo"], "torch_compile_mode: Unrec", marks=pytest.mark.exhaustive),
        pytest.param(["--torch_compile_backend=foo"], "torch_compile_mode: Inv", marks=pytest.mark.exhaustive),
    ],
)
def test_what_others_would_refuse_later_is_refused_at_once(given, message, text_files, tmp_path):
    if ("wandb" in given[0] and find_spec("wandb")) or ("liger" in given[0] and find_spec("liger_kernel")):
        pytest.skip("it is installed here")
    refused(text_files, tmp_path, *given, message=message)


def test_an_output_folder_that_holds_something_else_is_left_alone(text_files, tmp_path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds something that is not a run"):
        train(*parse(options(text_files, output)))
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]

    train(*parse(options(text_files, tmp_path / "run")))
    with pytest.raises(RunError, match=r"other settings \(hidden_size: 32 then, 64 now\)"):
        train(*parse(options(text_files, tmp_path / "run", "--hidden_size=64")))
    with pytest.raises(RunError, match=r"load_best_model_at_end: False then, True now"):
        train(*parse(options(text_files, tmp_path / "run", "--load_best_model_at_end=true", "--save_steps=3")))


def test_a_damaged_checkpoint_is_refused(text_files, tmp_path):
    checkpoint = tmp_path / "run"
    train(*parse(options(text_files, checkpoint)))
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()

    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="cannot be loaded"):
        load_model(str(checkpoint))
    refused(text_files, tmp_path, "--model_name_or_path", str(checkpoint), message="cannot be loaded")

    weights.unlink()
    with pytest.raises(RunError, match="cannot be loaded"):
        load_model(str(checkpoint))

    tensors = load(content)
    del tensors["model.feedback.key.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks weights: model.feedback.key.weight"):
        load_model(str(checkpoint))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(text_files, tmp_path):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    small.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(RunError, match="tokenizer has 258 tokens, the model's vocabulary only 100"):
        train(*parse(continued(text_files, tmp_path / "x", tmp_path / "small")))
    assert not (tmp_path / "x").exists()


MAINS = {"train.py": train_main, "evaluate.py": evaluate_main, "compare.py": compare_main}


def test_the_commands_say_what_is_wrong_in_one_line(text_files, tmp_path, monkeypatch, capsys):
    for script, arguments, message in (
        ("train.py", options([str(tmp_path / "none.txt")], tmp_path / "x"), "none.txt does not exist"),
        ("evaluate.py", [str(tmp_path / "nowhere")], "cannot be loaded"),
        ("evaluate.py", [str(tmp_path), "--passes", "0"], "--passes must be at least 1"),
        ("train.py", options(text_files, tmp_path / "x", "--stepz", "3"), "--stepz"),
        (
            "train.py",
            options(text_files, tmp_path / "x", "--resume_from_checkpoint", "nope"),
            "nope is no complete checkpoint",
        ),
        ("train.py", options(text_files, tmp_path / "x", "--tokenizer_name", "/nowhere"), "tokenizer /nowhere"),
        (
            "compare.py",
            options(text_files, tmp_path / "x", "--arms", "gpt", "stateful --stateful_config {}", "gpt --warm_start 1"),
            "--warm_start is for a model that feeds its hidden state back",
        ),
    ):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match=re.escape(message)) as ended:
            run_command(MAINS[script])
        # What is given to sys.exit as a text is printed, with the exit code 1.
        assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", MAINS)
def test_an_error_is_one_line_on_the_terminal(script, tmp_path):
    wrong = {"train.py": ["--text_file", "none.txt", "--output_dir", "x"], "evaluate.py": ["nowhere"]}
    wrong["compare.py"] = ["--arms", "gpt", *wrong["train.py"]]
    done = Interpreter(TRAINING / script, *wrong[script], cwd=tmp_path)
    assert done.wait() == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_loss_does_not_depend_on_how_evaluation_is_batched(text_files, tmp_path):
    train(*parse(options(text_files, tmp_path / "run")))
    model = load_model(str(tmp_path / "run"))
    blocks = token_blocks([topics["types"][:2000]], byte_tokenizer(), 32)
    nats = [mean_nats(model, blocks, None, batch_size=n) for n in (1, 7, 64)]
    assert nats == pytest.approx([nats[0]] * 3, rel=1e-5)
