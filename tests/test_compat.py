"""The versions that the code works with, and what it says where they are older."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import BACKBONES, shared, tokens
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM
from modeling_stateful_gpt.compat import (
    CACHE,
    HOOKS,
    OLDEST,
    cache_argument,
    check_hooks,
    check_versions,
    slice_logits_to_keep,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", OLDEST)
def test_a_version_that_is_too_old_is_refused_in_one_sentence(package):
    check_versions(OLDEST)
    check_versions({"torch": "2.13.0+cpu", "transformers": "6.0.0.dev0"})
    with pytest.raises(ImportError, match=rf"needs {package} {re.escape(OLDEST[package])} or newer, and 1\.9 is") as it:
        check_versions({**OLDEST, package: "1.9"})
    assert "\n" not in str(it.value) and "pip install" in str(it.value)


def test_a_version_that_is_too_new_is_refused_in_one_sentence():
    with pytest.raises(
        ImportError, match=r"changes Linear\._renamed, which torch [\d.]+\S* does not have: it is too new.*pip install"
    ):
        check_hooks({**HOOKS, torch.nn.Linear: ("forward", "_renamed")})


IN_THE_PAST = """
import sys
sys.modules["modeling_stateful_gpt"] = None
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, cache_utils
transformers.__version__ = "5.0.0"
del cache_utils.LinearAttentionCacheLayerMixin, cache_utils.STATIC_LAYER_TYPE_MAPPING
for folder in sys.argv[1:]:
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        try:
            auto_class.from_pretrained(folder, trust_remote_code=True)
        except ImportError as error:
            print(error)
"""


def test_a_checkpoint_says_what_is_too_old_before_anything_is_missing(tmp_path):
    tiny = GateLoopConfig(hidden_size=16, num_hidden_layers=1)
    GateLoopForCausalLM(tiny).save_pretrained(tmp_path / "gpt")
    StatefulGPTForCausalLM(StatefulGPTConfig(text_config=tiny)).save_pretrained(tmp_path / "stateful")
    said = run_fresh("-c", IN_THE_PAST, tmp_path / "gpt", tmp_path / "stateful", cwd=tmp_path).splitlines()
    assert len(said) == 4 and set(said) == {
        f"This model's code needs transformers {OLDEST['transformers']} or newer, and 5.0.0 is installed: "
        f'pip install --upgrade "transformers>={OLDEST["transformers"]}"'
    }


def test_the_package_asks_for_the_versions_that_the_code_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    pinned = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line[0] != "#"]
    for package, version in (line.split("==") for line in pinned):
        if package in asked:
            assert f">={version.removesuffix('.0')}" in str(asked[package]), package
    for package, version in OLDEST.items():
        assert Version(version) in asked[package] and Version("1.0") not in asked[package]
        assert f"{package}=={version}.0" in pinned


PUBLIC = {"", ".initialization", ".masking_utils", ".modeling_layers", ".modeling_outputs", ".utils"}
"""The modules of transformers from which code for a custom model may import."""


def test_one_file_looks_inside_transformers():
    for file in (ROOT / "modeling_stateful_gpt").glob("*.py"):
        modules = [
            n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module
        ]
        ours = {module.removeprefix("transformers") for module in modules if module.startswith("transformers")}
        assert file.name == "compat.py" or ours <= PUBLIC, file.name


@pytest.mark.parametrize(
    "kept,positions",
    [
        (0, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (1, [[4], [4]]),
        (3, [[2, 3, 4], [2, 3, 4]]),
        (torch.tensor([4, 1]), [[4, 1], [4, 1]]),
        (torch.tensor([[0, 3], [2, 2]]), [[0, 3], [2, 2]]),
    ],
)
def test_the_positions_that_are_asked_for_are_kept(kept, positions):
    states = torch.randn(2, 5, 3)
    expected = torch.stack([states[row, wanted] for row, wanted in enumerate(positions)])
    assert torch.equal(slice_logits_to_keep(states, kept), expected)
    model = GateLoopForCausalLM(GateLoopConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)).eval()
    ids = tokens(2, 5)
    whole = torch.stack([model(ids).logits[row, wanted] for row, wanted in enumerate(positions)])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, whole)


def test_the_positions_of_a_mask_are_kept():
    states, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(slice_logits_to_keep(states, mask), torch.stack([states[0, 0], states[0, 2], states[1, 1]]))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_cache_may_be_given_by_either_of_its_names(name):
    ids = tokens(2, 7)
    for model in (shared(name), shared(name).model, shared(name, feedback=None)):
        with torch.no_grad():
            expected, *others = (
                model(ids[:, 5:], **{argument: model(ids[:, :5], use_cache=True).past_key_values})[0]
                for argument in ("past_key_values", "past_key_values", "cache")
            )
        assert all(torch.equal(other, expected) for other in others)
        cache = DynamicCache(config=model.config)
        model(ids, cache=None, past_key_values=cache)
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            model(ids, cache=cache, past_key_values=DynamicCache(config=model.config))


def test_a_language_model_is_given_its_cache_by_the_name_it_has():
    class Renamed(LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None, **kwargs):
            assert kwargs.pop("past_key_values", None) is None
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
            return super().forward(**inputs, **{CACHE: cache}, **kwargs)

    backbone = LlamaForCausalLM(BACKBONES["llama"]())
    backbone.model.__class__ = Renamed
    model = StatefulGPTForCausalLM.from_backbone(backbone.eval(), feedback="glu")
    ids = tokens(2, 7)
    whole = model(ids, solver="sequential").logits
    torch.testing.assert_close(model(ids, solver="jacobi").logits, whole, atol=1e-3, rtol=1e-3)
    assert cache_argument(Renamed.forward) == "cache" and cache_argument(torch.nn.Linear.forward) is None
