"""Tiny random models whose feedback matters, over each kind of backbone."""

from collections.abc import Iterable
from functools import cache
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from transformers.dependency_versions_table import deps

from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig, StatefulGPTForCausalLM

OLD_TORCH = Version(torch.__version__) < Version("2.13.dev0")

VOCAB = 50
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **NO_SPECIAL_TOKENS,
}
BACKBONES = {
    "gateloop": lambda: GateLoopConfig(**LLAMA_LIKE),
    "gateloop-nope": lambda: GateLoopConfig(**LLAMA_LIKE, position_embedding_type="none", mlp_type="swiglu"),
    "gateloop-pure": lambda: GateLoopConfig(**LLAMA_LIKE, layer_types=["gateloop"] * 2),
    "gateloop-hybrid": lambda: GateLoopConfig(
        **LLAMA_LIKE, layer_types=["gateloop", "full_attention"], gateloop_num_heads=4, gateloop_output_norm=True
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **NO_SPECIAL_TOKENS
    ),
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=8),
}
WINDOWED = {"mistral": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=4)}
"""Backbones whose cache keeps the last tokens alone."""
FUSIONS = ["gated_add", "glu", "correction"]
DTYPES = [torch.float64, torch.float32]

MANY = settings(max_examples=3 * settings.default.max_examples)
"""For a property of every model: so many examples that each backbone and each fusion is drawn several times."""


def few(cases: Iterable, kept: Iterable) -> list:
    """The parameters `cases` of a test that is slow by nature: all but the `kept` are exhaustive."""
    cases, kept = list(cases), list(kept)
    assert all(case in cases for case in kept)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in kept else pytest.mark.exhaustive for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]


def models(backbones=BACKBONES, fusions=FUSIONS, dtypes=DTYPES) -> st.SearchStrategy[dict]:
    """Arguments of `stateful` and `shared`."""
    kinds = {"backbone": sorted(backbones), "feedback": fusions, "dtype": dtypes}
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in kinds.items()})


def text_config(backbone: str) -> PreTrainedConfig:
    return (BACKBONES | WINDOWED)[backbone]()


JACOBI = {"training_solver": "jacobi", "num_no_grad_passes": 0}
"""The passes that are the easiest to follow, two of them."""


def stateful(
    backbone: str | PreTrainedConfig = "gateloop", dtype: torch.dtype = torch.float64, **config
) -> StatefulGPTForCausalLM:
    """In eval mode, solved until nothing changes, with weights large enough for every path to matter."""
    torch.manual_seed(0)
    config = {"tolerance": 0.0, "solver": "cyclic", **JACOBI, "num_passes": 2, **config}
    decoder = text_config(backbone) if isinstance(backbone, str) else backbone
    model = StatefulGPTForCausalLM(StatefulGPTConfig(text_config=decoder, **config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        embedding = model.get_input_embeddings().weight
        embedding.add_(0.5 * torch.randn_like(embedding))
    return model


@cache
def shared(backbone: str = "gateloop", dtype: torch.dtype = torch.float64, **config) -> StatefulGPTForCausalLM:
    """`stateful`, made once for tests that leave it as it is."""
    return stateful(backbone, dtype, **config)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}


def import_peft() -> ModuleType:
    """peft; the test is skipped without it, or where transformers asks for a newer one."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    needed = Requirement(deps["peft"])
    if Version(peft.__version__) not in needed.specifier:
        reason = f"this transformers works with {needed}; peft {peft.__version__} is installed"
        pytest.skip(reason, allow_module_level=True)
    return peft
