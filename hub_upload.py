"""Publishes a checkpoint folder on the Hugging Face Hub, with code, tokenizer, licence and model card, in one commit.
A state that `save_state` has written is published in the same way, without its language model.

    python hub_upload.py runs/mine me/mine --dry-run
    python hub_upload.py runs/mine me/mine --private

The model card is made of what `train.py` and `evaluate.py` left beside the weights, pictures included; a README.md
that is written by hand, in the folder or on the Hub, is kept. The commit gets a tag (v1, v2, …), and the card's example
loads that version.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import modeling_stateful_gpt
from modeling_stateful_gpt.card import task_of
from modeling_stateful_gpt.checkpoint_files import code, read_json, read_text, weight_files, with_imports
from modeling_stateful_gpt.configuration_stateful_gpt import DECODE_MODES
from modeling_stateful_gpt.feedback import FUSIONS
from modeling_stateful_gpt.ranges import COUNT, FRACTION, POSITIVE, PROBABILITY, SIZE, check_name, check_number
from modeling_stateful_gpt.solvers import SOLVERS
from modeling_stateful_gpt.state_adapter import STATE_CONFIG, STATE_WEIGHTS, read_description
from modeling_stateful_gpt.upload import check_tag, contents, upload


class UploadError(ValueError):
    """The upload cannot be made as asked; the message says what to do."""


def check_checkpoint(folder: Path) -> None:
    """Raises an UploadError for a folder from which `from_pretrained` could not load a model and its tokenizer."""
    if not folder.is_dir():
        raise UploadError(f"There is no folder {folder}.")
    if (folder / STATE_CONFIG).exists():
        return check_state(folder)
    if (folder / "adapter_config.json").exists():
        raise UploadError(f"{folder} holds a PEFT adapter; PeftModel.from_pretrained(…).push_to_hub(…) publishes it.")
    try:
        raw = json.loads(read_text(folder / "config.json"))
        auto_class, _ = task_of(raw)
        name = raw["auto_map"][auto_class].split(".")[1]
        if raw["architectures"][0] not in (name, auto_class):  # The latter for `transformers serve`.
            raise ValueError(f"the architecture is {raw['architectures'][0]}, but auto_map names {name}")
        with torch.device("meta"):
            model_class: type[PreTrainedModel] = getattr(modeling_stateful_gpt, name)
            expected = model_class(AutoConfig.from_pretrained(folder))
    except Exception as error:
        raise UploadError(
            f"{folder} is no checkpoint of this package: its config.json cannot be used "
            f"({type(error).__name__}: {error}). Save one with save_pretrained, or name an output folder of train.py."
        ) from error
    for file in sorted(folder / name for name in code(folder)):
        if not file.exists():
            raise UploadError(f"{folder} lacks its code ({file.name}). Save it again with model.save_pretrained.")
        if not ast.parse(read_text(file)).body:
            raise UploadError(f"{file} is empty. Save the checkpoint again with model.save_pretrained.")
    if not (folder / SAFE_WEIGHTS_NAME).exists() and not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise UploadError(
            f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, which lists their "
            f"parts. Save it again with model.save_pretrained."
        )

    shapes, wanted = {}, expected.state_dict()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                    tensor = weights.get_tensor(name)
                    shapes[name] = tuple(tensor.shape)
                    if name in wanted and tensor.is_floating_point() != wanted[name].is_floating_point():
                        raise UploadError(f"{name} in {file} is {tensor.dtype}, no weight. Save the checkpoint again.")
                    if not tensor.isfinite().all():
                        raise UploadError(f"{name} in {file} is not finite. Train it again, or upload another one.")
        except (SafetensorError, OSError) as error:
            raise UploadError(f"{file} is damaged, or missing ({error}). Save the checkpoint again.") from error
    tied = set(expected.all_tied_weights_keys)
    ignored = expected._keys_to_ignore_on_load_unexpected or []
    surplus = sorted(name for name in shapes.keys() - wanted.keys() if not any(re.search(i, name) for i in ignored))
    if surplus:
        raise UploadError(
            f"{folder} has weights for which its config.json has no place: {', '.join(surplus[:3])}"
            f"{' …' if len(surplus) > 3 else ''}. They do not belong together; save the model again."
        )
    lacking = [name for name, z in wanted.items() if name not in tied and shapes.get(name) != tuple(z.shape)]
    if lacking:
        raise UploadError(
            f"{folder} has no weights (*.safetensors), or of other shapes, for {', '.join(lacking[:3])}"
            f"{' …' if len(lacking) > 3 else ''}. Its config.json and its weights do not belong together, or it was "
            f"not saved completely; save it again with model.save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UploadError(
            f"{folder} has no tokenizer that loads ({type(error).__name__}). Save one into it with "
            f"tokenizer.save_pretrained({str(folder)!r})."
        ) from error
    vocab_size = expected.config.get_text_config().vocab_size
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise UploadError(
            f"The tokenizer in {folder} has a token {last}, the model only those up to {vocab_size - 1}. They do not "
            f"belong together; save the model's own with tokenizer.save_pretrained({str(folder)!r})."
        )
    if auto_class == "AutoModelForCausalLM":
        try:
            GenerationConfig.from_pretrained(folder)
            check_generation(read_json(folder / "generation_config.json"), vocab_size)
        except Exception as error:
            raise UploadError(
                f"{folder} has no generation_config.json that loads ({type(error).__name__}: {error}). Save it again "
                f"with model.save_pretrained."
            ) from error


GENERATION = {
    "max_length": SIZE,
    "max_new_tokens": SIZE,
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "num_beams": SIZE,
    "num_return_sequences": SIZE,
    "top_k": COUNT,
    "no_repeat_ngram_size": COUNT,
    "num_passes": SIZE,
    "temperature": POSITIVE,
    "top_p": FRACTION,
    "min_p": PROBABILITY,
    "typical_p": FRACTION,
    "repetition_penalty": POSITIVE,
}
"""Of the fields of a generation configuration, those with numbers, where they are given."""


def check_generation(fields: dict[str, Any], vocab_size: int) -> None:
    """Raises a ValueError for what `generate()` would refuse."""
    for name, allowed in GENERATION.items():
        if fields.get(name) is not None:
            check_number(name, fields[name], allowed)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokens = fields.get(name)
        for token in tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(f"{name} is {token!r}; the tokens are 0 … {vocab_size - 1}")
    check_name("decode_mode", fields.get("decode_mode"), [*DECODE_MODES, None])
    check_name("solver", fields.get("solver"), [*SOLVERS, None])


def check_state(folder: Path) -> None:
    """Raises an UploadError for a folder that `save_state` has not written, or whose weights are no fusion."""
    try:
        description = read_description(folder)
        hidden_size = description["hidden_size"]
        fusion = FUSIONS[description["stateful_gpt"]["feedback"]](hidden_size)
        weights = load_file(folder / STATE_WEIGHTS)
        fusion.load_state_dict(weights)
    except Exception as error:
        raise UploadError(
            f"{folder} holds a state that cannot be used ({type(error).__name__}: {error}). Save it again with "
            f"save_state."
        ) from error
    if not all(z.isfinite().all() for z in weights.values()):
        raise UploadError(f"{folder / STATE_WEIGHTS} is not finite. Train it again, or upload another one.")
    for name in sorted(with_imports(folder, ["modeling_stateful_gpt"])):
        if not (folder / name).exists():
            raise UploadError(f"{folder} lacks its code ({name}). Save it again with save_state.")


def show(folder: Path, repo_id: str, tag: str | None) -> None:
    table = Table("file", "size", title=f"{folder} → {repo_id} (nothing was changed)")
    for name, content in sorted(contents(folder, repo_id, tag).items()):
        table.add_row(name, decimal(len(content) if isinstance(content, bytes) else content.stat().st_size))
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("repo_id", help="namespace/name, or a name in your own namespace")
    parser.add_argument("--private", action="store_true", help="only you can see the new repository")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request; tag it when it is merged")
    parser.add_argument("--revision", help="the branch to commit to; it is created if it does not exist")
    parser.add_argument("--tag", help="the tag of the commit; default: the first of v1, v2, … that is free")
    parser.add_argument("--dry-run", action="store_true", help="print every file and its size, and change nothing")
    options = parser.parse_args(arguments)
    folder, repo_id = options.checkpoint, options.repo_id
    try:
        validate_repo_id(repo_id)
        check_tag(options.tag)
        if options.create_pr and options.tag:
            raise UploadError("A pull request gets no tag before it is merged; leave out --tag.")
        check_checkpoint(folder)
        if options.dry_run:
            show(folder, repo_id, None if options.create_pr else options.tag or "v1")
            return
        if get_token() is None:
            raise UploadError(
                "You are not logged in to the Hub. Make a token with write access at "
                "https://huggingface.co/settings/tokens and run `hf auth login`, or set HF_TOKEN."
            )
        commit = upload(
            folder,
            repo_id,
            private=options.private or None,
            revision=options.revision,
            create_pr=options.create_pr,
            tag=options.tag,
        )
        print(commit.pr_url or commit.commit_url)
    except HfHubHTTPError as error:
        advice = {
            401: "The token is not valid; make one at https://huggingface.co/settings/tokens and run `hf auth login`.",
            412: "Someone else has changed the repository in the meantime; look at it and give the command again.",
            403: "The token may not write there: choose your own namespace, a token with write access, or --create-pr.",
        }.get(error.response.status_code, "What had been done was undone; try again later.")
        sys.exit(f"error: The Hub refused: {error}\n{advice}")
    except (HFValidationError, ValueError) as error:
        sys.exit(f"error: {error}")
    except (HTTPError, OSError) as error:
        sys.exit(f"error: The Hub cannot be reached, or a file not be read: {error}")
    except RuntimeError as error:
        sys.exit(f"error: A file did not arrive: {error}\nWhat had been done was undone; try again later.")


if __name__ == "__main__":
    main()
