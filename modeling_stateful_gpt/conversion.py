"""Weights trained with the package gateloop-transformer (lucidrains, 0.2.5), in models of ours."""

from collections.abc import Mapping

import torch

from .configuration_gateloop import GateLoopConfig
from .gateloop_layer import SimpleGateLoopLayer
from .modeling_gateloop import GateLoopForCausalLM

# What that package adds to the norm of a vector before it divides by it, as our RMSNorm counts it.
EPS = 1e-24


def convert_gateloop_transformer(state_dict: Mapping[str, torch.Tensor]) -> GateLoopForCausalLM:
    """The model that computes what `gateloop_transformer.Transformer` computes with the weights `state_dict`.

    All sizes are read off the weights. What is not in them must be as it is by default: no `ablate_complex` and no
    `ablate_state_transition`. Trained further, it differs in one thing: that package passes nine tenths of the gradient
    to the transitions' projection, ours all of it.

    Raises:
        ValueError: for a Transformer with attention instead of GateLoop layers, with `post_ln_norm`, without gates
            (`attn_add_swish_gating=False`), or whose GateLoop layers have another width (`dim_gate_looped_attn`).
    """
    weights = dict(state_dict)

    def take(name: str, reason: str) -> torch.Tensor:
        if name not in weights:
            raise ValueError(f"The weights have no {name}: {reason}.")
        return weights.pop(name)

    embedding = take("token_emb.weight", "they are not those of a gateloop_transformer.Transformer")
    vocab_size, hidden_size = embedding.shape
    no_pre_norm = "a Transformer made with post_ln_norm=True cannot be converted"
    converted = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": take("to_logits.0.gamma", no_pre_norm),
        "lm_head.weight": take("to_logits.1.weight", no_pre_norm),
    }
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    output_norm = "layers.0.0.fn.maybe_sub_ln.weight" in weights
    for i in range(depth):
        theirs, ours = f"layers.{i}", f"model.layers.{i}"
        no_gate_loop = "only Transformers with GateLoop layers (use_gate_looped_attn=True) can be converted"
        z = {part: take(f"{theirs}.0.fn.to_a.0.{part}", no_gate_loop) for part in ("weight", "bias")}
        qkv = take(f"{theirs}.0.fn.to_qkv.weight", no_gate_loop)
        if qkv.shape[0] != 3 * hidden_size:
            raise ValueError(
                f"The GateLoop layers are {qkv.shape[0] // 3} wide, the model {hidden_size}; both must be the same."
            )
        gate = take(f"{theirs}.0.fn.to_gates.0.weight", "GateLoop layers without a gate cannot be converted")
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), qkv.chunk(3), strict=True):
            converted[f"{ours}.mixer.{name}.weight"] = weight
        for part, value in z.items():
            converted[f"{ours}.mixer.transition.z.{part}"] = value
            if output_norm:
                converted[f"{ours}.mixer.norm.{part}"] = take(f"{theirs}.0.fn.maybe_sub_ln.{part}", "it is in layer 0")
        mlp = "the feed-forward layers are missing"
        converted |= {
            f"{ours}.mixer.gate_proj.weight": gate,
            f"{ours}.mixer.o_proj.weight": take(f"{theirs}.0.fn.to_out.weight", "the output projection is missing"),
            f"{ours}.mixer_norm.weight": take(f"{theirs}.0.norm.gamma", no_pre_norm),
            f"{ours}.mlp_norm.weight": take(f"{theirs}.1.norm.gamma", no_pre_norm),
            f"{ours}.mlp.up_proj.weight": take(f"{theirs}.1.fn.0.weight", mlp),
            f"{ours}.mlp.up_proj.bias": take(f"{theirs}.1.fn.0.bias", mlp),
            f"{ours}.mlp.down_proj.weight": take(f"{theirs}.1.fn.2.weight", mlp),
            f"{ours}.mlp.down_proj.bias": take(f"{theirs}.1.fn.2.bias", mlp),
        }
    if weights:
        raise ValueError(f"The weights have entries that GateLoopForCausalLM has no place for: {sorted(weights)[:5]}.")

    config = GateLoopConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=converted["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=1,
        layer_types=["gateloop"] * depth,
        gateloop_num_heads=z["bias"].shape[0] // 2,
        state_transition="cartesian",
        gateloop_output_norm=output_norm,
        mlp_bias=True,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
    )
    model = GateLoopForCausalLM(config)
    model.load_state_dict(converted)
    return model.eval()


def convert_simple_gate_loop_layer(
    state_dict: Mapping[str, torch.Tensor], reverse: bool = False
) -> SimpleGateLoopLayer:
    """The layer that computes what `gateloop_transformer.SimpleGateLoopLayer` computes with the weights `state_dict`.

    Raises:
        ValueError: for a layer made with `prenorm=False` or `post_ln=True`.
    """
    if set(state_dict) != {"norm.gamma", "to_qkva.0.weight"}:
        raise ValueError(
            f"Expected the weights norm.gamma and to_qkva.0.weight of a SimpleGateLoopLayer with prenorm=True and "
            f"post_ln=False; got {sorted(state_dict)}."
        )
    layer = SimpleGateLoopLayer(state_dict["norm.gamma"].shape[0], reverse=reverse, eps=EPS)
    projections = zip(("q_proj", "kv_proj", "a_proj"), state_dict["to_qkva.0.weight"].chunk(3), strict=True)
    layer.load_state_dict(
        {"norm.weight": state_dict["norm.gamma"], **{f"{name}.weight": weight for name, weight in projections}}
    )
    return layer
