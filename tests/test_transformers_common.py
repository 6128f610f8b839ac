"""transformers' own tests of every model, run over ours.

What they skip themselves says why: kernels, accelerators and architectures that are not there.
"""

import copy
import sys
import types
import unittest

import pytest
import torch
from fetch_transformers_tests import FOLDER
from tiny import JACOBI
from transformers import LlamaConfig, PreTrainedConfig

import modeling_stateful_gpt
from modeling_stateful_gpt import GateLoopConfig, StatefulGPTConfig

if not FOLDER.exists():
    pytest.skip(f"run python tests/fetch_transformers_tests.py to fetch {FOLDER.name}", allow_module_level=True)


def stand_in(name: str, **contents) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


# The source distribution leaves out the subfolders of tests, and with them two files that the common tests import.
stand_in("transformers_tests", __path__=[str(FOLDER)])
stand_in("transformers_tests.exporters", __path__=[])
stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=object)
stand_in("transformers_tests.generation", __path__=[])
stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))

from transformers_tests import test_modeling_common as common  # noqa: E402

# Tests that cannot apply, with the reason.
EXCLUDED_WITHOUT_ATTENTION = {
    f"test_model_rope_scaling_from_config_{scaling}": "no layer attends, so there are no positions to scale"
    for scaling in ("0_linear", "1_dynamic", "2_yarn")
}

TASKS = {
    "MODEL_MAPPING_NAMES": "Model",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ForTokenClassification",
}
# By these tables the tests know which labels a class wants. They get copies: transformers itself uses the originals.
for table, suffix in TASKS.items():
    ours = {"gateloop": f"GateLoop{suffix}", "stateful_gpt": f"StatefulGPT{suffix}"}
    setattr(common, table, {**getattr(common, table), **ours})

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


class ModelTester:
    """What the tests ask for the model to be tested."""

    is_training = True
    batch_size = 3
    seq_length = 7
    hidden_size = SIZES["hidden_size"]
    num_attention_heads = SIZES["num_attention_heads"]
    expected_num_hidden_layers = SIZES["num_hidden_layers"] + 1

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        # They expect as many attention maps.
        self.num_hidden_layers = getattr(config.get_text_config(), "layer_types", ["full_attention"] * 2).count(
            "full_attention"
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids).tril(self.seq_length - self.batch_size)  # 5, 6 and 7 tokens
        return copy.deepcopy(self.config), {"input_ids": ids, "attention_mask": mask}


# The tests of generation are in one of the folders that are left out; that a model has them is itself tested.
@pytest.mark.client("transformers", "`ModelTesterMixin` of its own tests")
class Common(common.ModelTesterMixin, common.GenerationTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True
    excluded: dict[str, str] = {}

    def setUp(self):
        if self._testMethodName in self.excluded:
            self.skipTest(self.excluded[self._testMethodName])
        torch.manual_seed(0)
        self.model_tester = ModelTester(self.config())

    def test_what_is_excluded_exists(self):
        self.assertLessEqual(self.excluded.keys(), set(dir(self)))


class GateLoop(Common):
    all_model_classes = [getattr(modeling_stateful_gpt, f"GateLoop{suffix}") for suffix in TASKS.values()]

    def config(self) -> PreTrainedConfig:
        return GateLoopConfig(**SIZES, layer_types=self.layer_types, gateloop_num_heads=4)


class Stateful(Common):
    all_model_classes = [getattr(modeling_stateful_gpt, f"StatefulGPT{suffix}") for suffix in TASKS.values()]
    _is_composite = True

    def config(self) -> PreTrainedConfig:
        # Solved until nothing changes, as the tests compare to 1e-5.
        return StatefulGPTConfig(text_config=super().config(), tolerance=0.0, **JACOBI, num_passes=2)


class Llama:
    def config(self) -> PreTrainedConfig:
        return LlamaConfig(**SIZES)


class Attention(GateLoop):
    layer_types = ["full_attention"] * 2


class Recurrence(GateLoop):
    layer_types = ["gateloop"] * 2
    has_attentions = False
    excluded = EXCLUDED_WITHOUT_ATTENTION


@pytest.mark.exhaustive
class GPTTest(Attention, unittest.TestCase):
    pass


@pytest.mark.exhaustive
class GateLoopTest(Recurrence, unittest.TestCase):
    pass


class HybridTest(GateLoop, unittest.TestCase):
    layer_types = ["gateloop", "full_attention"]


@pytest.mark.exhaustive
class ReversibleTest(Recurrence, unittest.TestCase):
    layer_types = ["reversible"] * 2


@pytest.mark.exhaustive
class RWKVTest(Recurrence, unittest.TestCase):
    layer_types = ["reversible", "rwkv"]


class StatefulGPTTest(Stateful, Attention, unittest.TestCase):
    pass


@pytest.mark.exhaustive
class StatefulGateLoopTest(Stateful, Recurrence, unittest.TestCase):
    pass


@pytest.mark.exhaustive
class StatefulLlamaTest(Stateful, Llama, unittest.TestCase):
    pass
