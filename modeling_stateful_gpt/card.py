"""The model card of a checkpoint folder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .checkpoint_files import count_parameters, finite, read_json, reading, weight_files
from .compat import OLDEST
from .state_adapter import LORA_FILES, STATE_WEIGHTS, read_description

TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}
"""The Auto class and the pipeline for each ending of a class name."""

NEEDS = " and ".join(f"{package} {version}" for package, version in OLDEST.items())
"""The oldest versions that the code works with."""

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


def base_model_of(config: dict[str, Any], run: dict[str, Any]) -> str | None:
    """The name on the Hub of the model whose weights these started from."""
    return on_the_hub(run.get("model_name_or_path") or config.get("text_config", {}).get("_name_or_path"))


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
    api: HfApi | None = None,
    present: Sequence[str] = (),
) -> ModelCard:
    """The model card of a checkpoint folder, from what `save_pretrained`, `train.py` and `evaluate.py` left in it."""
    config, run = read_json(folder / "config.json"), read_json(folder / "run.json")
    results = read_json(folder / "results.json")
    auto_class, pipeline_tag = task_of(config)
    with reading(folder / "run.json"):
        base_model = base_model_of(config, run)
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
        "parameters": f"{count_parameters(weight_files(folder)):,}",
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
        needs=NEEDS,
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


STATE_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ generated }}

A recurrent state for {% if base_model %}[{{ base_model }}](https://huggingface.co/{{ base_model }}){% else %}a language
model{% endif %}: the last hidden state of each token enriches the embedding of the next ({{ feedback }}).
{{ parameters }} parameters{% if lora %}, and LoRA weights beside them{% endif %}.

## Use

```python
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

{% set pinned = 'revision="' + revision + '"' if revision else "" -%}
code = "modeling_stateful_gpt.StatefulGPTForCausalLM"
StatefulGPT = get_class_from_dynamic_module(code, "{{ repo_id }}"{{ ", " + pinned if pinned else "" }})
model = StatefulGPT.from_backbone(
    "{{ base }}", state="{{ repo_id }}"{{ ", state_" + pinned if pinned else "" }}
)
tokenizer = AutoTokenizer.from_pretrained("{{ base }}")
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

This runs the code in this repository. It needs {{ needs }}, or newer. vLLM and SGLang cannot run it: from token to
token they carry keys and values, and no other state.

## Licence

The code is under the Apache License 2.0 (`LICENSE`).
"""


def make_state_card(
    folder: Path, repo_id: str, revision: str | None, tags: list[str] | None = None, api: HfApi | None = None
) -> ModelCard:
    """The model card of a folder that `save_state` has written."""
    description = read_description(folder)
    base_model, license_name = known_to(api, on_the_hub(description["base_model"]))
    return ModelCard.from_template(
        ModelCardData(
            license=license_name,
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=base_model,
            base_model_relation="adapter" if base_model else None,
            tags=sorted({"custom_code", "stateful-gpt", *(tags or [])}),
        ),
        template_str=STATE_TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        revision=revision,
        generated=GENERATED,
        base=description["base_model"] or "the language model's name",
        feedback=description["stateful_gpt"]["feedback"],
        parameters=f"{count_parameters([folder / STATE_WEIGHTS]):,}",
        lora=(folder / LORA_FILES[0]).exists(),
        needs=NEEDS,
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
