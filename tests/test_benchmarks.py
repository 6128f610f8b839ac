"""The benchmarks run, and say what they claim to say; how long things take is for them alone."""

import json
import sys

import pytest
from benchmark import main as benchmark
from benchmark_solvers import main as benchmark_solvers
from test_training import options, text_files  # noqa: F401
from train import RunError, parse, train


def test_training_steps_and_decoding_are_compared_with_the_plain_model(monkeypatch, capsys):
    modes = ["token shift", "3 cyclic passes, gradient through the last", "warm start"]
    sizes = ["--hidden_size=32", "--num_hidden_layers=1", "--block_size=24", "--batch_size=3"]
    command = ["benchmark.py", "--pairs=1", "--feedback=gated_add", *sizes, "--modes", *modes, "decoding"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0]["hidden_size"], lines[0]["batch_size"]) == (32, 3)
    of_modes = [f"training step, gated_add, {mode}" for mode in modes]
    assert [line["what"] for line in lines[1:]] == [*of_modes, "decoding 64 tokens, gated_add"]
    assert all(line["ratio"] > 0 for line in lines[1:])


@pytest.mark.parametrize("option", ["--pairs=0", "--block_size=-1", "--hidden_size=12", "--feedback=none"])
def test_sizes_of_which_no_step_can_be_made_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", option])
    with pytest.raises(SystemExit):
        benchmark()
    assert option.split("=")[0].strip("-") in capsys.readouterr().err.splitlines()[-1]


def test_solvers_are_compared_with_stepping_and_drawn(text_files, tmp_path, monkeypatch, capsys):  # noqa: F811
    train(*parse(options(text_files, tmp_path / "run", "--preset=stateful", "--eval_strategy=no")))
    capsys.readouterr()
    command = ["benchmark_solvers.py", str(tmp_path / "run"), "--text_file", text_files[0], "--picture"]
    command += [str(tmp_path / "solvers.png"), "--length=40", "--pairs=1", "--passes=6", "--texts=2"]
    monkeypatch.setattr(sys, "argv", [*command, "--batch_sizes", "1", "3", "--groups", "1", "4"])
    benchmark_solvers()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["solver"], line["groups"], line.get("batch")) for line in lines[1:]] == [
        (solver, groups, batch) for solver, groups in (("jacobi", 1), ("cyclic", 4)) for batch in (None, 1, 3)
    ]
    for line in lines[1:]:
        assert line["error"] < 1e-3 and 1 < line["passes"] <= 40, line
    assert (tmp_path / "solvers.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*command, "--batch_sizes", "9999"])
    with pytest.raises(RunError, match="lower --batch_sizes"):
        benchmark_solvers()
    monkeypatch.setattr(sys, "argv", [*command, "--length=9999"])
    with pytest.raises(RunError, match="max_position_embeddings"):
        benchmark_solvers()
