"""Checkpoints of earlier versions load, and compute what they computed.

Each folder of `tests/checkpoints` holds a tiny model as commit 8111349^ saved it, and in `expected.safetensors` the
logits of a padded batch by that commit's code.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_stateful_gpt  # noqa: F401 (registers the models)

CHECKPOINTS = sorted((Path(__file__).parent / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_version_computes_the_same(folder, tmp_path):
    expected = load_file(folder / "expected.safetensors")
    ids, mask, logits = (expected[name] for name in ("input_ids", "attention_mask", "logits"))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), "no weight is missing, left over or of another shape"
    real = mask.bool()
    for loaded in (model.eval(), saved_again(model, tmp_path)):
        with torch.no_grad():
            again = loaded(ids, attention_mask=mask).logits
        torch.testing.assert_close(again[real], logits[real], atol=1e-5, rtol=1e-5)


def saved_again(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
