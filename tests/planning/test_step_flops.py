"""The formula of a model's operations against products counted in the traced model, for every architecture."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.blueprint import Blueprint
from jaxembed.config import Config, MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.peft import linear_layers
from jaxembed.models.flops import StepFlops, pairs_seen
from jaxembed.models.layers import experts, ssm
from jaxembed.models.layers.short_conv import ShortConv
from jaxembed.models.lora import Lora
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig
from jaxembed.planning import planner, shapes
from jaxembed.planning.shapes import Tokens

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 48}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 6}
GROUPED = COMMON | {"num_key_value_heads": 2}
SHAPES = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu"},
    "modernbert": COMMON | {"local_attention": 8},
    **dict.fromkeys(("llama", "qwen2", "qwen3", "phi3", "gemma"), GROUPED),
    **dict.fromkeys(("mistral", "gemma2"), GROUPED | {"sliding_window": 5}),
    "gemma3_text": GROUPED | {"sliding_window": 6, "sliding_window_pattern": 2},
    "mixtral": GROUPED | {"num_local_experts": 5},
    "qwen2_moe": COMMON
    | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    | {"mlp_only_layers": [1]},
    "qwen3_moe": GROUPED
    | {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    "olmoe": COMMON | {"num_experts": 5, "num_experts_per_tok": 2},
    **dict.fromkeys(("mamba", "falcon_mamba", "bifalcon_mamba"), MAMBA),
    "bimamba": MAMBA | {"shared_directions": True},
    **dict.fromkeys(("mamba2", "bimamba2"), MAMBA | {"head_dim": 8, "n_groups": 2}),
    "llada": {"d_model": 32, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 48},
    "bamba": GROUPED | {"attn_layer_indices": [1], "mamba_d_state": 6, "mamba_d_head": 16},
}
R, L = 3, 24  # rows, each full of one text


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def counted_experts(monkeypatch):
    """Every token goes through the first experts, as many as it takes: of what loops do a trace says too little."""

    def apply(x, choice, kernels, activation, options):
        y = jnp.zeros_like(x)
        for j in range(choice.per_token):
            hidden = x @ kernels.up[j] * (1 if kernels.gate is None else x @ kernels.gate[j])
            y += jnp.einsum("rlf,fd->rld", hidden, kernels.down[j], out_sharding=sharding.STATES)
        return y

    monkeypatch.setattr(experts, "apply_experts", apply)


@pytest.fixture(autouse=True)
def counted_states(monkeypatch):
    """What is computed channel by channel, written as products: convolutions, and each token's states in full."""

    def convolve(self, x, borders, reverse=False):
        return jnp.einsum("jrl...,j...->rl...", jnp.stack([x] * len(self.kernel[...])), self.kernel[...])

    def scan(x, step, a, write, read, skip, borders, **how):
        return jnp.einsum("rlin,rln->rli", jnp.einsum("rli,rln->rlin", x, write), read)

    def heads(x, step, a, write, read, skip, borders, **how):
        of_heads = functools.partial(jnp.repeat, axis=2, out_sharding=ssm.HEADS)
        write, read = (of_heads(y, x.shape[2] // y.shape[2]) for y in (write, read))
        return jnp.einsum("rlhpn,rlhn->rlhp", jnp.einsum("rlhp,rlhn->rlhpn", x, write), read)

    monkeypatch.setattr(ShortConv, "__call__", convolve)
    monkeypatch.setattr(ssm, "selective_scan", scan)
    monkeypatch.setattr(ssm, "state_space_dual", heads)
    monkeypatch.setattr(ssm.GatedNorm, "__call__", lambda self, y, gate: y * gate)  # its mean over heads is a product


def blueprint_of(name: str, head: HeadConfig, mode: str = "native") -> Blueprint:
    arch = ARCHITECTURES[name]
    hf_config = arch.fresh_hf_config(SHAPES.get(name, COMMON), Tokens(100, pad_id=int(name == "mpnet")), "shape")
    hf_config = arch.with_attention(hf_config, (mode,))
    return Blueprint(hf_config, head, True, L, {}, "", "cosine", 0, None, {})


def traced_products(factory, slots: int) -> int:
    """Operations of all products in the traced model, of full rows of one text each."""
    place = np.tile(np.arange(L, dtype=np.int32), (R, 1))
    text = np.repeat(np.arange(R, dtype=np.int32)[:, None], L, axis=1)
    arrays = np.ones((R, L), np.int32), text + 1, place, text, np.zeros((R, L), bool)
    rows = Rows(*(sharding.put(array, jax.sharding.get_mesh(), sharding.ROWS) for array in arrays))
    encode = jax.make_jaxpr(lambda params: factory.bind(params)(rows, slots))
    return products_in(encode(factory.abstract()).jaxpr)


def products_in(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += products_in(inner) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_of_every_architecture(name):
    blueprint = blueprint_of(name, HeadConfig(expansion=40, projection=24))
    factory = blueprint.factory(ModelOptions(attention_kernel="xla"))
    flops = StepFlops.of(blueprint, factory)
    everything = dataclasses.replace(flops, layers=(((False, 0), sum(n for _, n in flops.layers)),))
    assert everything.forward(np.full(R, L)) == traced_products(factory, R)
    assert everything.training(np.full((R, 1), L)) == 3 * everything.forward(np.full(R, L))


def test_latent_attention():
    blueprint = blueprint_of("bert", HeadConfig(pooling="latent", latents=5, latent_heads=2))
    factory = blueprint.factory(ModelOptions())
    once = 2 * 2 * 5 * 32 * 32  # keys and values of the latents, made once for all tokens
    assert StepFlops.of(blueprint, factory).forward(np.full(R, L)) + once == traced_products(factory, R)


# Parameters, and those that a token meets, in billions, as published: with the token table and the head that generates.
PUBLISHED = {
    "Qwen/Qwen3-30B-A3B-Base": (30.5, 3.3),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "allenai/OLMoE-1B-7B-0924": (6.9, 1.3),
    "Qwen/Qwen1.5-MoE-A2.7B": (14.3, 2.7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sparse_models_have_their_size(name):
    shape = shapes.SHAPES[name]
    arch = ARCHITECTURES[shape.model_type]
    hf_config = arch.fresh_hf_config(shape.fields, Tokens(1), "shape")
    blueprint = Blueprint(hf_config, HeadConfig(), True, L, {}, "", "cosine", 0, None, {})
    factory = blueprint.factory(ModelOptions())
    head = hf_config["vocab_size"] * hf_config["hidden_size"]
    every = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(factory.abstract())) + head
    met = StepFlops.of(blueprint, factory).per_token / 2 + 2 * head
    assert every / 1e9 == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert met / 1e9 == pytest.approx(PUBLISHED[name][1], rel=0.03)


@pytest.mark.parametrize(("name", "megabytes"), [("state-spaces/mamba-130m-hf", 517), ("AntonV/mamba2-130m-hf", 516)])
def test_known_state_space_models_have_the_size_of_their_files(name, megabytes):
    blueprint = shapes.open_shape(f"hf:{name}", Config())
    every = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(blueprint.factory(ModelOptions()).abstract()))
    assert 4 * every / 1e6 == pytest.approx(megabytes, abs=0.6)  # float32, the token table once


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "bimamba"])
def test_adapters_train_and_their_base_does_not(name):
    blueprint = blueprint_of(name, HeadConfig(), "bidirectional")
    targets = linear_layers(blueprint.architecture.rows(blueprint.backbone), "", "targets")
    lora = Lora(4, 1.0, 0.0, targets)
    factory = blueprint.factory(ModelOptions(), lora=lora)
    flops, plain = StepFlops.of(blueprint, factory, lora), StepFlops.of(blueprint, blueprint.factory(ModelOptions()))
    lengths = np.full(R, L)
    assert flops.forward(lengths) == traced_products(factory, R)
    of_adapters = flops.forward(lengths) - plain.forward(lengths)
    # Neither attention's products nor those of states have a factor that is not trained.
    of_states = 2 * 3 * 4 * 64 * 6 * lengths.sum() if name == "bimamba" else 0  # both ways, 3 layers, 4 I N
    free = plain._attention(lengths) + of_states
    base = plain.forward(lengths) - free
    assert flops.training(lengths) == 2 * base + 3 * of_adapters + 3 * free


@pytest.mark.parametrize("reach", [0, 1, 4, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_that_see_each_other(causal, reach):
    def by_definition(n: int) -> int:
        pairs = ((i, j) for i in range(n) for j in range(n))
        return sum((not causal or j <= i) and (not reach or abs(i - j) <= reach) for i, j in pairs)

    lengths = np.arange(20)
    assert pairs_seen(lengths.astype(float), causal, reach).tolist() == [by_definition(n) for n in lengths]


def test_what_layers_see():
    def seen(name: str, mode: str = "native") -> dict[tuple[bool, int], int]:
        blueprint = blueprint_of(name, HeadConfig(), mode)
        return dict(StepFlops.of(blueprint, blueprint.factory(ModelOptions())).layers)

    assert seen("bert") == {(False, 0): 3}
    assert seen("qwen3") == {(True, 0): 3}
    assert seen("qwen3", "bidirectional") == {(False, 0): 3}
    assert seen("mistral") == {(True, 4): 3}  # a window of 5 is the token itself and 4 before it
    assert seen("gemma3_text") == {(True, 5): 2, (True, 0): 1}
    assert seen("mamba") == {}
    assert seen("bamba") == {(True, 0): 1}  # the others have mixers
    assert seen("bamba", "bidirectional") == {(False, 0): 1}
    assert seen("modernbert") == {(False, 0): 1, (False, 4): 2}  # 8 // 2 on either side


def test_heads_whose_products_a_cpu_is_timed_at():
    def heads(name: str) -> tuple[int, int]:
        blueprint = blueprint_of(name, HeadConfig())
        flops = StepFlops.of(blueprint, blueprint.factory(ModelOptions()))
        return planner._heads(types.SimpleNamespace(flops=flops), blueprint)

    assert heads("bamba") == heads("bert") == (4, 8)
    assert heads("mamba2") == (8, 8)
    assert all(heads("mamba"))


def test_empty_slots_and_texts_of_any_shape_count_alike():
    blueprint = blueprint_of("qwen3", HeadConfig(projection=16))
    flops = StepFlops.of(blueprint, blueprint.factory(ModelOptions()))
    some = np.array([3, 7, 1, 24])
    assert flops.training(np.array([[3, 0, 7], [0, 1, 24]])) == flops.training(some)
    assert flops.training(some) == pytest.approx(sum(flops.training(np.array([n])) for n in some))
