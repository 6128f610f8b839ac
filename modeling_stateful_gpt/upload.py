"""A checkpoint folder as a Hub repository: its model card, its licence, and the upload in one commit."""

import ast
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .compat import OLDEST
from .license import LICENSE

logger = logging.get_logger(__name__)


PART = r"model-\d+-of-\d+\.safetensors"
WEIGHTS = rf"model\.safetensors(\.index\.json)?|{PART}"
TOKENIZER = r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt"
TOKENIZER += (
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
RESULTS = r"evaluation\.json|results\.json|\.eval_results/.*"
PICTURE = r"[^/]+\.(png|jpg|jpeg|svg)"
UPLOADED = rf"config\.json|generation_config\.json|LICENSE|training_curve\.png|{TOKENIZER}|{RESULTS}"
"""What a checkpoint consists of, but for its weights, its code and the pictures that its card shows. Not what is
pickled, and not `run.json` and `trainer_state.json`, which name files of the machine on which it was trained."""

TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}
"""The Auto class and the pipeline for each ending of a class name."""

GENERATED = "<!-- This card was generated from the files beside it. One that is written by hand is kept. -->"
# Both are replaced as well: a card that Trainer, or transformers, generated.
NOT_WRITTEN = (GENERATED, "<!-- This model card has been generated automatically", "has been automatically generated.")

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ generated }}

{{ description }}

## Use

The model's code is in this repository, so `trust_remote_code=True` is needed; `revision` pins code and weights to what
this card describes. The code needs {{ needs }}, or newer.

```python
from transformers import {{ auto_class }}{{ ", AutoTokenizer" if has_tokenizer }}

{% set pinned = ", revision=" + '"' + revision + '"' if revision else "" -%}
model = {{ auto_class }}.from_pretrained("{{ repo_id }}"{{ pinned }}, trust_remote_code=True)
{%- if has_tokenizer %}
tokenizer = AutoTokenizer.from_pretrained("{{ repo_id }}"{{ pinned }}, trust_remote_code=True)
{%- if auto_class == "AutoModelForCausalLM" %}
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
{%- endif %}
{%- endif %}
```

vLLM and SGLang refuse models of this kind: from token to token they carry keys and values, and no other state.
{% for title, rows in tables.items() if rows %}
## {{ title }}

| | |
|---|---|
{% for key, value in rows.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- endfor %}
{%- if evaluation %}
## Evaluation

{{ evaluation.text }}, in blocks of {{ evaluation.block_size }} tokens; lower is better. *Exact*: as the model decodes.

| passes | bits per byte | perplexity (per token) |
|---|---|---|
{% for passes, row in evaluation.results.items() -%}
| {{ passes }} | {{ "%.4f"|format(row.bits_per_byte) }} | {{ "%.3f"|format(row.perplexity) }} |
{% endfor %}
{%- endif %}
{%- for picture in pictures %}
![{{ picture }}]({{ picture }})
{% endfor %}
## Licence

The code is under the Apache License 2.0 (`LICENSE`).
{%- if base_model %} The weights were made from those of `{{ base_model }}`, whose licence holds for them.{% endif %}
"""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Names the file in which something else stands than what is looked for.

    Raises:
        ValueError: any error that this leads to.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError) as error:
        why = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is damaged ({why}); mend it, or take it away.") from error


def read_text(file: Path) -> str:
    """What is in a text file; nothing if there is none.

    Raises:
        ValueError: it is no plain file, or no text in UTF-8.
    """
    if not os.path.lexists(file):
        return ""
    with reading(plain(file)):
        return file.read_text(encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """What is in a JSON file; nothing if there is none.

    Raises:
        ValueError: it is damaged, or something else than an object.
    """
    text = read_text(file)
    with reading(file):
        value = json.loads(text) if os.path.lexists(file) else {}
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, no object; mend it, or take it away.")
    return value


def finite(number: float) -> float:
    """The number; a ValueError if it is none, or NaN, or infinite."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def task_of(config: dict[str, Any]) -> tuple[str, str]:
    """The Auto class and the pipeline of the model that a `config.json` describes."""
    architecture = (config.get("architectures") or [""])[0]
    for ending, task in TASKS.items():
        if architecture.endswith(ending):
            return task
    raise ValueError(f"config.json names the architecture {architecture!r}, which is none of this package's.")


def describe(config: dict[str, Any]) -> str:
    decoder = config.get("text_config", config)
    layer_types = sorted(set(decoder.get("layer_types") or []))
    what = f"`{decoder['model_type']}` decoder" + (
        f" with layers of `{'`, `'.join(layer_types)}`" if layer_types else ""
    )
    if config.get("feedback") is None:
        return f"A {what}."
    source = "embedding" if config.get("feedback_source") == "embedding" else "last hidden state"
    return f"A Stateful GPT: a {what}, in which the {source} of each step enriches the next step's token embedding."


def on_the_hub(name: str | None) -> str | None:
    """The name, if it can be one on the Hub and is none of a file or a folder here."""
    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def base_model_of(config: dict[str, Any], run: dict[str, Any], name: str | None) -> str | None:
    """The name on the Hub of the model whose weights these started from; `name` is where they were loaded from."""
    return on_the_hub(name or run.get("model_name_or_path") or config.get("text_config", {}).get("_name_or_path"))


def dataset_of(folder: Path) -> str | None:
    """The name on the Hub of the dataset. The report of the data has it, too, but of a folder only the last part."""
    run, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    with reading(folder / "run.json"):
        name = on_the_hub(run.get("dataset_name"))
    with reading(folder / "results.json"):
        return name if name == results.get("data", {}).get("source") else None


def known_to(api: HfApi | None, base_model: str | None) -> tuple[str | None, str]:
    """The base model, if the Hub knows it (the name may be that of a folder that was here once), and the licence."""
    if base_model is None:
        return None, "apache-2.0"
    if api is None:
        return base_model, "unknown"
    try:
        card = api.model_info(base_model).card_data
    except RepositoryNotFoundError:
        return None, "apache-2.0"
    return base_model, (card.license if card else None) or "unknown"


def make_card(
    folder: Path,
    repo_id: str,
    revision: str | None,
    tags: list[str] | None = None,
    name_or_path: str | None = None,
    api: HfApi | None = None,
    present: Sequence[str] = (),
) -> ModelCard:
    """The model card of a checkpoint folder, from what `save_pretrained`, `train.py` and `evaluate.py` left in it."""
    config, run = read_json(folder / "config.json"), read_json(folder / "run.json")
    results = read_json(folder / "results.json")
    auto_class, pipeline_tag = task_of(config)
    with reading(folder / "run.json"):
        base_model = base_model_of(config, run, name_or_path)
        # They may be paths; the Hub's names are in the metadata. And checksums.
        hidden = ["text_file", "dataset_name", "model_name_or_path", "tokenizer_name"]
        hidden += ["text", "tokenizer", "base_weights", "base_config"]
        hidden += ["num_train_epochs"] if run.get("max_steps", 0) > 0 else []
    # A new version is not its own base.
    base_model, license_name = known_to(api, base_model if base_model != repo_id else None)
    dataset = dataset_of(folder)
    with reading(folder / "results.json"):
        data_table = {**results.get("data", {}), "tokens seen": results.get("tokens")} if results else {}
    decoder = config.get("text_config", config)
    model_fields = ("feedback", "feedback_source", "num_passes", "pass_probabilities", "solver", "tolerance")
    decoder_fields = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "dtype")
    model_table = {
        "parameters": f"{count_parameters(folder):,}",
        **{name: config[name] for name in model_fields if config.get(name) is not None},
        **{name: decoder[name] for name in decoder_fields if decoder.get(name) is not None},
    }
    return ModelCard.from_template(
        ModelCardData(
            license=license_name,
            library_name="transformers",
            pipeline_tag=pipeline_tag,
            datasets=[dataset] if dataset else None,
            base_model=base_model,
            tags=sorted({"custom_code", config["model_type"].replace("_", "-"), *(tags or [])}),
        ),
        template_str=TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        revision=revision,
        generated=GENERATED,
        needs=" and ".join(f"{package} {version}" for package, version in OLDEST.items()),
        description=describe(config),
        auto_class=auto_class,
        has_tokenizer=(folder / "tokenizer_config.json").exists() or "tokenizer_config.json" in present,
        tables={
            "Model": model_table,
            "Data": {key: value for key, value in data_table.items() if value is not None},
            "Training arguments": {k: v for k, v in run.items() if v not in (None, "{}", "") and k not in hidden},
        },
        evaluation=evaluation_afterwards(folder) or evaluation_in_training(folder),
        base_model=base_model,
        pictures=["training_curve.png"] if (folder / "training_curve.png").exists() else [],
    )


def evaluation_afterwards(folder: Path) -> dict[str, Any]:
    """What `evaluate.py` wrote, if it did."""
    file = folder / "evaluation.json"
    evaluation = read_json(file)
    with reading(file):
        for row in evaluation["results"].values() if evaluation else []:
            for name in ("bits_per_byte", "perplexity"):
                finite(row[name])
        return {name: evaluation[name] for name in ("text", "block_size", "results")} if evaluation else {}


def evaluation_in_training(folder: Path) -> dict[str, Any]:
    """That of the model that a run left, in the form of what `evaluate.py` writes."""
    run, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    with reading(folder / "results.json"):
        step = results.get("step", math.inf)
        losses = [finite(entry["eval_loss"]) for entry in results.get("log", []) if entry["step"] <= step]
        if not losses or "bytes_per_token" not in results.get("data", {}) or "block_size" not in run:
            return {}
        bits_per_byte = finite(losses[-1] / math.log(2) / results["data"]["bytes_per_token"])
        return {
            "text": f"{results['eval_blocks']} blocks of text held out",
            "block_size": run["block_size"],
            "results": {"exact": {"bits_per_byte": bits_per_byte, "perplexity": math.exp(losses[-1])}},
        }


def count_parameters(folder: Path) -> int:
    count = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                tensor = weights.get_slice(name)
                if tensor.get_dtype() != "I64":  # A counter.
                    count += math.prod(tensor.get_shape())
    return count


def eval_results(folder: Path) -> dict[str, bytes]:
    """The evaluation in the Hub's format, which is for data of the Hub: in training, of its validation part."""
    run, evaluation, dataset = read_json(folder / "run.json"), evaluation_in_training(folder), dataset_of(folder)
    if not dataset or not evaluation:
        return {}
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=run.get("dataset_config_name") or "default",
        value=round(evaluation["results"]["exact"]["bits_per_byte"], 4),
        notes=f"bits per byte (lower is better) of {evaluation['text']}, {evaluation['block_size']} tokens each",
    )
    name = dataset.replace("/", "--")
    return {f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml([entry])).encode()}


def is_written_by_hand(card: str) -> bool:
    return not any(mark in card for mark in NOT_WRITTEN)


def contents(
    folder: Path,
    repo_id: str,
    revision: str | None,
    tags: list[str] | None = None,
    name_or_path: str | None = None,
    api: HfApi | None = None,
    present: Sequence[str] = (),
) -> dict[str, Path | bytes]:
    """What an upload of `folder` brings into a repository with the files `present`: file names, and for each a file of
    the folder or its bytes.

    Raises:
        ValueError: a file of a checkpoint is a link, no plain file, or damaged.
    """
    card = read_text(folder / "README.md")
    by_hand = bool(card) and is_written_by_hand(card)
    shown = {name for name, _ in re.findall(rf"\(({PICTURE})\)", card)} if by_hand else set()
    wanted = code(folder) | shown | {file.name for file in weights_and_index(folder)}
    files: dict[str, Path | bytes] = {}
    templates = no_link(folder / "additional_chat_templates")
    for file in sorted([*folder.glob("*"), *templates.glob("*")]):
        name = file.relative_to(folder).as_posix()
        if name in wanted or re.fullmatch(UPLOADED, name):
            files[name] = plain(file)
    files.setdefault("LICENSE", LICENSE.encode())
    files |= eval_results(folder)
    if by_hand:
        files["README.md"] = folder / "README.md"
    else:
        files["README.md"] = str(make_card(folder, repo_id, revision, tags, name_or_path, api, present)).encode()
    return files


def code(folder: Path) -> set[str]:
    """The files of code that a checkpoint's Auto classes need."""
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    with reading(folder / "config.json"):
        # A tokenizer has two classes, one of which may be None.
        entries = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
        modules = [entry.split(".")[0] for entry in entries if entry is not None]
    found: set[str] = set()
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found:
            found.add(name)
            modules += relative_imports(folder / name)
    return found


def relative_imports(file: Path) -> list[str]:
    """The modules beside a file of code that it imports; none if there is no such file."""
    text = read_text(file)
    with reading(file):
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [node.module for node in nodes if node.module]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the one, which `from_pretrained` prefers, or those that an index names."""
    return [file for file in weights_and_index(folder) if file.name != SAFE_WEIGHTS_INDEX_NAME]


def weights_and_index(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [folder / SAFE_WEIGHTS_NAME]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(re.fullmatch(PART, str(name)) for name in parts.values()):
        raise ValueError(f"{index} is damaged. Save the checkpoint again.")
    return [index, *sorted({folder / name for name in parts.values()})]


def no_link(path: Path) -> Path:
    """`path`; a ValueError if it is a link, which may lead to what was not meant to be published."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.readlink()}. Put the file itself there, or take it away.")
    return path


def plain(file: Path) -> Path:
    """`file`; a ValueError if it is a link, or no plain file."""
    if not no_link(file).is_file():
        raise ValueError(f"{file} is no plain file. Take it away, or save the checkpoint again.")
    return file


def check_tag(tag: str | None) -> None:
    """Raises a ValueError for what git takes for no tag."""
    if tag is not None and not re.fullmatch(r"\w+([./-]+\w+)*", tag):
        raise ValueError(f"{tag!r} is no name of a tag; use letters, digits, '.', '_' and '-'.")


def next_version(tags: list[str]) -> str:
    versions = [int(tag[1:]) for tag in tags if re.fullmatch(r"v\d+", tag)]
    return f"v{max(versions, default=0) + 1}"


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    tags: list[str] | None = None,
    name_or_path: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Publishes a checkpoint folder in one commit, and gives the commit a tag for the model card to name.

    If it fails, what it has done is undone. Someone else's commit in the meantime makes it fail.

    Args:
        repo_id: `name`, in the namespace of the token, or `namespace/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: the branch; created from `main` if it does not exist.
        create_pr: open a pull request in place of the commit and the tag.
        tag: the git tag; by default the first of `v1`, `v2`, … that is free.
        tags: further tags for the metadata of the model card.
        name_or_path: where the weights were loaded from before they were changed, if the folder does not tell.

    Raises:
        ValueError: a tag that exists, a pull request to a repository that does not, or a private upload to a public
            one.
        HfHubHTTPError: the Hub refuses.
        RuntimeError: a large file did not arrive.
    """
    check_tag(tag)
    folder, api = Path(folder), HfApi(token=token)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with ExitStack() as undo:
        if not api.repo_exists(repo_id):
            if create_pr:
                raise ValueError(f"There is no {repo_id} to open a pull request on; leave out create_pr.")
            api.create_repo(repo_id, private=private)
            undo.callback(attempt, f"delete {repo_id}", api.delete_repo, repo_id)
        elif private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public. Make it private in its settings, or use another name.")
        refs = api.list_repo_refs(repo_id)
        existing = [ref.name for ref in refs.tags]
        if tag in existing:
            raise ValueError(f"{repo_id} has a tag {tag!r} already; choose another.")
        if revision and not create_pr and revision not in [branch.name for branch in refs.branches]:
            api.create_branch(repo_id, branch=revision)
            undo.callback(attempt, f"delete the branch {revision}", api.delete_branch, repo_id, branch=revision)
        if not create_pr:
            tag = tag or next_version(existing)

        present = api.list_repo_files(repo_id, revision=None if create_pr else revision)
        files = contents(folder, repo_id, None if create_pr else tag, tags, name_or_path, api, present)
        if isinstance(files["README.md"], bytes) and card_on_hub_is_written_by_hand(api, repo_id, revision):
            del files["README.md"]
        # What the new version would otherwise be loaded with, or be judged by.
        outdated = "|".join([WEIGHTS, RESULTS, *([TOKENIZER] if "tokenizer_config.json" in files else [])])
        parent = api.model_info(repo_id, revision=revision).sha
        stale = [name for name in present if re.fullmatch(outdated, name) and name not in files]
        commit_message = commit_message or "Upload model"

        def undo_commit() -> None:
            head = api.list_repo_commits(repo_id, revision=revision)[0]
            # Whether it was made is not known where the Hub's answer was lost.
            if head.commit_id != parent and head.title == commit_message:
                restore(api, repo_id, revision, [*files, *stale], parent, head.commit_id)

        if not create_pr:
            undo.callback(attempt, f"take back the commit to {repo_id}", undo_commit)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        if not create_pr:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
        undo.pop_all()
    return commit


def attempt(what: str, function: Callable, *args, **kwargs) -> None:
    """Part of undoing: if it fails too, that is said, and the rest is undone all the same."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        logger.warning(f"The upload failed, and so did the attempt to {what} ({error}); please look after it.")


def restore(api: HfApi, repo_id: str, revision: str | None, names: list[str], parent: str, head: str) -> None:
    """Commits, on top of the commit `head`, the named files as they were in the commit `parent`."""
    before = api.list_repo_files(repo_id, revision=parent)
    api.create_commit(
        repo_id,
        [
            CommitOperationCopy(name, name, src_revision=parent) if name in before else CommitOperationDelete(name)
            for name in names
        ],
        commit_message="Undo an upload that failed",
        revision=revision,
        parent_commit=head,
    )


def card_on_hub_is_written_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return False
        return is_written_by_hand(Path(card).read_text())
