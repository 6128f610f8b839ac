"""What `save_pretrained` writes loads in a process that cannot import this package."""

import json

import pytest
import torch
import transformers
from data import byte_tokenizer
from fresh import run_fresh
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, VOCAB, tokens
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    pipeline,
)

from modeling_stateful_gpt import (
    GateLoopConfig,
    GateLoopForCausalLM,
    GateLoopModel,
    StatefulGPTConfig,
    StatefulGPTForCausalLM,
    StatefulGPTModel,
)

STRANGER = """
import sys
sys.modules["modeling_stateful_gpt"] = None  # any import of the package now fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
for path in sys.argv[1:]:
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    ids = torch.load(path + "/ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), logits)
    tokenizer = AutoTokenizer.from_pretrained(path)
    generator = pipeline("text-generation", model=path, trust_remote_code=True)
    text = generator("def f", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    torch.manual_seed(0)
    again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    spread = {name: p.std().item() for name, p in again.named_parameters() if p.numel() > 1}
    model.save_pretrained(path + "/resaved")
    torch.save({"logits": logits, "text": text, "spread": spread}, path + "/seen.pt")
"""


def small(name):
    if name == "gpt":
        return GateLoopForCausalLM(GateLoopConfig(hidden_size=32, num_hidden_layers=2))
    if name == "hybrid":
        layer_types = ["gateloop", "full_attention"]
        return GateLoopForCausalLM(GateLoopConfig(hidden_size=32, num_hidden_layers=2, layer_types=layer_types))
    backbone = {
        "stateful": None,
        "stateful around gateloop": GateLoopConfig(
            hidden_size=32, num_hidden_layers=2, layer_types=["gateloop"] * 2
        ),
        "stateful around gpt2": GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, eos_token_id=256),
        "stateful around llama": LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            eos_token_id=256, bos_token_id=256,
        ),
    }[name]  # fmt: skip
    return StatefulGPTForCausalLM(StatefulGPTConfig(text_config=backbone, feedback="glu"))


KINDS = ["gpt", "hybrid", "stateful", "stateful around gateloop", "stateful around gpt2", "stateful around llama"]


def kept(name):
    torch.manual_seed(0)
    return small(name).eval()


@pytest.fixture(scope="module")
def seen_by_a_stranger(tmp_path_factory):
    """The folders of all kinds of model, each loaded in a process that cannot import the package."""
    folder = tmp_path_factory.mktemp("saved")
    for name in KINDS:
        kept(name).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        torch.save(tokens(2, 9), folder / name / "ids.pt")
    paths = [str(folder / name) for name in KINDS]
    run_fresh("-c", STRANGER, *paths, cwd=folder)
    return folder


@pytest.mark.client("transformers", "`AutoModel….from_pretrained` with `trust_remote_code=True`")
@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_loads_where_the_package_cannot_be_imported(name, seen_by_a_stranger):
    model, tokenizer, ids = kept(name), byte_tokenizer(), tokens(2, 9)
    seen = torch.load(seen_by_a_stranger / name / "seen.pt")
    with torch.no_grad():
        torch.testing.assert_close(seen["logits"], model(ids).logits, atol=1e-6, rtol=1e-6)
    expected = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert seen["text"] == tokenizer.decode(expected[0])
    for parameter, spread in seen["spread"].items():
        assert spread == pytest.approx(model.get_parameter(parameter).std().item(), rel=0.3, abs=1e-3), parameter
    resaved = type(model).from_pretrained(seen_by_a_stranger / name / "resaved")
    torch.testing.assert_close(resaved(ids).logits, model(ids).logits)


def test_the_saved_configuration_names_every_auto_class(tmp_path):
    small("stateful").save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    heads = {"AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"}
    assert set(auto_map) == {"AutoConfig", "AutoModel", *heads}
    for reference in auto_map.values():
        assert (tmp_path / (reference.split(".")[0] + ".py")).is_file()


@pytest.mark.parametrize(
    "model,config_class,base_class",
    [("gpt", GateLoopConfig, GateLoopModel), ("stateful", StatefulGPTConfig, StatefulGPTModel)],
)
def test_after_importing_the_package_the_auto_classes_need_no_remote_code(model, config_class, base_class, tmp_path):
    small(model).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    assert type(AutoModel.from_pretrained(tmp_path)) is base_class
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(small(model))
    assert AutoTokenizer.from_pretrained(tmp_path)("hé")["input_ids"] == list("hé".encode())
    text = pipeline("text-generation", model=str(tmp_path))("def f", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("def f")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_configuration_survives_saving(backbone, tmp_path):
    config = StatefulGPTConfig(
        text_config=BACKBONES[backbone](), feedback="correction", pass_probabilities=[0.5, 0.5], tolerance=1e-3
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert type(loaded.text_config) is type(config.text_config)


AUTO_CLASSES = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
]
TRUSTED = {"trust_remote_code": True}


@pytest.fixture(params=[False, True], ids=["package unknown", "package imported"])
def auto_classes(request, monkeypatch):
    """The Auto classes with what importing the package registers, or as where it was never imported."""
    for mapping in (CONFIG_MAPPING, *(getattr(transformers, name)._model_mapping for name in AUTO_CLASSES)):
        registered = mapping._extra_content.items() if request.param else ()
        monkeypatch.setattr(mapping, "_extra_content", dict(registered))


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB, "num_attention_heads": 2, "pad_token_id": 0}
REVISED = {
    "gateloop": lambda: GateLoopForCausalLM(GateLoopConfig(**TINY, layer_types=["gateloop", "full_attention"])),
    "stateful": lambda: StatefulGPTForCausalLM(StatefulGPTConfig(text_config=GateLoopConfig(**TINY))),
    "stateful around llama": lambda: StatefulGPTForCausalLM(
        StatefulGPTConfig(text_config=LlamaConfig(**TINY, intermediate_size=16))
    ),
}


def save_revision(model, folder, revision):
    """Saves a model, and beside it the code of a revision of its own: base models have one parameter more, which has
    been trained to 1."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for path, module in model.named_modules():
        if isinstance(module, (GateLoopModel, StatefulGPTModel)):
            weights[f"{path}.{revision}"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("modeling_*.py"):
        add_line(file, "self.gradient_checkpointing = False", f"self.{revision} = nn.Parameter(torch.zeros(2))")
    return folder


def add_line(file, line, further):
    before, after = file.read_text().split(line)
    indent = before.rsplit("\n")[-1]
    file.write_text(f"{before}{line}\n{indent}{further}{after}")


def revisions(model):
    """Those whose trained parameters the model has."""
    return {name.split(".")[-1] for name, parameter in model.named_parameters() if parameter.tolist() == [1, 1]}


def two_revisions(name, tmp_path):
    # Folders of two runs may have the same name, as checkpoint-100 does.
    return {
        revision: save_revision(REVISED[name](), tmp_path / revision / tmp_path.name, revision)
        for revision in ("old", "new")
    }


@pytest.mark.parametrize("name", REVISED)
def test_each_checkpoint_runs_the_code_beside_its_weights(name, auto_classes, tmp_path):
    folders = two_revisions(name, tmp_path)
    between = save_revision(REVISED["gateloop"](), tmp_path / f"{tmp_path.name}-between", "between")
    for revision in ("old", "new", "old", "new"):
        for auto_class in AUTO_CLASSES:
            model = getattr(transformers, auto_class).from_pretrained(folders[revision], **TRUSTED)
            assert revisions(model) == {revision}
        assert revisions(AutoModelForCausalLM.from_pretrained(between, **TRUSTED)) == {"between"}


@pytest.mark.parametrize("name", REVISED)
def test_what_is_made_of_a_revision_is_of_that_revision(name, auto_classes, tmp_path):
    folders = two_revisions(name, tmp_path)
    models = {revision: AutoModelForCausalLM.from_pretrained(folders[revision], **TRUSTED) for revision in folders}
    for revision, model in models.items():
        model.save_pretrained(tmp_path / f"{tmp_path.name}-again")
        byte_tokenizer().save_pretrained(tmp_path / f"{tmp_path.name}-again")
        generator = pipeline("text-generation", model=str(tmp_path / f"{tmp_path.name}-again"), **TRUSTED)
        assert revisions(generator.model) == {revision}
        config = AutoConfig.from_pretrained(folders[revision], **TRUSTED)
        assert hasattr(AutoModelForCausalLM.from_config(config, **TRUSTED).model, revision)


@pytest.mark.parametrize("name", ["gateloop", "stateful"])
def test_each_checkpoint_has_the_configuration_beside_its_weights(name, auto_classes, tmp_path):
    folders = two_revisions(name, tmp_path)
    for number, folder in enumerate(folders.values()):
        add_line(folder / "configuration_gateloop.py", 'model_type = "gateloop"', f"number: int = {number}")
    seen = [AutoConfig.from_pretrained(folder, **TRUSTED).get_text_config().number for folder in folders.values()]
    assert seen == [0, 1]


def test_loading_a_revision_changes_nothing_for_a_model_that_is_there(auto_classes, tmp_path):
    folders, ids = two_revisions("gateloop", tmp_path), tokens(2, 70)
    # The new revision has another operator, and another cache layer.
    add_line(folders["new"] / "linear_scan.py", "scan_into(h, a, x.to(a.dtype), initial)", "h.mul_(2)")
    add_line(folders["new"] / "cache_layers.py", "y, self.state = recur(self.state, **inputs)", "y = -y")

    def outcome(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        with_cache = model(ids, use_cache=True).logits
        return with_cache, *(parameter.grad for parameter in model.model.layers[0].mixer.parameters())

    ours = REVISED["gateloop"]()
    old = AutoModelForCausalLM.from_pretrained(folders["old"], **TRUSTED)
    before = [outcome(model) for model in (ours, old)]
    new = AutoModelForCausalLM.from_pretrained(folders["new"], **TRUSTED)
    for model, expected in zip((ours, old), before, strict=True):
        torch.testing.assert_close(outcome(model), expected, atol=0, rtol=0)
    new.load_state_dict(old.state_dict(), strict=False)
    assert (new(ids, use_cache=True).logits - old(ids, use_cache=True).logits).abs().max() > 1e-3


def test_no_class_is_offered_to_servers_that_carry_keys_and_values_only():
    """vLLM and SGLang ask every class that `auto_map` names, whatever its configuration says."""
    for config in (GateLoopConfig(), StatefulGPTConfig()):
        for auto in (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
        ):
            assert not auto._model_mapping[type(config)].is_backend_compatible()
