"""What a run meets: numbers that are none, kills, damaged files, a full disk, another command, another text."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from errors import Diverged, RunError
from fresh import Interpreter
from runs import CHECKSUMS, LOCK, fault, is_empty, locked, saving
from safetensors.torch import load_file, save_file
from state_tracking import main as state_tracking_main
from test_training import TRAINING, options, plain_run, text_files  # noqa: F401
from tiny import few
from train import parse, settings_of, spent, train
from transformers import TrainerCallback

from modeling_stateful_gpt.unbounded import CONTEXTS

WILD = ["--learning_rate=1e30", "--max_grad_norm=0", "--warmup_steps=0", "--lr_scheduler_type=constant"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Numbers that are none


@pytest.mark.parametrize(
    "more", [[], ["--preset=warm_start"], ["--preset=step_per_pass"], *([f"--context={name}"] for name in CONTEXTS)]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_at_its_step(more, text_files, tmp_path):  # noqa: F811
    if more and "context" in more[0]:
        more = [*more, '--decoder_config={"layer_types": ["gateloop"]}', "--preset=gateloop"]
    arguments = options(text_files, tmp_path / "run", *WILD, *more, "--eval_strategy=no", "--save_steps=1")
    with pytest.raises(RunError, match=r"The (loss|gradient|update) of step [1-3] is not finite.*Lower"):
        train(*parse(arguments))
    assert not (tmp_path / "run/results.json").exists()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert all(z.isfinite().all() for z in weights(checkpoint).values())


LAST = ["--learning_rate=1e39", *WILD[1:], "--max_steps=1", "--weight_decay=0"]


@pytest.mark.parametrize("more", few([["--preset=gpt"], [], ["--preset=gateloop", "--context=unbounded"]], [[]]))
def test_the_last_update_is_looked_at_too(more, text_files, tmp_path):  # noqa: F811
    arguments = options(text_files, tmp_path, *LAST, "--save_strategy=no", "--eval_strategy=no", *more)
    with pytest.raises(Diverged, match=r"The update of step 1 is not finite.*use another --output_dir"):
        train(*parse(arguments))
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "model.safetensors").exists()


class Poison(TrainerCallback):
    """From a step on, the weights are no numbers."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)


def test_the_good_checkpoints_stay(text_files, tmp_path):  # noqa: F811
    arguments = options(text_files, tmp_path, "--save_steps=1", "--save_total_limit=1", "--eval_strategy=no")
    with pytest.raises(RunError, match="of step 4 is not finite"):
        train(*parse(arguments), callbacks=[Poison(3)])
    assert fault(tmp_path / "checkpoint-3") is None
    assert train(*parse(arguments))["step"] == 6


def test_a_base_that_is_no_number_is_refused_by_its_weights(text_files, plain_run, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(plain_run, base)
    state = weights(base)
    state["model.embed_tokens.weight"][0, 0] = torch.nan
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    given = [a for a in options(text_files, tmp_path / "run") if not a.startswith(("--hidden_size", "--num_hidden"))]
    with pytest.raises(RunError, match=r"weights that are not finite: model\.embed_tokens\.weight"):
        train(*parse([*given, f"--model_name_or_path={base}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wild", [["--max_steps=6", *WILD], LAST])
def test_state_tracking_stops_too(wild, tmp_path, monkeypatch):
    given = ["--models", "gpt", "--test_lengths", "12", "--hidden_size=16", "--use_cpu=true"]
    monkeypatch.setattr(sys, "argv", ["state_tracking.py", *given, *wild, f"--output_dir={tmp_path / 'runs'}"])
    with pytest.raises(Diverged, match=r"of step [1-3] is not finite"):
        state_tracking_main()
    assert not (tmp_path / "runs/runs.jsonl").exists()


# Kills


@pytest.mark.parametrize(
    "more",
    few(
        [
            [],
            ["--preset=warm_start"],
            ["--max_steps=-1", "--num_train_epochs=0.2"],
            ["--load_best_model_at_end=true"],
            ["--max_steps=-1", "--max_seconds=0.3", "--eval_steps=3"],
        ],
        [["--load_best_model_at_end=true"], ["--max_steps=-1", "--max_seconds=0.3", "--eval_steps=3"]],
    ),
)
def test_killed_after_its_last_step_a_run_only_finishes(more, text_files, tmp_path, caplog):  # noqa: F811
    arguments = options(text_files, tmp_path, "--save_steps=3", *more)
    results = train(*parse(arguments))
    expected = weights(tmp_path)
    for name in ("results.json", "model.safetensors"):
        (tmp_path / name).unlink()
    assert train(*parse(arguments))["step"] == results["step"]
    assert same(weights(tmp_path), expected)
    assert "missing keys" not in caplog.text


KILLED = """
import os, signal, sys
number, folder, training, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, training)
from train import main, run_command

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")
seen = 0

def look(event, arguments):
    global seen
    change = event in CHANGES or (event == "open" and arguments[2] & WRITING)
    if change and str(arguments[0]).startswith(folder):
        seen += 1
        if seen == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

def watched(write):
    def writing(value, file, *args, **kwargs):
        look("os.truncate", [str(file)])
        result = write(value, file, *args, **kwargs)
        look("os.truncate", [str(file)])
        return result
    return writing

# Written by C++ and Rust, which Python does not see.
import safetensors.torch, torch
torch.save, safetensors.torch.serialize_file = watched(torch.save), watched(safetensors.torch.serialize_file)
sys.addaudithook(look)
run_command(main)
print(seen)
"""
KINDS_OF_RUN = {
    "blocks": [],
    "best": ["--load_best_model_at_end=true", "--eval_steps=2"],
    "patience": ["--max_steps=-1", "--patience=1", "--eval_steps=2", "--learning_rate=1", "--max_grad_norm=0"],
    "random offsets": ["--random_offsets=true"],
    "warm start": ["--preset=warm_start", "--max_train_bytes=2000", "--max_steps=16", "--save_steps=4"],
    "a step for each pass": ["--preset=step_per_pass"],
    **{
        name: [
            "--preset=gateloop",
            f"--context={name}",
            "--chunk_size=512",
            "--progress_seconds=0",
            "--max_train_bytes=9000",
        ]
        for name in ("unbounded", "truncated")
    },
}


@pytest.mark.parametrize("kind,points", [*few([(kind, 16) for kind in KINDS_OF_RUN], []), ("warm start", 1)])
def test_killed_at_any_change_of_a_file_a_run_resumes_to_the_same_weights(kind, points, subtests, text_files, tmp_path):  # noqa: F811
    def arguments(name):
        return options(text_files, tmp_path / name, "--save_total_limit=2", *KINDS_OF_RUN[kind])

    def start(number, name):
        return Interpreter("-c", KILLED, number, tmp_path / name, TRAINING, *arguments(name))

    whole = start(0, "whole")
    assert whole.wait() == 0, whole.stderr
    changes = int(whole.stdout.splitlines()[-1])
    for number in (changes * point // (points + 1) for point in range(1, points + 1)):
        with subtests.test(kind=kind, killed_at=f"change {number} of {changes}"):
            name = f"killed-{number}"
            assert start(number, name).wait() == -signal.SIGKILL
            assert train(*parse(arguments(name))) is not None
            assert same(weights(tmp_path / name), weights(tmp_path / "whole"))
            shutil.rmtree(tmp_path / name)


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["unbounded", "warm start"])
def test_before_it_has_begun_a_killed_command_leaves_an_empty_folder(kind, text_files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("train.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*parse(options(text_files, tmp_path, *KINDS_OF_RUN[kind])))
    assert is_empty(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("3260 requested and 2048 written")])
def test_documents_are_written_when_the_run_is_noted(error, text_files, tmp_path, monkeypatch):  # noqa: F811
    def fail(*_):
        raise error

    monkeypatch.setattr("modeling_stateful_gpt.documents.Documents.parts", fail)
    full = pytest.raises(RunError, match=r"documents\.int32 could not be saved \(OSError: 3260 requested")
    with full if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
        train(*parse(options(text_files, tmp_path / "run", *KINDS_OF_RUN["unbounded"])))
    # What is killed goes on; what fails leaves the place to other settings.
    assert (tmp_path / "run/run.json").exists() != isinstance(error, OSError)


def test_what_a_killed_command_left_before_it_began_is_no_obstacle(text_files, tmp_path):  # noqa: F811
    (tmp_path / "run.json.new").write_text("{")
    (tmp_path / LOCK).touch()
    assert train(*parse(options(text_files, tmp_path)))["step"] == 6


def test_checkpoints_that_were_being_deleted_take_no_good_one_with_them(text_files, tmp_path):  # noqa: F811
    arguments = options(text_files, tmp_path, "--save_steps=2", "--save_total_limit=2", "--eval_strategy=no")
    train(*parse(arguments))
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / CHECKSUMS).unlink()
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-6")
    train(*parse(arguments))
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {
        "checkpoint-4", "checkpoint-6", "incomplete-checkpoint-2"
    }  # fmt: skip


# Damaged files


def damage(file, how):
    content = file.read_bytes()
    if how == "absent":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "zeroed": bytes(len(content))}[how])


@pytest.fixture(scope="module")
def finished(text_files, tmp_path_factory):  # noqa: F811
    """The folder of a run whose last step was made, and nothing after it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(*parse(options(text_files, folder, "--save_steps=2", "--eval_strategy=no")))
    (folder / "results.json").unlink()
    return folder


FILES = [
    "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", CHECKSUMS
]  # fmt: skip


@pytest.mark.parametrize("how", ["absent", "empty", "truncated", "zeroed"])
def test_no_file_of_a_checkpoint_can_be_damaged_unnoticed(how, finished):
    assert fault(finished / "checkpoint-6") is None
    assert {file.name for file in (finished / "checkpoint-6").iterdir()} >= set(FILES)
    for name in FILES:
        copy = finished.with_name(f"{how}-{name}")
        shutil.copytree(finished / "checkpoint-6", copy)
        damage(copy / name, how)
        assert name in fault(copy), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_damaged_a_run_goes_on_to_the_same_weights(name, subtests, text_files, finished, tmp_path):  # noqa: F811
    for how in ("absent", "empty", "truncated", "zeroed"):
        with subtests.test(file=name, damage=how):
            folder = tmp_path / how
            shutil.copytree(finished, folder)
            damage(folder / "checkpoint-6" / name, how)
            train(*parse(options(text_files, folder, "--save_steps=2", "--eval_strategy=no")))
            assert (folder / "incomplete-checkpoint-6").exists()
            assert same(weights(folder), weights(finished))


def test_a_flipped_bit_is_found(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-6", tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6/optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert fault(tmp_path / "checkpoint-6") == "optimizer.pt is damaged"


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(name, text_files, finished, tmp_path, capsys):  # noqa: F811
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoint-6" / name).unlink()
    train(*parse(options(text_files, tmp_path / "run", "--save_steps=2", "--eval_strategy=no")))
    said = capsys.readouterr().out
    assert f"checkpoint-6 is of no use ({name} is missing). It is now incomplete-checkpoint-6" in said
    assert f"Resuming from {tmp_path / 'run/checkpoint-4'}." in said
    assert same(weights(tmp_path / "run"), weights(finished))


def test_a_damaged_best_checkpoint_does_not_become_the_result(text_files, tmp_path, capsys):  # noqa: F811
    given = options(text_files, tmp_path, "--load_best_model_at_end=true", "--eval_steps=2", "--learning_rate=0")
    given += ["--save_total_limit=9"]
    best = f"checkpoint-{train(*parse(given))['step']}"
    assert best == "checkpoint-2", "it is the first, as nothing is learned"
    expected = weights(tmp_path)
    (tmp_path / "results.json").unlink()
    content = bytearray((tmp_path / best / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / best / "model.safetensors").write_bytes(content)
    train(*parse(given))
    said = capsys.readouterr().out
    assert f"the best one so far, {best}, is of no use: model.safetensors is damaged" in said
    assert f"incomplete-{best}" in said and same(weights(tmp_path), expected)


@pytest.mark.exhaustive
def test_killed_while_it_finishes_a_run_with_patience_and_states_goes_on(text_files, tmp_path, monkeypatch):  # noqa: F811
    given = [a for a in options(text_files, tmp_path, *KINDS_OF_RUN["patience"]) if "max_train" not in a]
    given += ["--preset=warm_start", "--random_offsets=true", "--max_train_bytes=1200", "--patience=2"]

    with monkeypatch.context() as patch:
        patch.setattr("train.draw", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*parse(given))
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "run.lock").unlink(missing_ok=True)
    assert train(*parse(given)) is not None


@pytest.mark.parametrize("content", ["{", "[]", "null", ""])
def test_a_damaged_note_of_the_run_is_named(content, text_files, finished, tmp_path):  # noqa: F811
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        train(*parse(options(text_files, tmp_path / "run", "--save_steps=2", "--eval_strategy=no")))
    (tmp_path / "run/results.json").write_text(content)
    (tmp_path / "run/run.json").write_bytes((finished / "run.json").read_bytes())
    with pytest.raises(RunError, match=r"results\.json is damaged"):
        train(*parse(options(text_files, tmp_path / "run", "--save_steps=2", "--eval_strategy=no")))


# A full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small file system")
def test_a_full_disk_is_named_and_nothing_is_lost(text_files, tmp_path):  # noqa: F811
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", small], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        given = options(text_files, small / "run", "--save_steps=1", "--save_total_limit=9", "--eval_strategy=no")
        with pytest.raises(RunError, match=r"checkpoint-\d could not be saved \(the disk is full.*complete is lost"):
            train(*parse(given))
        assert [c for c in (small / "run").glob("checkpoint-*") if fault(c)] == []
        assert (small / "run/checkpoint-1").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunError, match=r"x could not be saved \(PermissionError: no\)"), saving(tmp_path / "x", 1):
        raise PermissionError("no")


# Another command, another text


def test_a_folder_is_for_one_command_at_a_time(text_files, tmp_path):  # noqa: F811
    tmp_path.joinpath("run").mkdir()
    arguments = options(text_files, tmp_path / "run")
    with locked(tmp_path / "run"):
        other = Interpreter(TRAINING / "train.py", *arguments)
        assert other.wait() == 1 and "Another command is training in" in other.stderr
    assert not (tmp_path / "run/run.json").exists()
    assert train(*parse(arguments))["step"] == 6
    assert not (tmp_path / "run" / LOCK).exists()


def test_state_tracking_has_its_folder_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["state_tracking.py", "--models", "gpt", "--output_dir", str(tmp_path)])
    with locked(tmp_path), pytest.raises(RunError, match="Another command is training in"):
        state_tracking_main()


def test_a_run_is_of_one_text_and_one_base(text_files, plain_run, tmp_path):  # noqa: F811
    text, base = tmp_path / "text.txt", tmp_path / "base"
    shutil.copy(text_files[0], text)
    shutil.copytree(plain_run, base)
    sizes = ("--hidden_size", "--num_hidden_layers")
    arguments = [a for a in options([str(text)], tmp_path / "run") if not a.startswith(sizes)]
    arguments += [f"--model_name_or_path={base}", "--preset=stateful"]
    train(*parse(arguments))
    (tmp_path / "run/results.json").unlink()
    text.write_text(text.read_text().replace("a", "e", 1))
    with pytest.raises(RunError, match="a run of another text: what was read for it has changed"):
        train(*parse(arguments))
    shutil.copy(text_files[0], text)
    for name, field, value, what in (
        ("config.json", "rms_norm_eps", 0.1, "base config"),
        ("generation_config.json", "top_k", 7, "base config"),
        ("tokenizer.json", "normalizer", {"type": "Lowercase"}, "tokenizer"),
    ):
        content = (base / name).read_text()
        (base / name).write_text(json.dumps({**json.loads(content), field: value}))
        with pytest.raises(RunError, match=f"a run of another {what}:"):
            train(*parse(arguments))
        (base / name).write_text(content)
    state = weights(base)
    state["model.norm.weight"][0] += 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="a run of another base weights"):
        train(*parse(arguments))
    assert json.loads((tmp_path / "run/run.json").read_text())["text"]


@pytest.mark.parametrize(
    "option",
    [
        "--neftune_noise_alpha=5",
        "--train_sampling_strategy=sequential",
        '--accelerator_config={"split_batches": true}',
        "--dataloader_drop_last=true",
        "--optim_target_modules=all-linear",
    ],
)
def test_what_decides_the_result_is_noted(option, text_files, tmp_path):  # noqa: F811
    without, given = (settings_of(*parse(options(text_files, tmp_path, *more))) for more in ([], [option]))
    assert without != given


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", "null", '{"tokens": NaN, "seconds": 1}', '{"tokens": "x", "seconds": 1}']
)
def test_what_a_base_has_cost_is_said_or_its_file_is_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(RunError, match=r"results\.json does not say how many tokens and seconds were spent"):
        spent(str(tmp_path))
