"""States that are kept from one epoch to the next: each stays with its token."""

import json
import os
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from fresh import run_fresh_ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import TRAINING, losses, options, run_and_kill, text_files  # noqa: F401
from train import RunError, logger, parse, prepare_data, train
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.warm_start import StatesMissing, StateStore, WarmStart, Windows, collate

EPOCHS = 3


def arguments(text_files, folder, *more):  # noqa: F811
    """A few epochs of a few steps, cut elsewhere in each."""
    given = [a for a in options(text_files[:2], folder) if not a.startswith(("--max_steps", "--eval_steps"))]
    training = [
        f"--num_train_epochs={EPOCHS}",
        "--max_train_bytes=16000",
        "--random_offsets=true",
        "--eval_strategy=no",
        "--data_seed=5",
    ]
    return ["--preset=warm_start", *given, *training, "--save_steps=50", *more]


def states(folder, epoch):
    numbers = np.fromfile(folder / f"states/epoch-{epoch}.bf16", dtype=np.uint16)
    return torch.from_numpy(numbers).view(torch.bfloat16).view(-1, 32)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_every_epoch_visits_every_token_once(block_size, length, epoch, random_offsets):
    if length < block_size:
        with pytest.raises(ValueError, match="less than one window"):
            Windows(np.arange(length), block_size)
        return
    windows = Windows(np.arange(length) + 100, block_size, seed=3, random_offsets=random_offsets)
    windows.set_epoch(epoch)
    seen = []
    for index in range(len(windows)):
        item = windows[index]
        places = (item["start"] + np.arange(block_size)) % windows.num_tokens
        assert item["input_ids"].tolist() == (places + 100).tolist() and item["epoch"] == epoch
        seen += places.tolist()
    assert sorted(seen) == list(range(length // block_size * block_size))
    if not random_offsets:
        assert windows[0]["start"] == 0


def test_the_text_is_cut_elsewhere_in_each_epoch_and_again_the_same_after_a_resume():
    def offsets(seed):
        windows = Windows(np.arange(10_000), 100, seed)
        return [windows.set_epoch(epoch) or windows.offset for epoch in range(20)]

    assert offsets(0) == offsets(0) != offsets(1)
    assert len(set(offsets(0))) == 20


@given(st.data(), st.integers(1, 30), st.integers(1, 8))
def test_a_store_gives_back_what_each_token_had_an_epoch_ago(data, num_tokens, length):
    length = min(length, num_tokens)
    with TemporaryDirectory() as folder:
        store, reference = StateStore(folder, num_tokens, 4), {}
        starts = st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=4, unique=True)
        for epoch in range(3):
            kept = {}
            for start in data.draw(starts):
                h = torch.randn(1, length, 4)
                store.write(epoch, torch.tensor([start]), h.requires_grad_())
                kept |= {(start + i) % num_tokens: h[0, i].detach().bfloat16() for i in range(length)}
            read = data.draw(starts)
            # Another process opens the files for itself.
            got = StateStore(folder, num_tokens, 4).read(epoch, torch.tensor(read), length)
            if epoch == 0:
                assert got is None
            for row, start in enumerate(read if epoch > 0 else []):
                for i in range(length):
                    expected = reference.get((start + i) % num_tokens, torch.zeros(4, dtype=torch.bfloat16))
                    assert torch.equal(got[row, i], expected)
            reference = kept


def test_states_that_are_gone_or_have_no_room_are_said_to_be(tmp_path):
    store = StateStore(tmp_path, 10, 4)
    for epoch in range(3):
        store.write(epoch, torch.tensor([0]), torch.ones(1, 10, 4))
    store.keep({1, 2, 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-1.bf16", "epoch-2.bf16"]
    with pytest.raises(FileNotFoundError, match=r"epoch-0.bf16 is missing, and training cannot go on"):
        store.read(1, torch.tensor([0]), 5)
    (tmp_path / "epoch-0.bf16").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"epoch-0.bf16 is damaged"):
        store.read(1, torch.tensor([0]), 5)
    with pytest.raises(OSError, match="states of another text or width"):
        StateStore(tmp_path, 10, 5).write(1, torch.tensor([0]), torch.ones(1, 10, 5))
    with pytest.raises(OSError, match=r"take 2 times 8,000,000.00 GB.*Use less text"):
        StateStore(tmp_path, 10**12, 4000)


def test_a_batch_reads_what_its_tokens_had_an_epoch_ago(text_files, tmp_path):  # noqa: F811
    """With a learning rate of 0 the model stays what it was, and every epoch can be done again by hand."""
    train(*parse(arguments(text_files, tmp_path / "run", "--learning_rate=0", "--save_strategy=no")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").train()
    tokens = corpus(text_files)
    windows, before = Windows(tokens, 32, seed=5), None
    for epoch in range(EPOCHS):
        windows.set_epoch(epoch)
        batch = collate([windows[i] for i in range(len(windows))])
        places = (batch["start"][:, None] + torch.arange(32)) % windows.num_tokens
        guess = None if before is None else before[places].float()
        after = torch.zeros(windows.num_tokens, 32)
        with torch.no_grad():
            after[places] = model(batch["input_ids"], initial_states=guess).states
        before = after.bfloat16()
    assert (states(tmp_path / "run", EPOCHS - 1) - before).abs().max() < 0.05
    assert (states(tmp_path / "run", EPOCHS - 1) == before).float().mean() > 0.98


def corpus(text_files):  # noqa: F811
    _, data_arguments, _ = parse(arguments(text_files, "unused"))
    return np.concatenate(prepare_data(data_arguments).train["input_ids"])


def test_the_first_epoch_is_the_plain_model(text_files, tmp_path, monkeypatch):  # noqa: F811
    # Which alone would be refused.
    monkeypatch.setattr("train.never_fed_back", lambda config: False)
    plain = ["--preset=jacobi", '--stateful_config={"num_passes": 1}']
    weights = []
    for name, more in (("warm", []), ("plain", plain)):
        train(*parse(arguments(text_files, tmp_path / name, *more, "--num_train_epochs=1", "--save_strategy=no")))
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_and_resumed_every_state_stays_with_its_token(text_files, tmp_path, capsys):  # noqa: F811
    mixture = '--stateful_config={"pass_probabilities": [0.75, 0.25]}'
    more = [mixture, "--dropout=0.1", "--save_steps=30", "--save_total_limit=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(*parse(arguments(text_files, whole, *more)))
    steps = json.loads((sorted(whole.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())["max_steps"]

    # In the middle of the second epoch, and past some checkpoints.
    run_and_kill(arguments(text_files, killed, *more), losses=steps // 2 + 1)
    train(*parse(arguments(text_files, killed, *more)))
    assert "Resuming from" in capsys.readouterr().out
    assert torch.equal(states(killed, EPOCHS - 1), states(whole, EPOCHS - 1))
    assert len(list((killed / "states").iterdir())) == 1, "the others are of no use any more"
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_spread_over_two_processes_every_state_stays_with_its_token(text_files, tmp_path):  # noqa: F811
    # Whole batches only: accelerate would fill up what is left over, and tokens be visited twice in an epoch.
    two_epochs = ["--dataloader_drop_last=true", "--num_train_epochs=2"]
    train(*parse(arguments(text_files, tmp_path / "one", *two_epochs)))
    halves = ["--per_device_train_batch_size=4", *two_epochs]
    run_fresh_ranks("two_cpu_processes.yaml", TRAINING / "train.py", *arguments(text_files, tmp_path / "two", *halves))
    a, b = (states(tmp_path / name, 1) for name in ("one", "two"))
    assert torch.equal((a != 0).any(1), (b != 0).any(1)), "the same tokens were visited"
    assert (a - b).abs().max() < 0.1
    assert (a - b.roll(1, 0)).abs().max() > 1, "those of the neighbours are others"


def trainer_of(text_files, folder, store, **more):  # noqa: F811
    windows = Windows(corpus(text_files), 32, seed=5)
    model = StatefulGPTForCausalLM(
        StatefulGPTConfig(
            text_config=GateLoopConfig(hidden_size=32, num_hidden_layers=1), training_solver="jacobi",
            num_no_grad_passes=0,
        )
    )  # fmt: skip
    given = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False, num_train_epochs=2,
        per_device_train_batch_size=32, save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    return WarmTrainer(
        model, given, data_collator=collate, train_dataset=windows, eval_dataset=windows, state_store=store
    )


class WarmTrainer(WarmStart, Trainer):
    """As in the module's docstring."""


def test_a_trainer_of_ones_own_evaluates_without_touching_the_states(text_files, tmp_path):  # noqa: F811
    store = StateStore(tmp_path / "states", Windows(corpus(text_files), 32).num_tokens, 32)
    (tmp_path / "states").mkdir()
    (tmp_path / "states/epoch-0.bf16").write_bytes(b"\0\1" * (store.size // 2))  # of a run that came to nothing
    trainer = trainer_of(text_files, tmp_path, store)
    trainer.train()
    before = states(tmp_path, 1).clone()
    assert (before != 0).any(1).all()
    assert trainer.evaluate()["eval_loss"] > 0
    assert torch.equal(states(tmp_path, 1), before)


def test_workers_that_keep_the_first_epoch_are_refused(text_files, tmp_path):  # noqa: F811
    store = StateStore(tmp_path / "states", Windows(corpus(text_files), 32).num_tokens, 32)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(ValueError, match="Leave out dataloader_persistent_workers"):
        trainer_of(text_files, tmp_path, store, **workers)
    trainer_of(text_files, tmp_path, store, dataloader_num_workers=1).train()


def test_a_run_goes_on_from_a_warm_started_checkpoint(text_files, tmp_path):  # noqa: F811
    train(*parse(arguments(text_files, tmp_path / "first")))
    more = [
        a for a in arguments(text_files, tmp_path / "next") if not a.startswith(("--hidden", "--num_h", "--preset"))
    ]
    more += ["--model_name_or_path", str(tmp_path / "first")]
    with pytest.raises(RunError, match=r"A single pass without states to start from is plain.*Give --warm_start true"):
        train(*parse(more))
    train(*parse([*more, "--warm_start=true"]))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "next")]
    assert not torch.equal(*(w["model.feedback.value.weight"] for w in weights))
    results = json.loads((tmp_path / "next/results.json").read_text())
    assert results["warm_start"]["from_states"] == pytest.approx(results["warm_start"]["stepped"], rel=0.05)


def test_states_are_said_to_be_of_little_use_for_a_single_epoch(text_files, tmp_path, caplog):  # noqa: F811
    logger.addHandler(caplog.handler)
    train(*parse([*options(text_files, tmp_path / "run"), "--preset=warm_start", "--eval_strategy=no"]))
    logger.removeHandler(caplog.handler)
    assert "6 steps are only 0." in caplog.text


DAMAGE = {
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not finite": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(contents):
    # The last states that are there.
    place = max(i for i, byte in enumerate(contents) if byte)
    return contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :]


@pytest.fixture(scope="module")
def in_the_second_epoch(text_files, tmp_path_factory):  # noqa: F811
    """The options and the folder of a run that is half through its second epoch."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    given = arguments(text_files, folder, "--save_strategy=no")

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.epoch > 1.5:
                os.kill(os.getpid(), signal.SIGINT)

    assert train(*parse(given), callbacks=[Interrupt()]) is None
    return given, folder


@pytest.mark.parametrize("epoch", [0, 1])
def test_no_states_can_be_damaged_unnoticed(epoch, in_the_second_epoch, tmp_path):
    _, folder = in_the_second_epoch
    (checkpoint,) = folder.glob("checkpoint-*")
    for name, damage in DAMAGE.items():
        shutil.copytree(folder / "states", tmp_path / name)
        store = StateStore(tmp_path / name, states(folder, 0).shape[0], 32)
        store.check([*checkpoint.glob("states_*")])
        store = StateStore(tmp_path / name, states(folder, 0).shape[0], 32)
        path = tmp_path / name / f"epoch-{epoch}.bf16"
        damage(path)
        what = "missing" if name == "missing" else "damaged"
        with pytest.raises(StatesMissing, match=rf"epoch-{epoch}\.bf16 is {what}, and training cannot go on without"):
            store.check([*checkpoint.glob("states_*")])
        assert path.exists() == (name != "missing"), "not made anew"


def test_a_run_goes_on_when_its_damaged_states_are_put_back(in_the_second_epoch, tmp_path):
    given, folder = in_the_second_epoch
    given = [*given, f"--output_dir={tmp_path / 'run'}"]
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run/states/epoch-1.bf16"
    DAMAGE["zeroed"](path)
    with pytest.raises(RunError, match=r"epoch-1\.bf16 is damaged, and training cannot go on without"):
        train(*parse(given))
    shutil.copy(folder / "states/epoch-1.bf16", path)
    train(*parse(given))
    train(*parse([*given, f"--output_dir={tmp_path / 'whole'}"]))
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
