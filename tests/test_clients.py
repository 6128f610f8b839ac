"""What people run around a model, with the real packages: trl, lm-eval, streamers, a server, pipelines, other heads.

The models are tiny but have learned three chats, so that a right answer can be told from a wrong one.
"""

import copy
import json
import os
import random
import socket
import threading
import time
import urllib.request
from functools import cache, partial
from itertools import product

import pytest
import torch
from data import byte_tokenizer
from datasets import Dataset
from fresh import Interpreter, run_fresh
from tiny import JACOBI, few
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    LlamaConfig,
    TextIteratorStreamer,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_pt_utils import LabelSmoother

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM

OURS = ["stateful", "hybrid"]
NAMES = [*OURS, "stateful around gpt2", "stateful around llama"]
CHATS = {"hi": "hello", "one": "two six", "up and up": "down"}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
BY_NAME = 'import json, sys; sys.modules["modeling_stateful_gpt"] = None  # any import of the package now fails\n'


def small_config(name):
    tokens = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    gateloop = {"hidden_size": 32, "num_hidden_layers": 2, **tokens}
    if name == "hybrid":
        return GateLoopConfig(**gateloop, layer_types=["gateloop", "full_attention"])
    if name == "stateful around gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        decoder = GPT2Config(n_embd=32, n_layer=2, n_head=4, **dropout, **tokens)
    elif name == "stateful around llama":
        decoder = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **tokens
        )
    else:
        decoder = GateLoopConfig(**gateloop)
    return StatefulGPTConfig(text_config=decoder, tolerance=1e-6, **JACOBI, num_passes=3)


def small(name):
    torch.manual_seed(0)
    config = small_config(name)
    return (StatefulGPTForCausalLM if name.startswith("stateful") else GateLoopForCausalLM)(config)


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat(question):
    return [{"role": "user", "content": question}]


def prompt(question):
    return chat_tokenizer().apply_chat_template(chat(question), tokenize=False, add_generation_prompt=True)


def chats():
    return Dataset.from_dict({"messages": [[*chat(q), {"role": "assistant", "content": a}] for q, a in CHATS.items()]})


@cache
def learned(name):
    """In eval mode. Tests leave it as it is."""
    model, tokenizer = small(name), chat_tokenizer()
    batch = tokenizer(
        [prompt(q) + a + tokenizer.eos_token for q, a in CHATS.items()], padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(**batch, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(model, folder):
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def answer(model, question, max_new_tokens=20):
    inputs = chat_tokenizer()(prompt(question), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return chat_tokenizer().decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def stepped_logits(model, ids):
    """One token after the other, as the model decodes: what every other evaluation must agree with."""
    logits, cache = [], None
    for position in range(ids.shape[1]):
        outputs = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, outputs.logits], outputs.past_key_values
    return torch.cat(logits, dim=1)


def run_by_name(code, *arguments):
    """Runs `code` in a process that only knows a folder's name, and returns what it prints last as JSON."""
    return json.loads(run_fresh("-c", BY_NAME + code, *arguments).splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_what_the_models_have_learned(name):
    assert {question: answer(learned(name), question) for question in CHATS} == CHATS


def sft_trainer(model, folder, **arguments):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    arguments = {"max_length": 64, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **arguments}
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **arguments),
        train_dataset=chats(),
        eval_dataset=chats(),
        processing_class=chat_tokenizer(),
    )


PADDED_AND_PACKED = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


@pytest.mark.client("trl", "`SFTTrainer` on chats, default loss and `packing=True`")
@pytest.mark.parametrize("name,packing", few(product(OURS, [False, True]), [("stateful", True), ("hybrid", False)]))
def test_sft_trainer_teaches_chats(name, packing, tmp_path):
    trainer = sft_trainer(small(name), tmp_path, max_steps=120, logging_steps=1, packing=packing)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 5 and losses[-1] < 0.5
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {question: answer(loaded, question) for question in CHATS} == CHATS


@pytest.mark.client("trl", "`SFTTrainer` on chats, default loss and `packing=True`")
@PADDED_AND_PACKED
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_an_sft_batch_is_that_of_stepping_through_its_documents(name, packing, tmp_path):
    model = copy.deepcopy(learned(name))
    trainer = sft_trainer(model, tmp_path, packing=packing)
    batch = next(iter(trainer.get_train_dataloader()))
    if packing:
        documents = batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())
    else:
        documents = [ids[real.bool()] for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert len(documents) == len(CHATS)
    losses = [nn.functional.cross_entropy(stepped_logits(model, ids[None])[0, :-1], ids[1:]) for ids in documents]
    tokens = [len(ids) - 1 for ids in documents]
    expected = sum(loss.item() * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    with torch.no_grad():
        assert trainer.compute_loss(model.eval(), dict(batch)).item() == pytest.approx(expected, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def smoothed_loss(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return LabelSmoother(0.3)(model(**inputs, use_cache=False), batch["labels"], shift_labels=True)


def smoothing_trainer(model, folder, **more):
    arguments = TrainingArguments(folder, label_smoothing_factor=0.3, use_cpu=True, report_to="none", disable_tqdm=True)
    examples = [chat_tokenizer()(prompt(question)) for question in CHATS]
    collator = DataCollatorForLanguageModeling(chat_tokenizer(), mlm=False)
    return Trainer(model, arguments, collator, train_dataset=examples, eval_dataset=examples, **more)


@pytest.mark.parametrize("kind", ["local", "subclass", "remote", "adapted"])
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_trainer_smooths_the_labels_of_the_next_tokens(name, kind, tmp_path):
    model = small(name)
    if name == "stateful":
        model.config.num_passes = 1
    if kind == "subclass":
        model.__class__ = type("Mine", (type(model),), {})
    elif kind == "remote":
        model = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / name), trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
    elif kind == "adapted":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0))
    trainer = smoothing_trainer(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = smoothed_loss(model.train(), batch).item()
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected, abs=1e-5)
    expected = smoothed_loss(model.eval(), batch).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_model_is_shown_under_its_own_name():
    assert str(small("stateful")).startswith("StatefulGPTForCausalLM(\n  (model): StatefulGPTModel(\n")
    assert str(small("hybrid")).startswith("GateLoopForCausalLM(\n  (model): GateLoopModel(\n")


@pytest.mark.parametrize(
    "make",
    [
        smoothing_trainer,
        partial(smoothing_trainer, compute_loss_func=partial(LabelSmoother(0.3), shift_labels=True)),
        partial(sft_trainer, label_smoothing_factor=0.3),
    ],
    ids=["Trainer", "compute_loss_func", "SFTTrainer"],
)
def test_a_loss_from_the_logits_trains_on_average_every_pass(make, tmp_path):
    model = copy.deepcopy(learned("stateful")).train()
    trainer = make(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        for parameter in model.model.feedback.parameters():
            parameter.mul_(4)  # it has learned the chats for any number of passes; now their losses differ
        states = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).pass_hidden_states
        passes = [LabelSmoother(0.3)([model.lm_head(h)], batch["labels"], shift_labels=True) for h in states]
        mean = torch.stack(passes).mean()
        drawn = torch.stack([trainer.compute_loss(model, dict(batch)) for _ in range(64)])
    assert abs(passes[-1] - mean) > 0.3
    torch.testing.assert_close(drawn.mean(), mean, rtol=0, atol=0.05)


@PADDED_AND_PACKED
def test_an_sft_step_trains_on_average_the_mean_over_all_passes(packing, tmp_path):
    # trl puts its own head on the model without a head, of which it sees one hidden state for each token.
    model = copy.deepcopy(learned("stateful"))
    trainer = sft_trainer(model, tmp_path, packing=packing)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with torch.no_grad():
        for parameter in model.model.feedback.parameters():
            parameter.mul_(2)  # it has learned the chats for any number of passes; now their losses differ
        passes = model(**batch, use_cache=False).pass_losses
        mean = torch.stack([trainer.compute_loss(model, dict(batch)) for _ in range(64)]).mean()
    assert passes.std() > passes.mean() / 2
    torch.testing.assert_close(mean, passes.mean(), rtol=0.1, atol=0)


def test_gradients_of_an_sft_step_go_through_the_feedback(tmp_path):
    model = small("stateful")
    trainer = sft_trainer(model, tmp_path)
    trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
    assert all(parameter.grad.any() for parameter in model.model.feedback.parameters())


SFT_BY_NAME = """
from datasets import load_dataset
from transformers import pipeline
from trl import SFTConfig, SFTTrainer
chats, *folders = sys.argv[1:]
answers = []
for folder in folders:
    arguments = SFTConfig(
        folder + "/trained", trust_remote_code=True, max_steps=80, learning_rate=1e-2, per_device_train_batch_size=4,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    )
    data = load_dataset("json", data_files=chats, cache_dir=folder + "/cache", split="train")
    trainer = SFTTrainer(folder, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    generator = pipeline("text-generation", model=folder + "/trained", trust_remote_code=True)
    replies = generator([messages[:1] for messages in data["messages"]], max_new_tokens=20, do_sample=False)
    answers.append([reply[0]["generated_text"][-1]["content"] for reply in replies])
print(json.dumps(answers))
"""


def test_sft_trainer_takes_the_name_of_a_folder_with_code(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    chats().to_json(tmp_path / "chats.jsonl")
    folders = [save(small(name), tmp_path / name) for name in OURS]
    assert run_by_name(SFT_BY_NAME, tmp_path / "chats.jsonl", *folders) == [list(CHATS.values())] * len(OURS)


SOLVED = {"training_solver": "cyclic", "num_no_grad_passes": None, "num_passes": 1}


def policy(folder, **config):
    """A model whose passes differ, loaded from a folder: trl loads the reference from there as well."""
    model = copy.deepcopy(learned("stateful around llama"))
    model.config.update(config)
    with torch.no_grad():
        for parameter in model.model.feedback.parameters():
            parameter.mul_(2)
    return AutoModelForCausalLM.from_pretrained(save(model, folder))


def first_logs(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trl_arguments(folder, **arguments):
    common = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    return {"output_dir": str(folder / "out"), "disable_tqdm": True, **common, **arguments}


@pytest.mark.client("trl", "`DPOTrainer`, trained by the solved recurrence")
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_dpo_starts_with_policy_and_reference_alike(lora, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def answers(text):
        return [[{"role": "assistant", "content": text(answer)}] for answer in CHATS.values()]

    preferences = {"chosen": answers(str), "rejected": answers(lambda answer: answer[::-1])}
    trainer = trl.DPOTrainer(
        policy(tmp_path, **SOLVED),
        args=trl.DPOConfig(**trl_arguments(tmp_path, per_device_train_batch_size=3, learning_rate=1e-3)),
        train_dataset=Dataset.from_dict({"prompt": [chat(question) for question in CHATS], **preferences}),
        processing_class=chat_tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["feedback"]) if lora else None,
    )
    assert trainer.args.gradient_checkpointing
    (first,) = first_logs(trainer)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-3) and first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert first["grad_norm"] > 0


@pytest.mark.client("trl", "`GRPOTrainer`, trained by the solved recurrence")
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_grpo_starts_without_divergence_and_clips_nothing_of_an_unchanged_policy(lora, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12}
    trainer = trl.GRPOTrainer(
        policy(tmp_path, **SOLVED),
        reward_funcs=lambda completions, **kwargs: [float(len(c[0]["content"])) for c in completions],
        # Without a learning rate the policy stays; any clipping is that of two functions that differ.
        args=trl.GRPOConfig(
            **trl_arguments(tmp_path, max_steps=4, beta=0.1, num_iterations=2, learning_rate=0.0, epsilon=1e-3, **sizes)
        ),
        train_dataset=Dataset.from_dict({"prompt": [chat(question) for question in CHATS]}),
        processing_class=chat_tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["feedback"]) if lora else None,
    )
    assert trainer.args.gradient_checkpointing
    for entry in first_logs(trainer):
        assert entry["kl"] == pytest.approx(0, abs=1e-3)
        assert entry["clip_ratio/region_mean"] == 0


QUESTIONS = [
    {"context": prompt(question), "choices": [*CHATS.values()], "answer": number}
    for number, question in enumerate(CHATS)
]
TASKS = {
    "chats_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "chats_generate": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["lo"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder):
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{context}}"}
    for name, task in TASKS.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    return folder


def evaluate_tasks(folder, model, **arguments):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=chat_tokenizer(), **arguments)
    manager = TaskManager(include_path=str(write_tasks(folder)), include_defaults=False)
    return simple_evaluate(lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)


@pytest.mark.client("lm-eval", "loglikelihood and generate_until")
@pytest.mark.parametrize("name", NAMES)
def test_lm_eval_scores_and_generates_as_the_model_does_step_by_step(name, tmp_path):
    model, tokenizer = learned(name), chat_tokenizer()
    outcome = evaluate_tasks(tmp_path, model, batch_size=4)
    assert outcome["results"]["chats_choice"]["acc,none"] == 1
    for sample in outcome["samples"]["chats_choice"]:
        for (context, choice), response in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids = tokenizer(context + choice, return_tensors="pt")["input_ids"]
            log_probabilities = stepped_logits(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            # lm-eval counts the space at the end of the context as the choice's.
            expected = log_probabilities[-len(" " + choice) :].sum().item()
            assert response[0] == pytest.approx(expected, abs=1e-4, rel=1e-4)
    for sample in outcome["samples"]["chats_generate"]:
        question = [*CHATS][sample["doc"]["answer"]]
        assert sample["filtered_resps"] == [answer(model, question, max_new_tokens=12).split("lo")[0]]


LM_EVAL_BY_NAME = """
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
tasks, names, *folders = sys.argv[1:]
results = []
for folder in folders:
    lm = HFLM(pretrained=folder, trust_remote_code=True, batch_size=4, device="cpu")
    manager = TaskManager(include_path=tasks, include_defaults=False)
    samples = simple_evaluate(lm, tasks=names.split(), task_manager=manager, bootstrap_iters=0)["samples"]
    results.append({name: [sample["filtered_resps"] for sample in samples[name]] for name in samples})
print(json.dumps(results))
"""


def test_lm_eval_takes_the_name_of_a_folder_with_code(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folders = [save(learned(name), tmp_path / name) for name in OURS]
    by_name = run_by_name(LM_EVAL_BY_NAME, write_tasks(tmp_path), " ".join(TASKS), *folders)
    for name, seen in zip(OURS, by_name, strict=True):
        samples = evaluate_tasks(tmp_path, learned(name))["samples"]
        for generated, expected in zip(seen["chats_generate"], samples["chats_generate"], strict=True):
            assert generated == expected["filtered_resps"]
        for scores, expected in zip(seen["chats_choice"], samples["chats_choice"], strict=True):
            torch.testing.assert_close(torch.tensor(scores)[:, 0], torch.tensor(expected["filtered_resps"])[:, 0])


@pytest.mark.client("transformers", "`TextStreamer`, `TextIteratorStreamer`")
@pytest.mark.parametrize("name", NAMES)
def test_streamed_text_is_the_text(name, capsys):
    model, tokenizer = learned(name), chat_tokenizer()
    inputs = tokenizer(prompt("one"), return_tensors="pt")
    skip = {"skip_prompt": True, "skip_special_tokens": True}
    arguments = {**inputs, "max_new_tokens": 12, "do_sample": False}

    model.generate(**arguments, streamer=TextStreamer(tokenizer, **skip))
    assert capsys.readouterr().out == "two six\n"

    streamer = TextIteratorStreamer(tokenizer, timeout=60, **skip)
    thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1 and "".join(pieces) == answer(model, "one") == "two six"


@pytest.mark.client("transformers", "`pipeline`, with chats and batches")
@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_answers_prompts_of_different_lengths_together_as_alone(name):
    generator = pipeline("text-generation", model=learned(name), tokenizer=chat_tokenizer())
    arguments = {"max_new_tokens": 12, "do_sample": False}
    prompts = [*map(prompt, CHATS), "x", "user: what is this? assistant"]
    together = generator(prompts, batch_size=len(prompts), **arguments)
    assert together == [generator(text, **arguments) for text in prompts]
    replies = generator([chat(question) for question in CHATS], batch_size=len(CHATS), **arguments)
    assert [reply[0]["generated_text"][-1]["content"] for reply in replies] == [*CHATS.values()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `transformers serve`."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = BY_NAME + "from transformers.cli.transformers import main; main()"
    process = Interpreter("-c", program, "serve", "--trust-remote-code", "--device=cpu", f"--port={port}")
    try:
        for _ in range(300):
            assert process.is_alive(), process.stderr
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.client("transformers", "`transformers serve`, asked by the `openai` client (see below)")
@pytest.mark.parametrize("name", OURS)
def test_transformers_serve_answers_chats(name, server, tmp_path):
    from openai import OpenAI

    folder = save(learned(name), tmp_path / name)
    # `transformers serve` looks the architecture up in transformers itself, remote code or not, and would fail.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AutoModelForCausalLM"]}))
    completions = OpenAI(base_url=server, api_key="none").chat.completions
    for question, expected in CHATS.items():
        request = {"model": str(folder), "messages": chat(question), "max_tokens": 12, "temperature": 0}
        assert completions.create(**request).choices[0].message.content == expected
        pieces = [chunk.choices[0].delta.content or "" for chunk in completions.create(**request, stream=True)]
        assert "".join(pieces) == expected


HEADS = {
    "sequence": (AutoModelForSequenceClassification, DataCollatorWithPadding),
    "token": (AutoModelForTokenClassification, DataCollatorForTokenClassification),
}
KINDS_OF_HEAD = pytest.mark.parametrize("kind", HEADS)


def words(kind, number, seed):
    """Random words; the question is whether the letter before, of each letter or of the last one, is an a, b or c."""
    generator, rows = random.Random(seed), []
    for _ in range(number):
        word = "".join(generator.choices("abcdefgh", k=generator.randint(2, 9)))
        labels = [0, *(int(letter in "abc") for letter in word[:-1])]
        rows.append({**chat_tokenizer()(word), "labels": labels[-1] if kind == "sequence" else labels})
    return Dataset.from_list(rows)


@KINDS_OF_HEAD
@pytest.mark.parametrize("name", NAMES)
def test_a_classification_head_keeps_the_model_under_it(name, kind, tmp_path):
    model = learned(name)
    head = HEADS[kind][0].from_pretrained(save(model, tmp_path), num_labels=3)
    assert head.config.num_labels == 3 and head.score.weight.shape[0] == 3
    torch.testing.assert_close(head.base_model.state_dict(), model.base_model.state_dict(), rtol=0, atol=0)


@pytest.mark.client("transformers", "`…ForSequenceClassification`, `…ForTokenClassification`")
@pytest.mark.parametrize("name,kind", few(product(OURS, HEADS), [("stateful", "token")]))
def test_classification_is_learned(name, kind, tmp_path):
    model_class, collator = HEADS[kind]
    trainer = Trainer(
        model_class.from_pretrained(save(learned(name), tmp_path), num_labels=2),
        TrainingArguments(
            tmp_path, max_steps=160, per_device_train_batch_size=32, learning_rate=1e-2, logging_steps=10,
            use_cpu=True, report_to="none", disable_tqdm=True,
        ),
        data_collator=collator(chat_tokenizer()),
        train_dataset=words(kind, 1000, seed=0),
        processing_class=chat_tokenizer(),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    outcome = trainer.predict(words(kind, 100, seed=1))
    real = outcome.label_ids != -100
    assert (outcome.predictions.argmax(-1) == outcome.label_ids)[real].mean() > 0.9


@KINDS_OF_HEAD
@pytest.mark.parametrize("name", NAMES)
def test_classification_does_not_see_padding(name, kind, tmp_path):
    model = HEADS[kind][0].from_pretrained(save(learned(name), tmp_path), num_labels=3)
    texts = ["a", "hello", "some words"]
    for side in ("left", "right"):
        batch = chat_tokenizer()(texts, return_tensors="pt", padding=True, padding_side=side)
        together = model(**batch).logits
        for text, logits, real in zip(texts, together, batch["attention_mask"].bool(), strict=True):
            alone = model(**chat_tokenizer()(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(logits if kind == "sequence" else logits[real], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_a_padding_token_can_be_given_with_the_classification_head(name, tmp_path):
    model = small(name)
    model.config.get_text_config().pad_token_id = None
    model.save_pretrained(tmp_path)
    given = AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=257)
    later = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    later.load_state_dict(given.state_dict())
    later.config.pad_token_id = 257
    batch = chat_tokenizer()(["a", "hello"], return_tensors="pt", padding=True)
    torch.testing.assert_close(later(**batch).logits, given(**batch).logits)


CLASSIFY_BY_NAME = """
import transformers
outcome = []
for folder in sys.argv[1:]:
    kind = folder.rsplit("-", 1)[1]
    auto_class = getattr(transformers, f"AutoModelFor{kind.title()}Classification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("hello", return_tensors="pt")
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    on_language_model = auto_class.from_pretrained(folder + "/language_model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    states = on_language_model.base_model(**inputs).last_hidden_state
    outcome.append([model(**inputs).logits.tolist(), states.tolist()])
print(json.dumps(outcome))
"""


@pytest.mark.client("transformers", "`…ForSequenceClassification`, `…ForTokenClassification`")
def test_classification_heads_load_by_the_name_of_a_folder_with_code(tmp_path):
    inputs = chat_tokenizer()("hello", return_tensors="pt")
    folders, expected = [], []
    for name in NAMES:
        for kind, (auto_class, _) in HEADS.items():
            folder = tmp_path / f"{name}-{kind}"
            model = auto_class.from_pretrained(save(learned(name), folder / "language_model"), num_labels=3)
            expected.append([model(**inputs).logits, learned(name).base_model(**inputs).last_hidden_state])
            folders.append(save(model, folder))
    for seen, ours in zip(run_by_name(CLASSIFY_BY_NAME, *folders), expected, strict=True):
        torch.testing.assert_close([*map(torch.tensor, seen)], ours, atol=1e-5, rtol=1e-4)
