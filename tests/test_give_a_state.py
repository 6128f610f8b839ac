"""The experiment that gives a trained model a state, on a tiny random one whose tokenizer knows its words."""

import json
import random

import pytest
import torch
from tiny import LLAMA_LIKE
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_stateful_gpt import StatefulGPTForCausalLM
from training.experiments.give_a_state import ARMS, TASKS, Run, Words, main, parse


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    words = [word for task in TASKS.values() for word in (*task.moves, *task.states)]
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = Split(Regex(r" ?\S+"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, "max_position_embeddings": 256})).save_pretrained(folder)
    return folder


def options(checkpoint, folder, *more):
    return [str(checkpoint), "--output_dir", str(folder), "--max_moves", "4", "--test_moves", "3", "9", *more]


@pytest.mark.parametrize("task", TASKS)
def test_each_answer_is_the_state_after_its_move(task, checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    words = Words(TASKS[task], tokenizer)
    ids, states = words.batch(3, 7, random.Random(0))
    for row, seen in zip(ids[:, len(words.beginning) :].tolist(), states.tolist(), strict=True):
        state = 0
        for move, after in zip(row, seen, strict=True):
            state = TASKS[task].moves[tokenizer.decode([move])](state)
            assert state == after


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_what_it_says_and_reports_its_accuracy(arm, checkpoint, tmp_path):
    result = main(options(checkpoint, tmp_path, "--arm", arm, "--max_steps", "10", "--lora_rank", "2"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1] == result and set(result["accuracy"]) == {"3", "9"} and result["steps"] == 10
    fusion = 2 * 32 * 32 + 32 + 32 * 32 + 32
    assert (result["trained"] == fusion) == (arm == "state")
    if arm != "lora":
        state = StatefulGPTForCausalLM.from_backbone(checkpoint, state=tmp_path / "state")
        assert hasattr(state, "disable_adapter") == ("lora" in arm)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(checkpoint, tmp_path):
    whole = main(options(checkpoint, tmp_path / "whole", "--max_steps", "20"))
    first = Run(parse(options(checkpoint, tmp_path / "parts", "--max_steps", "10")))
    first.train()
    parts = main(options(checkpoint, tmp_path / "parts", "--max_steps", "20"))
    timeless = [{name: value for name, value in run.items() if name != "seconds"} for run in (whole, parts)]
    assert timeless[0] == timeless[1]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1]
