"""A checkpoint goes to a Hub (one on localhost) and comes back in a process that cannot import the package."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from data import byte_tokenizer
from fresh import run_fresh
from hub_server import Commit, HubServer, online
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from safetensors.torch import load_file, save_file
from test_clients import HEADS, learned, prompt
from tiny import LLAMA_LIKE, few, import_peft, shared
from train import RunError, parse, train
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hub_upload
from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTForCausalLM
from modeling_stateful_gpt.card import make_card
from modeling_stateful_gpt.upload import contents, license_text

IDS = torch.tensor([[72, 101, 108, 108, 111]])
STRANGER = """
import json, sys
sys.modules["modeling_stateful_gpt"] = None  # any import of the package now fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
repo, revision = sys.argv[1], sys.argv[2] or None
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
logits = model(torch.tensor([[72, 101, 108, 108, 111]])).logits.tolist()
ids = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)("hé")["input_ids"]
generator = pipeline("text-generation", model=repo, revision=revision, trust_remote_code=True)
text = generator("user: hi<|endoftext|>assistant: ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
print(json.dumps([logits, ids, text]))
"""


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        online(monkeypatch, hub)
        yield hub
        assert hub.unknown == []


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The output folder of a short training run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{number} and {number + 1}\n\n" for number in range(2000)))
    options = "--max_steps 3 --eval_steps 2 --hidden_size 16 --num_hidden_layers 1 --block_size 32 --use_cpu"
    train(*parse([*options.split(), "--text_file", str(folder / "text.txt"), "--output_dir", str(folder / "model")]))
    return folder / "model"


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def in_a_fresh_process(hub, tmp_path, code, *arguments):
    return run_fresh("-c", code, *arguments, env=hub.environment(tmp_path / "home"))


def check_that_it_loads(hub, tmp_path, model, repo_id, revision=""):
    logits, ids, text = json.loads(in_a_fresh_process(hub, tmp_path, STRANGER, repo_id, revision).splitlines()[-1])
    torch.testing.assert_close(torch.tensor(logits), model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert ids == list("hé".encode())
    inputs = byte_tokenizer()(prompt("hi"), return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert text == prompt("hi") + byte_tokenizer().decode(
        expected[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def files(hub, repo_id, revision="main"):
    return hub.repos[repo_id].commit(revision).files


def card(hub, repo_id, revision="main"):
    return ModelCard(files(hub, repo_id, revision)["README.md"].decode())


def snippet(model_card):
    return re.search(r"```python\n(.*?)```", model_card.text, re.DOTALL)[1]


@pytest.mark.client("huggingface-hub", "`hub_upload.py`")
def test_an_uploaded_checkpoint_is_complete_and_its_card_tells_how_to_load_it(hub, checkpoint, tmp_path, capsys):
    hub_upload.main([str(checkpoint), "mine"])
    repo = hub.repos["me/mine"]
    assert [commit.message for commit in repo.commits] == ["initial commit", "Upload model"]
    assert capsys.readouterr().out.strip().endswith(repo.branches["main"])
    assert repo.tags == {"v1": repo.branches["main"]} and not repo.private

    uploaded = files(hub, "me/mine")
    config = json.loads(uploaded["config.json"])
    assert {reference.split(".")[0] + ".py" for reference in config["auto_map"].values()} < set(uploaded)
    others = {"model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert others | {"training_curve.png", "results.json"} < set(uploaded)
    # What is pickled, or names the files of this machine, stays here.
    assert not any(name.endswith(".bin") or name == "run.json" for name in uploaded)
    folder_of_the_text = json.loads((checkpoint / "run.json").read_text())["text_file"][0].removesuffix("/text.txt")
    assert not any(folder_of_the_text.encode() in content for content in uploaded.values())

    model_card = card(hub, "me/mine")
    assert model_card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["custom_code", "stateful-gpt"],
    }
    for shown in ("| learning_rate | 0.001 |", "| exact | ", "![training_curve.png](training_curve.png)"):
        assert shown in model_card.text
    check_that_it_loads(hub, tmp_path, AutoModelForCausalLM.from_pretrained(checkpoint), "me/mine", "v1")
    assert 'revision="v1"' in snippet(model_card)
    assert in_a_fresh_process(hub, tmp_path, snippet(model_card)).startswith("The")


def test_the_licence_that_goes_with_the_code_is_that_of_the_project():
    root = Path(hub_upload.__file__).parent
    assert license_text() == (root / "LICENSE").read_bytes()
    assert b"Apache License" in license_text()


def test_versions_are_counted_and_old_ones_stay(hub, checkpoint, tmp_path):
    hub_upload.main([str(checkpoint), "me/mine"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(checkpoint, max_shard_size="10kB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    hub_upload.main([str(checkpoint), "me/mine"])
    assert set(hub.repos["me/mine"].tags) == {"v1", "v2"}
    assert "model.safetensors" not in files(hub, "me/mine")
    assert 'revision="v2"' in snippet(card(hub, "me/mine"))
    check_that_it_loads(hub, tmp_path, model, "me/mine", "v2")
    model.load_state_dict(before, strict=False)
    check_that_it_loads(hub, tmp_path, model, "me/mine", "v1")


def test_the_options(hub, checkpoint, tmp_path, monkeypatch, capsys):
    hub_upload.main([str(checkpoint), "me/mine", "--private", "--tag", "first"])
    repo = hub.repos["me/mine"]
    main = repo.branches["main"]
    assert repo.private and repo.tags == {"first": main}

    (checkpoint / "vocab.json").write_text("{}")
    hub_upload.main([str(checkpoint), "me/mine", "--revision", "dev"])
    assert repo.branches["main"] == main and repo.tags["v1"] == repo.branches["dev"]
    assert "vocab.json" in files(hub, "me/mine", "dev") and "vocab.json" not in files(hub, "me/mine")

    hub_upload.main([str(checkpoint), "me/mine", "--create-pr"])
    assert repo.branches["main"] == main and "vocab.json" in files(hub, "me/mine", "refs/pr/1")
    assert capsys.readouterr().out.strip().endswith("discussions/1")
    assert "revision" not in snippet(card(hub, "me/mine", "refs/pr/1"))


def test_a_dry_run_prints_every_file_and_changes_nothing(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    hub.fail_on = lambda method, path: True
    before = sorted(path.name for path in checkpoint.iterdir())
    hub_upload.main([str(checkpoint), "me/mine", "--dry-run"])
    printed = capsys.readouterr().out
    assert hub.repos == {} and sorted(path.name for path in checkpoint.iterdir()) == before
    hub.fail_on = lambda method, path: False
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub_upload.main([str(checkpoint), "me/mine"])
    listed = dict(re.findall(r"│ (\S+)\s+│ ([\d.,]+ \S+)", printed))
    assert set(listed) == set(files(hub, "me/mine")) - {".gitattributes"}
    assert listed["generation_config.json"].startswith(str(len(files(hub, "me/mine")["generation_config.json"])))


def without(name):
    return lambda folder: (folder / name).unlink()


def change_json(name, **fields):
    def change(folder):
        before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**before, **fields}))

    return change


def change_config(**fields):
    return change_json("config.json", **fields)


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def poison_weights(folder):
    weights = load_file(folder / "model.safetensors")
    for z in weights.values():
        if z.is_floating_point():
            z.view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def name_an_absent_part(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {name: f"model-0000{1 + (name == names[0])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def name_a_part_elsewhere(folder):
    name_an_absent_part(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: "../" + part for name, part in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link(folder, name):
    outside = folder.parent / "outside"
    outside.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)


@pytest.mark.parametrize(
    "damage,message",
    [
        (without("config.json"), "config.json cannot be used"),
        (without("model.safetensors"), "no weights"),
        (without("tokenizer.json"), "tokenizer.save_pretrained"),
        (without("generation_config.json"), "generation_config.json"),
        (without("modeling_stateful_gpt.py"), "lacks its code"),
        (without("feedback.py"), "lacks its code"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"), "index"),
        (change_config(architectures=["LlamaForCausalLM"]), "config.json cannot be used"),
        (change_config(feedback="correction"), "do not belong together"),
        (cut_weights, "damaged"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
        (lambda folder: (folder / "results.json").write_text("[]"), "results.json holds list, no object"),
        (change_config(feedback=None), "weights for which its config.json has no place: model.feedback"),
        (poison_weights, r"in .*model\.safetensors is not finite"),
        (name_an_absent_part, "damaged, or missing"),
        (name_a_part_elsewhere, "index.json is damaged"),
        (lambda folder: (folder / "cache.py").write_text("def cut("), r"cache\.py is damaged \("),
        (lambda folder: (folder / "cache.py").write_text(""), r"cache\.py is empty"),
        (lambda folder: link(folder, "vocab.json"), r"vocab\.json is a link to .*outside"),
        (lambda folder: link(folder, "feedback.py"), r"feedback\.py is a link to .*outside"),
        (lambda folder: (folder / "vocab.json").mkdir(), r"vocab\.json is no plain file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "PEFT adapter"),
        (shutil.rmtree, "There is no folder"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(damage, message, hub, checkpoint):
    damage(checkpoint)
    for options in [], ["--dry-run"]:
        with pytest.raises(SystemExit, match=message):
            hub_upload.main([str(checkpoint), "me/mine", *options])
    assert hub.repos == {}


def generation(**fields):
    return change_json("generation_config.json", **fields)


def evaluated(**fields):
    row = {"bits_per_byte": 1.0, "perplexity": 2.0}
    return change_json("evaluation.json", **{"text": "A", "block_size": 8, "results": {"exact": row}, **fields})


def results(**fields):
    return change_json("results.json", **fields)


def log(value):
    return results(log=[{"step": 0, "eval_loss": value}], step=3)


def retyped(dtype):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({name: z.to(dtype) for name, z in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    return change


def linked_within(folder):
    (folder / "credentials.json").write_text("secret")
    (folder / "vocab.json").symlink_to("credentials.json")


def loop(folder):
    (folder / "vocab.json").symlink_to("vocab.json")


def linked_templates(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/secret.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")


def folder_in_place_of(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def bad_beside_a_good_index(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    parts = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    poison_weights(folder)


def longer_tokenizer(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


GENERATION, RESULTS = r"generation_config\.json", r"results\.json is damaged"


@pytest.mark.parametrize(
    "damage,message",
    [
        (generation(num_beams="abc"), f"{GENERATION}.*num_beams is 'abc'"),
        (generation(max_length="x"), f"{GENERATION}.*max_length is 'x'"),
        (generation(eos_token_id="x"), f"{GENERATION}.*eos_token_id is 'x'"),
        (generation(eos_token_id=[1, 99999]), f"{GENERATION}.*eos_token_id is 99999"),
        (generation(decode_mode="foo"), f"{GENERATION}.*'foo' does not exist"),
        (generation(temperature=-1), f"{GENERATION}.*temperature is -1"),
        (generation(temperature=math.nan, do_sample=True), f"{GENERATION}.*temperature is nan"),
        (results(log=5), RESULTS),
        (results(log=[5]), RESULTS),
        (results(log=[{}]), RESULTS),
        (results(data=[]), RESULTS),
        (results(data={"bytes_per_token": 0}), RESULTS),
        (results(step="x"), RESULTS),
        (lambda folder: (folder / "results.json").write_text('{"log": [{"step": 1, "eval_loss": 1}], '
                                                             '"data": {"bytes_per_token": 1}}'), RESULTS),
        (log(None), RESULTS),
        (log(1e9), RESULTS),
        (log(math.nan), RESULTS),
        (change_json("run.json", max_steps="x"), r"run\.json is damaged"),
        (lambda folder: (folder / "evaluation.json").write_text('{"a": 1}'), r"evaluation\.json is damaged"),
        (evaluated(results=[]), r"evaluation\.json is damaged"),
        (evaluated(results={"1": {"perplexity": 1}}), r"evaluation\.json is damaged"),
        (evaluated(results={"1": {"perplexity": 1, "bits_per_byte": math.nan}}), r"evaluation\.json is damaged"),
        (longer_tokenizer, "has a token 258, the model only those up to 257"),
        (retyped(torch.int32), "is torch.int32, no weight"),
        (retyped(torch.complex64), "is torch.complex64, no weight"),
        (bad_beside_a_good_index, r"model\.safetensors is not finite"),
        (linked_within, r"vocab\.json is a link to credentials\.json"),
        (linked_templates, r"additional_chat_templates is a link to .*elsewhere"),
        (loop, r"vocab\.json is a link to vocab\.json"),
        (lambda folder: link(folder, "run.json"), r"run\.json is a link to .*outside"),
        (folder_in_place_of("README.md"), r"README\.md is no plain file"),
        (folder_in_place_of("run.json"), r"run\.json is no plain file"),
        (lambda folder: (folder / "cache.py").write_bytes("# é".encode("latin-1")), r"cache\.py is damaged"),
        (lambda folder: (folder / "cache.py").write_bytes(b"a = 1\0"), r"cache\.py is damaged"),
    ],
)  # fmt: skip
def test_what_does_not_load_or_says_nothing_is_refused_by_name(damage, message, checkpoint):
    damage(checkpoint)
    with pytest.raises(SystemExit, match=message):
        hub_upload.main([str(checkpoint), "me/mine", "--dry-run"])


def test_a_tag_that_git_would_refuse_is_refused(checkpoint):
    with pytest.raises(SystemExit, match="'a b' is no name of a tag"):
        hub_upload.main([str(checkpoint), "me/mine", "--dry-run", "--tag", "a b"])


@pytest.mark.parametrize("content", [None, "{}"])
def test_the_card_does_without_the_notes_of_the_run(content, checkpoint):
    (checkpoint / "run.json").unlink()
    if content is not None:
        (checkpoint / "run.json").write_text(content)
    change_config(auto_map={**json.loads((checkpoint / "config.json").read_text())["auto_map"],
                            "AutoTokenizer": ["configuration_stateful_gpt.X", None]})(checkpoint)  # fmt: skip
    text = str(make_card(checkpoint, "me/mine", None))
    assert "## Evaluation" not in text and "| parameters |" in text
    assert "configuration_stateful_gpt.py" in contents(checkpoint, "me/mine", None)


def test_a_part_that_the_index_does_not_name_is_not_uploaded(checkpoint):
    (checkpoint / "model-00001-of-00001.safetensors").write_bytes(b"left over")
    (checkpoint / "model.safetensors.index.json").write_text("{")
    listed = contents(checkpoint, "me/mine", None)
    assert {name for name in listed if "safetensors" in name} == {"model.safetensors"}


def test_what_the_hub_would_refuse_is_refused_with_advice(hub, checkpoint, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit, match=message):
            hub_upload.main([str(checkpoint), *arguments])

    for name in ("me//mine", "a/b/c", "me/-mine", "me/my model"):
        refused("Repo id|repo_id", name)
    refused("namespace", "other/mine")
    refused("There is no me/mine", "me/mine", "--create-pr")
    assert hub.repos == {}
    hub_upload.main([str(checkpoint), "me/mine"])
    refused("'v1' already", "me/mine", "--tag", "v1")
    refused("public", "me/mine", "--private")
    refused("leave out --tag", "me/mine", "--create-pr", "--tag", "v9")
    assert len(hub.repos["me/mine"].commits) == 2
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("token is not valid", "me/mine")
    monkeypatch.delenv("HF_TOKEN")
    refused("hf auth login", "me/mine")


@pytest.mark.parametrize("step", ["/preupload/", "/upload/", "/commit/", "/tag/"])
def test_after_a_failure_nothing_is_half_published(step, hub, checkpoint):
    hub.fail_on = lambda method, path: step in path
    with pytest.raises(SystemExit, match="error: "):
        hub_upload.main([str(checkpoint), "me/mine"])
    assert hub.repos == {}

    hub.fail_on = lambda method, path: False
    hub_upload.main([str(checkpoint), "me/mine"])
    repo, before = hub.repos["me/mine"], dict(files(hub, "me/mine"))
    (checkpoint / "vocab.json").write_text("{}")
    change_config(tolerance=0.5)(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(checkpoint)
    hub.fail_on = lambda method, path: step in path
    for options in [], ["--revision", "dev"]:
        with pytest.raises(SystemExit, match="error: "):
            hub_upload.main([str(checkpoint), "me/mine", *options])
        assert files(hub, "me/mine") == before
        assert set(repo.branches) == {"main"} and set(repo.tags) == {"v1"}


def test_a_commit_whose_answer_is_lost_is_taken_back(hub, checkpoint):
    hub_upload.main([str(checkpoint), "me/mine"])
    before = dict(files(hub, "me/mine"))
    change_config(tolerance=0.5)(checkpoint)
    lost = iter([True])
    hub.lose_answers = lambda method, path: "/commit/" in path and next(lost, False)
    with pytest.raises(SystemExit, match="error: "):
        hub_upload.main([str(checkpoint), "me/mine"])
    assert files(hub, "me/mine") == before and set(hub.repos["me/mine"].tags) == {"v1"}


def test_what_someone_else_commits_in_the_meantime_stays(hub, checkpoint):
    hub_upload.main([str(checkpoint), "me/mine"])
    change_config(tolerance=0.5)(checkpoint)
    repo = hub.repos["me/mine"]
    theirs = Commit("Theirs", {**files(hub, "me/mine"), "theirs.txt": b"theirs"}, repo.branches["main"])

    def commit_before_us(method, path):
        if "/commit/" in path and theirs not in repo.commits:
            repo.commits.append(theirs)
            repo.branches["main"] = theirs.sha
        return False

    hub.fail_on = commit_before_us
    with pytest.raises(SystemExit, match="Someone else"):
        hub_upload.main([str(checkpoint), "me/mine"])
    assert files(hub, "me/mine")["theirs.txt"] == b"theirs"
    assert b'"tolerance": 0.5' not in files(hub, "me/mine")["config.json"]
    hub_upload.main([str(checkpoint), "me/mine"])
    assert b'"tolerance": 0.5' in files(hub, "me/mine")["config.json"] and set(hub.repos["me/mine"].tags) == {
        "v1",
        "v2",
    }


def test_an_unreachable_hub_is_said_to_be_one(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match="cannot be reached"):
        hub_upload.main([str(checkpoint), "me/mine"])


def test_a_new_version_leaves_nothing_of_the_old_one_and_everything_of_others(hub, checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    hub_upload.main([str(checkpoint), "me/mine"])
    api = HfApi(endpoint=hub.url)
    api.upload_file(repo_id="me/mine", path_in_repo="lora/adapter_model.safetensors", path_or_fileobj=b"an adapter")
    (checkpoint / "chat_template.jinja").unlink()
    hub_upload.main([str(checkpoint), "me/mine"])
    assert "lora/adapter_model.safetensors" in files(hub, "me/mine")
    assert "chat_template.jinja" in files(hub, "me/mine", "v1") and "chat_template.jinja" not in files(hub, "me/mine")


def test_paths_of_this_machine_are_no_metadata(hub, checkpoint, tmp_path):
    run = json.loads((checkpoint / "run.json").read_text())
    # The second one was there in the folder where the training command was given.
    run |= {"dataset_name": str(tmp_path / "words"), "model_name_or_path": "runs/before"}
    (checkpoint / "run.json").write_text(json.dumps(run))
    hub_upload.main([str(checkpoint), "me/mine"])
    assert card(hub, "me/mine").data.datasets is None and card(hub, "me/mine").data.base_model is None
    assert not any(str(tmp_path).encode() in name.encode() + text for name, text in files(hub, "me/mine").items())
    assert not any(name.startswith(".eval_results") for name in files(hub, "me/mine"))


@pytest.mark.exhaustive
def test_a_checkpoint_made_for_transformers_serve_can_be_published(hub, checkpoint, tmp_path):
    change_config(architectures=["AutoModelForCausalLM"])(checkpoint)
    hub_upload.main([str(checkpoint), "me/mine"])
    check_that_it_loads(hub, tmp_path, AutoModelForCausalLM.from_pretrained(checkpoint), "me/mine")


def test_a_card_written_by_hand_is_kept(hub, checkpoint):
    hub_upload.main([str(checkpoint), "me/mine"])
    HfApi(endpoint=hub.url).upload_file(
        repo_id="me/mine", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n# From the website\n"
    )
    hub_upload.main([str(checkpoint), "me/mine"])
    assert "From the website" in card(hub, "me/mine").text
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# From the folder\n")
    hub_upload.main([str(checkpoint), "me/mine"])
    assert "From the folder" in card(hub, "me/mine").text


def test_the_card_names_the_dataset_and_the_base_model_and_holds_what_evaluate_found(hub, checkpoint):
    api = HfApi(endpoint=hub.url)
    api.create_repo("me/base")
    api.upload_file(
        repo_id="me/base", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\nA base model.\n"
    )
    run = json.loads((checkpoint / "run.json").read_text())
    run |= {"dataset_name": "me/words", "dataset_config_name": "small", "model_name_or_path": "me/base"}
    (checkpoint / "run.json").write_text(json.dumps(run))
    results = json.loads((checkpoint / "results.json").read_text())
    results["data"]["source"] = "me/words"
    (checkpoint / "results.json").write_text(json.dumps(results))
    found = {"exact": {"bits_per_byte": 1.25, "perplexity": 2.5}}
    (checkpoint / "evaluation.json").write_text(json.dumps({"text": "A book", "block_size": 64, "results": found}))
    hub_upload.main([str(checkpoint), "me/mine"])
    data = card(hub, "me/mine").data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["me/words"], "me/base")
    assert "| exact | 1.2500 | 2.500 |" in card(hub, "me/mine").text
    (entry,) = yaml.safe_load(files(hub, "me/mine")[".eval_results/me--words.yaml"])
    assert entry["dataset"] == {"id": "me/words", "task_id": "small"}
    loss = json.loads((checkpoint / "results.json").read_text())["log"][-1]["eval_loss"]
    assert entry["value"] == pytest.approx(loss / 0.6931, rel=1e-2)  # The tokens are bytes.


@pytest.mark.client("huggingface-hub", "`push_to_hub()` of a model")
@pytest.mark.parametrize("name", few(["stateful", "hybrid", "stateful around gpt2"], ["stateful around gpt2"]))
def test_push_to_hub_is_that_of_transformers_with_the_code(name, hub, tmp_path):
    model = learned(name)
    model.push_to_hub("me/mine", commit_message="First", private=True, tags=["chat"])
    assert hub.repos["me/mine"].private and hub.repos["me/mine"].commit("main").message == "First"
    assert {"chat", "custom_code"} <= set(card(hub, "me/mine").data.tags)
    byte_tokenizer().push_to_hub("me/mine")
    check_that_it_loads(hub, tmp_path, model, "me/mine")


CODE_OF_ALL = {
    "adapters.py", "attention.py", "cache.py", "cache_layers.py", "compat.py", "configuration_gateloop.py",
    "fixed_point.py", "gate_loop.py", "gateloop_layer.py", "generation_gateloop.py", "hub.py", "inputs.py", "linear.py",
    "linear_scan.py", "mlp.py", "modeling_gateloop.py", "ranges.py", "reversible.py", "reversible_layers.py",
    "rwkv_memory.py", "timeline.py", "token_mixers.py",
}  # fmt: skip
CODE_OF_STATEFUL = CODE_OF_ALL | {
    "alignment.py", "backbone.py", "configuration_stateful_gpt.py", "evaluation.py", "feedback.py",
    "generation_stateful_gpt.py", "language_modeling.py", "modeling_stateful_gpt.py", "outputs.py", "plan.py",
    "probe.py", "recurrence.py", "solvers.py", "state_adapter.py", "training_recurrence.py", "wrapping.py",
}  # fmt: skip


@pytest.mark.parametrize("name,code", [("gpt", CODE_OF_ALL), ("hybrid", CODE_OF_ALL), ("stateful", CODE_OF_STATEFUL)])
def test_a_checkpoint_carries_what_computes_a_token_and_nothing_that_publishes(name, code, tmp_path):
    model = GateLoopForCausalLM(GateLoopConfig(**LLAMA_LIKE)) if name == "gpt" else learned(name)
    model.save_pretrained(tmp_path)
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == weights | code


def test_transformers_own_adapters_are_published_alone(hub):
    peft = import_peft()
    model = copy.deepcopy(learned("stateful"))
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    model.push_to_hub("me/adapter")
    assert "adapter_model.safetensors" in files(hub, "me/adapter")


def test_a_licence_in_the_folder_stays(hub, checkpoint):
    (checkpoint / "LICENSE").write_text("CC-BY-NC")
    hub_upload.main([str(checkpoint), "me/mine"])
    assert files(hub, "me/mine")["LICENSE"] == b"CC-BY-NC"


REPUBLISH = """
import shutil, sys
sys.modules["modeling_stateful_gpt"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("me/mine", trust_remote_code=True).push_to_hub("me/again")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
shutil.rmtree(sys.argv[1])
model.push_to_hub("me/moved")
"""


def test_a_model_that_was_loaded_as_code_publishes_the_same(hub, checkpoint, tmp_path):
    hub_upload.main([str(checkpoint), "me/mine"])
    in_a_fresh_process(hub, tmp_path, REPUBLISH, checkpoint)
    first = files(hub, "me/mine")
    for copied in (files(hub, "me/again"), files(hub, "me/moved")):
        for name in ("model.safetensors", *(name for name in first if name.endswith(".py"))):
            assert first[name] == copied[name], name


def test_the_base_of_a_converted_model_is_named(hub, tmp_path):
    special = {"bos_token_id": 256, "eos_token_id": 256}
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4, **special))
    plain.push_to_hub("me/plain")
    byte_tokenizer().save_pretrained(tmp_path)
    StatefulGPTForCausalLM.from_backbone("me/plain").save_pretrained(tmp_path)
    hub_upload.main([str(tmp_path), "me/mine"])
    assert card(hub, "me/mine").data.base_model == "me/plain"
    assert card(hub, "me/mine").data.license == "unknown"


SEQUENCE, TOKEN = ("sequence", "text-classification"), ("token", "token-classification")


@pytest.mark.parametrize("kind,pipeline_tag", few([SEQUENCE, TOKEN], [SEQUENCE]))
def test_a_classification_head_says_what_it_is(kind, pipeline_tag, hub, tmp_path):
    learned("stateful").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "head")
    HEADS[kind][0].from_pretrained(tmp_path / "model", num_labels=3).save_pretrained(tmp_path / "head")
    hub_upload.main([str(tmp_path / "head"), "me/mine"])
    assert card(hub, "me/mine").data.pipeline_tag == pipeline_tag
    in_a_fresh_process(hub, tmp_path, snippet(card(hub, "me/mine")))


@pytest.mark.client("huggingface-hub", "`Trainer(push_to_hub=True)`")
def test_trainer_pushes_a_repository_that_loads(hub, tmp_path):
    tokenizer = byte_tokenizer()
    data = [{"input_ids": ids, "labels": ids} for ids in tokenizer(["hello you"] * 4)["input_ids"]]
    trainer = Trainer(
        copy.deepcopy(learned("stateful")),
        TrainingArguments(
            tmp_path / "out", max_steps=1, use_cpu=True, report_to="none", push_to_hub=True, hub_model_id="me/mine"
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    assert "custom_code" in card(hub, "me/mine").data.tags
    check_that_it_loads(hub, tmp_path, trainer.model, "me/mine")


def test_the_training_command_pushes_a_complete_repository(hub, tmp_path):
    (tmp_path / "text.txt").write_text("one two three\n" * 300)
    options = "--max_steps 2 --hidden_size 16 --num_hidden_layers 1 --block_size 16 --use_cpu --push_to_hub"
    names = ["--hub_model_id", "me/mine", "--output_dir", str(tmp_path / "out")]
    train(*parse([*options.split(), *names, "--text_file", str(tmp_path / "text.txt")]))
    assert 'revision="v1"' in snippet(card(hub, "me/mine", "v1"))
    assert [commit.message for commit in hub.repos["me/mine"].commits] == ["initial commit", "Upload model"]
    assert "training_curve.png" in files(hub, "me/mine")
    assert not {"run.json", "training_args.bin"} & set(files(hub, "me/mine"))
    check_that_it_loads(hub, tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), "me/mine", "v1")


def test_a_push_that_failed_is_made_by_the_same_command_again(hub, tmp_path):
    (tmp_path / "text.txt").write_text("one two three\n" * 300)
    options = "--max_steps 1 --hidden_size 16 --num_hidden_layers 1 --block_size 16 --use_cpu --push_to_hub"
    command = [*options.split(), "--output_dir", str(tmp_path / "mine"), "--text_file", str(tmp_path / "text.txt")]
    hub.fail_on = lambda method, path: "/tag/" in path
    with pytest.raises(RunError, match="same command again"):
        train(*parse(command))
    assert hub.repos == {}
    hub.fail_on = lambda method, path: False
    for _ in range(2):
        train(*parse(command))
    assert set(hub.repos["me/mine"].tags) == {"v1"}


WITH_ADAPTER = """
import json, sys
sys.modules["modeling_stateful_gpt"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("me/base", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "me/adapter")
print(json.dumps(model(torch.tensor([[72, 101, 108, 108, 111]])).logits.tolist()))
"""


def test_an_adapter_is_published_for_a_published_base(hub, tmp_path):
    peft = import_peft()
    learned("stateful").push_to_hub("me/base")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["feedback"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.push_to_hub("me/adapter")
    logits = torch.tensor(json.loads(in_a_fresh_process(hub, tmp_path, WITH_ADAPTER).splitlines()[-1]))
    torch.testing.assert_close(logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, learned("stateful")(IDS).logits, atol=1e-2)


def test_two_tags_of_one_repository_run_their_own_code_in_one_process(hub, checkpoint):
    model, api = StatefulGPTForCausalLM.from_pretrained(checkpoint), HfApi(endpoint=hub.url, token="hf_test")
    for tag, sign in (("v1", ""), ("v2", "-")):
        model.save_pretrained(checkpoint)
        file = checkpoint / "modeling_stateful_gpt.py"
        file.write_text(file.read_text().replace("logits=logits,", f"logits={sign}logits,"))
        api.create_repo("me/mine", exist_ok=True)
        api.upload_folder(repo_id="me/mine", folder_path=checkpoint)
        api.create_tag("me/mine", tag=tag)
    expected = model(IDS).logits
    for tag, sign in (("v1", 1), ("v2", -1), ("v1", 1)):
        loaded = AutoModelForCausalLM.from_pretrained("me/mine", revision=tag, trust_remote_code=True)
        torch.testing.assert_close(loaded(IDS).logits, sign * expected)


def test_the_card_says_which_servers_refuse_the_model_and_what_it_needs(tmp_path):
    shared().save_pretrained(tmp_path)
    text = str(make_card(tmp_path, "me/mine", None))
    assert "vLLM and SGLang refuse models of this kind" in text
    assert "The code needs torch 2.8 and transformers 5.14, or newer." in text


def test_what_is_no_part_of_a_checkpoint_stays_where_it_is(checkpoint):
    for name in ("credentials.json", "setup_secrets.py", "diary.png", "notes.txt", "optimizer.safetensors", ".env"):
        (checkpoint / name).write_text("secret")
    (checkpoint / "dir.json").mkdir()
    listed = set(contents(checkpoint, "me/mine", "v1"))
    assert {"config.json", "model.safetensors", "modeling_stateful_gpt.py", "compat.py", "LICENSE"} <= listed
    assert "training_curve.png" in listed and not listed & {"run.json", "dir.json"}
    assert not {name for name in listed if (checkpoint / name).is_file() and "secret" in read(checkpoint / name)}
    (checkpoint / "README.md").write_text("By hand. ![a day](diary.png)")
    assert contents(checkpoint, "me/mine", "v1").keys() - listed == {"diary.png"}


def read(file):
    return file.read_text(errors="replace")
