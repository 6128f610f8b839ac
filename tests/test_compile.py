"""torch.compile of training steps and of decoding: no graph breaks, and the numbers of eager mode; torch.export."""

import copy
import shutil
from itertools import product

import pytest
import torch
from tiny import BACKBONES, FUSIONS, JACOBI, LLAMA_LIKE, OLD_TORCH, few, stateful, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig, GPT2Config, LlamaConfig

from modeling_stateful_gpt import GateLoopConfig, GateLoopForCausalLM, StatefulGPTConfig, StatefulGPTForCausalLM

BREAKS_ELSEWHERE = "torch before 2.13 breaks this graph elsewhere"
new_torch = pytest.mark.skipif(OLD_TORCH, reason=BREAKS_ELSEWHERE)

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


ONE_LAYER = {**LLAMA_LIKE, "num_hidden_layers": 1}
DECODERS = {
    "gpt": lambda: GateLoopConfig(**ONE_LAYER),
    "dropout": lambda: GateLoopConfig(**ONE_LAYER, hidden_dropout=0.5, attention_dropout=0.2),
    "gateloop": lambda: GateLoopConfig(**ONE_LAYER, layer_types=["gateloop"]),
    "hybrid": lambda: GateLoopConfig(**LLAMA_LIKE, layer_types=["gateloop", "full_attention"], gateloop_num_heads=2),
    "gpt2": lambda: GPT2Config(**{**BACKBONES["gpt2"]().to_dict(), "n_layer": 1, **NO_DROPOUT}),
    "llama": lambda: LlamaConfig(**ONE_LAYER),
}


def decoder(**config):
    return lambda: GateLoopForCausalLM(GateLoopConfig(**ONE_LAYER, **config))


def around(name, **config):
    config = {**JACOBI, "num_passes": 2, **config}
    return lambda: StatefulGPTForCausalLM(StatefulGPTConfig(text_config=DECODERS[name](), **config))


STEPS = {
    "gpt": decoder(),
    "gpt with dropout": decoder(hidden_dropout=0.5, attention_dropout=0.2),
    "gateloop complex": decoder(layer_types=["gateloop"]),
    "gateloop signed": decoder(layer_types=["gateloop"], state_transition="signed"),
    "gateloop positive": decoder(layer_types=["gateloop"], state_transition="positive"),
    "gateloop cartesian": decoder(layer_types=["gateloop"], state_transition="cartesian"),
    "hybrid": lambda: GateLoopForCausalLM(DECODERS["hybrid"]()),
    **{f"stateful {feedback}": around("gpt", feedback=feedback) for feedback in FUSIONS},
    "stateful with dropout": around("dropout"),
    "stateful, noise": around("gateloop", feedback_noise=0.1, num_passes=3),
    "stateful, cyclic": around("gpt", training_solver="cyclic", num_passes=3, num_groups=2),
    "stateful, as by default": around(
        "gpt", training_solver="cyclic", num_no_grad_passes=2, num_passes=1, num_groups=2
    ),
    "stateful token shift": around("gpt", feedback_source="embedding"),
    "stateful around gpt2": around("gpt2"),
    "stateful around hybrid": around("hybrid"),
    "stateful around llama": around("llama"),
    "stateful around llama, cyclic": around("llama", training_solver="cyclic", num_groups=2),
}


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()


class Counting:
    """Runs graphs as they are, and counts them."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self


def make(name):
    torch.manual_seed(0)
    return STEPS[name]()


def padding(length):
    return (torch.arange(length) >= torch.tensor([[0], [3]])).long()


def step(model, run, **inputs):
    torch.manual_seed(1)
    model.zero_grad()
    outputs = run(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    return outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# One of each shape of graph.
KINDS_OF_STEP = [
    "gateloop complex",
    "stateful, as by default",
    "stateful around llama, cyclic",
]


@pytest.mark.client("torch", "`torch.compile` of a training step")
@pytest.mark.parametrize("name", few(STEPS, KINDS_OF_STEP))
def test_a_training_step_is_one_graph_with_the_gradients_of_eager_mode(name):
    model = make(name).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(9)}
    for _ in range(2):
        (expected, gradients), (outputs, compiled_gradients) = (
            step(model, model, **inputs),
            step(model, compiled, **inputs),
        )
        torch.testing.assert_close(outputs.loss, expected.loss, **CLOSE)
        torch.testing.assert_close(compiled_gradients, gradients, **CLOSE)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "name", few(["gpt", "gateloop complex", "hybrid", "stateful gated_add"], ["stateful gated_add"])
)
def test_steps_of_all_lengths_are_two_graphs(name):
    if OLD_TORCH and name == "stateful gated_add":
        pytest.skip(BREAKS_ELSEWHERE)
    model, backend = make(name).train(), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for length in (9, 12, 17, 30):
        step(model, compiled, input_ids=tokens(2, length))
    assert backend.graphs == 2


@new_torch
@pytest.mark.parametrize("solver,fullgraph", few([("jacobi", True), ("cyclic", False)], [("cyclic", False)]))
def test_a_packed_training_step_is_compiled(solver, fullgraph):
    model = around("gpt", training_solver=solver, num_passes=2, num_groups=2)().train()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    for lengths in ((3, 6), (1, 5, 3)):
        positions = torch.cat([*map(torch.arange, lengths)])[None]
        inputs = {"input_ids": tokens(1, 9), "position_ids": positions, "use_cache": False}
        torch.testing.assert_close(step(model, compiled, **inputs)[1], step(model, model, **inputs)[1], **CLOSE)
    assert ["find_packing" in reason for reason in counters["graph_break"]] == [True] * (solver == "cyclic")


@new_torch
def test_given_the_number_of_passes_there_is_one_graph_for_each():
    torch.manual_seed(0)
    model = around("gpt", pass_probabilities=[0.3, 0.3, 0.4])().train()
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    numbers = [model.model.draw_num_passes() for _ in range(12)]
    for number in numbers:
        outputs = compiled(input_ids=tokens(2, 9), labels=tokens(2, 9), num_passes=number)
        assert len(outputs.pass_losses) == number
    assert set(numbers) == {1, 2, 3} and backend.graphs == 3


@new_torch
def test_drawing_the_number_of_passes_breaks_the_graph_there_and_nowhere_else():
    torch.manual_seed(0)
    model = around("gpt", pass_probabilities=[0.5, 0.5])().train()
    alike, ids = copy.deepcopy(model), tokens(2, 9)
    compiled = torch.compile(model, backend="eager")
    for _ in range(6):
        outputs, expected = compiled(input_ids=ids, labels=ids), alike(input_ids=ids, labels=ids)
        torch.testing.assert_close(outputs.pass_losses, expected.pass_losses, **CLOSE)
    assert model.model.batches_seen == 6
    (reason,) = counters["graph_break"]
    assert "StatefulGPTModel.draw_num_passes" in reason


# Evaluation and decoding


CACHED = [
    "gpt",
    "pure",
    "hybrid",
    *(f"stateful around {b}" for b in ("gpt", "pure", "hybrid", "gpt2", "llama", "qwen3")),
]
BACKBONE = {**BACKBONES, **DECODERS, "pure": BACKBONES["gateloop-pure"], "hybrid": BACKBONES["gateloop-hybrid"]}


def trained(name):
    """In eval mode, with weights that matter."""
    backbone = name.split()[-1]
    if name.startswith("stateful"):
        return stateful(BACKBONE[backbone](), dtype=torch.float32)
    torch.manual_seed(0)
    return GateLoopForCausalLM(BACKBONE[name]()).eval()


def generated(model, ids, new_tokens, backend=None, **kwargs):
    if backend is not None:
        compile_config = CompileConfig(backend=backend, mode=None, fullgraph=True)
        compile_config._compile_all_devices = True  # transformers compiles only for accelerators otherwise
        kwargs |= {"cache_implementation": "static", "compile_config": compile_config}
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


@pytest.mark.client("torch", "`torch.compile` of decoding with a static cache")
@pytest.mark.parametrize("name", few(CACHED, ["pure", "stateful around hybrid", "stateful around llama"]))
def test_decoding_with_a_static_cache_is_one_graph_and_compiles_no_token_anew(name):
    if OLD_TORCH and name == "stateful around hybrid":
        pytest.skip(BREAKS_ELSEWHERE)
    model, backend = trained(name), Counting()
    ids, mask = tokens(2, 6), padding(6)
    assert generated(model, ids, 18, backend, attention_mask=mask).equal(generated(model, ids, 18, attention_mask=mask))
    # One for the first token, one for any number of cached tokens (recurrent layers count them in Python) and any
    # length of the mask, and one for a mask as long as the cache, which ends with the last token.
    assert backend.graphs <= 3
    graphs = backend.graphs
    # The lengths add up to the same, or transformers would make a larger cache.
    ids, mask = tokens(2, 4, seed=1), padding(4)
    assert generated(model, ids, 20, backend, attention_mask=mask).equal(generated(model, ids, 20, attention_mask=mask))
    assert backend.graphs == graphs and not counters["graph_break"]


@pytest.mark.parametrize(
    "name", few([name for name in CACHED if name.startswith("stateful")], ["stateful around llama"])
)
def test_evaluation_by_a_fixed_number_of_passes_is_one_graph(name):
    model, ids = trained(name), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        inputs = {"input_ids": ids, "num_passes": 4, "use_cache": False}
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **CLOSE)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["stateful around hybrid", "stateful around llama"])
def test_solved_to_a_tolerance_a_compiled_model_gives_the_same(name):
    model, ids = trained(name), tokens(2, 3)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, **CLOSE)


NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.client("torch", "`torch.compile` of a training step")
@NEEDS_A_COMPILER
@pytest.mark.exhaustive
def test_inductor_trains_as_eager_mode_does():
    torch.manual_seed(0)
    model = around("gateloop", feedback="glu")().train()
    compiled = torch.compile(model, fullgraph=True)
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(9)}
    expected, gradients = step(model, model, **inputs)
    outputs, compiled_gradients = step(model, compiled, **inputs)
    torch.testing.assert_close(outputs.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(compiled_gradients, gradients, **CLOSE)


@pytest.mark.client("torch", "`torch.compile` of decoding with a static cache")
@NEEDS_A_COMPILER
@pytest.mark.exhaustive
def test_inductor_decodes_as_eager_mode_does():
    model, ids = trained("stateful around hybrid"), tokens(2, 6)
    assert generated(model, ids, 12, "inductor").equal(generated(model, ids, 12))


# Export


def exported(model, ids, dynamic=True, **inputs):
    inputs = {"input_ids": ids, "use_cache": False, **inputs}
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {name: sizes if isinstance(value, torch.Tensor) else None for name, value in inputs.items()}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes if dynamic else None).module()


@pytest.mark.client("torch", "`torch.export` of a forward of a fixed number of passes")
@pytest.mark.parametrize(
    "name,padded",
    few(
        list(product(CACHED, [False, True])),
        [("hybrid", True), ("stateful around hybrid", False), ("stateful around llama", True)],
    ),
)
def test_an_exported_forward_computes_the_same_for_other_batches_and_lengths(name, padded):
    model = trained(name)
    inputs = {"num_passes": 3} if name.startswith("stateful") else {}

    def mask(length):
        return {"attention_mask": padding(length)} if padded else {}

    program = exported(model, tokens(2, 9), **inputs, **mask(9))
    with torch.no_grad():
        for length in (9, 20):
            other = {"input_ids": tokens(2, length, seed=1), "use_cache": False, **inputs, **mask(length)}
            torch.testing.assert_close(program(**other).logits, model(**other).logits, **CLOSE)


def test_the_exact_evaluation_is_exported_for_one_length_and_solving_to_a_tolerance_not_at_all():
    model, ids = trained("stateful around hybrid"), tokens(2, 3)
    program = exported(model, ids, dynamic=False, solver="sequential")
    other = {"input_ids": tokens(2, 3, seed=1), "use_cache": False, "solver": "sequential"}
    with torch.no_grad():
        torch.testing.assert_close(program(**other).logits, model(**other).logits, **CLOSE)
    with pytest.raises(ValueError, match=r"torch.export cannot follow a solver that stops at a tolerance.*num_passes"):
        exported(model, ids)
    model = trained("stateful around llama")
    model.config.num_groups = 2
    cyclic = {"solver": "cyclic", "num_passes": 3}
    with torch.no_grad():
        program = exported(model, tokens(2, 5, seed=2), dynamic=False, **cyclic)
        other = {"input_ids": tokens(2, 5, seed=1), "use_cache": False, **cyclic}
        torch.testing.assert_close(program(**other).logits, model(**other).logits, **CLOSE)
    model.config.decode_mode, model.config.prefill_passes = "passes", 2
    torch.testing.assert_close(
        exported(model, ids)(input_ids=ids, use_cache=False).logits, model(ids, num_passes=2).logits, **CLOSE
    )
