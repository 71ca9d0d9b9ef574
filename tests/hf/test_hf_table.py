"""The table of names: views, slices, shards, complaints, and the way there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed.errors import UserError
from jaxembed.hf import loading
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.loading import load_onto
from jaxembed.hf.table import (
    Flat,
    LazyLeaf,
    Linear,
    PadRows,
    Row,
    Same,
    export_tensors,
    first_layers,
    import_leaves,
)
from jaxembed.models.bert import BertConfig

CONFIG = BertConfig(vocab_size=100, width=16, layers=3, heads=2, mlp_width=24, positions=20)
ARCH = ARCHITECTURES["bert"]
ROWS = ARCH.rows(CONFIG)
N, D, H, K, F = 3, 16, 2, 8, 24
SHAPES = {
    "embeddings/token/embedding": (128, D),
    "embeddings/position/embedding": (20, D),
    "embeddings/type/embedding": (2, D),
    **{f"{norm}/{name}": (D,) for norm in ("embeddings/norm",) for name in ("scale", "bias")},
    **{f"layers/attention/{name}/kernel": (N, D, H, K) for name in ("query", "key", "value")},
    **{f"layers/attention/{name}/bias": (N, H, K) for name in ("query", "key", "value")},
    "layers/attention/out/kernel": (N, H, K, D),
    "layers/attention/out/bias": (N, D),
    **{f"layers/{norm}/{name}": (N, D) for norm in ("attention_norm", "mlp_norm") for name in ("scale", "bias")},
    "layers/mlp/up/kernel": (N, D, F),
    "layers/mlp/up/bias": (N, F),
    "layers/mlp/down/kernel": (N, F, D),
    "layers/mlp/down/bias": (N, D),
}


def random_leaves(dtype=np.float32):
    rng = np.random.default_rng(1)
    leaves = {path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()}
    leaves["embeddings/token/embedding"][CONFIG.vocab_size :] = 0
    return leaves


def checkpoint():
    return dict(export_tensors(ROWS, random_leaves(), N))


def find(tensors, **changes):
    settings = {"ignored": ARCH.ignored, "prefixes": ARCH.prefixes, "renames": ARCH.renames} | changes
    return import_leaves(ROWS, tensors, SHAPES, N, where="folder", **settings)


def test_kernels_mean_what_torch_means_by_them():
    x = np.random.default_rng(2).normal(size=D)
    tensors = checkpoint()
    leaves = {path: leaf[()] for path, leaf in find(tensors).items()}
    weight = tensors["encoder.layer.1.attention.self.query.weight"]
    heads = np.einsum("d,dhk->hk", x, leaves["layers/attention/query/kernel"][1])
    np.testing.assert_allclose(heads.reshape(-1), weight @ x, rtol=1e-6)
    weight = tensors["encoder.layer.2.attention.output.dense.weight"]
    out = np.einsum("hk,hkd->d", x.reshape(H, K), leaves["layers/attention/out/kernel"][2])
    np.testing.assert_allclose(out, weight @ x, rtol=1e-6)
    weight = tensors["encoder.layer.0.intermediate.dense.weight"]
    assert weight.shape == (F, D)
    np.testing.assert_allclose(x @ leaves["layers/mlp/up/kernel"][0], weight @ x, rtol=1e-6)


def test_there_and_back_is_bit_equal():
    tensors = checkpoint()
    leaves = {path: leaf[()] for path, leaf in find(tensors).items()}
    wanted = random_leaves()
    assert leaves.keys() == wanted.keys()
    for path, leaf in leaves.items():
        assert leaf.tobytes() == wanted[path].tobytes(), path
    again = dict(export_tensors(ROWS, leaves, N))
    assert again.keys() == tensors.keys()
    for name, tensor in again.items():
        assert np.array_equal(tensor, tensors[name])
    assert again["embeddings.word_embeddings.weight"].shape == (100, D)


def test_import_copies_nothing_before_it_is_asked():
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in checkpoint().items()}
    for leaf in find(tensors).values():
        assert all(any(np.shares_memory(part, tensor) for tensor in tensors.values()) for part in leaf.parts)


@pytest.mark.parametrize(
    "index",
    [
        (slice(1, 3), slice(4, 8), slice(0, 1), slice(None)),
        (slice(None),),
        (slice(2, 3), slice(None), slice(None), slice(3, 5)),
    ],
)
def test_slices_of_a_stacked_leaf(index):
    leaf = find(checkpoint())["layers/attention/query/kernel"]
    part = leaf[index]
    np.testing.assert_array_equal(part, random_leaves()["layers/attention/query/kernel"][index])
    assert part.base is None or part.flags.owndata


@pytest.mark.parametrize("rows", [(0, 32), (96, 128), (100, 128), (64, 110)])
def test_slices_of_the_padded_vocabulary(rows):
    leaf = find(checkpoint())["embeddings/token/embedding"]
    index = (slice(*rows), slice(2, 5))
    np.testing.assert_array_equal(leaf[index], random_leaves()["embeddings/token/embedding"][index])


def test_a_stack_of_scalars():
    leaf = LazyLeaf((3,), np.dtype(np.float32), tuple(np.float32(i).reshape(()) for i in range(3)), stacked=1)
    np.testing.assert_array_equal(leaf[(slice(1, 3),)], [1, 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_go_onto_their_shards(dtype):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    specs = {
        "embeddings/token/embedding": P(("tensor", "fsdp")),
        "layers/attention/query/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        "layers/mlp/up/bias": P(None, "tensor"),
    }
    targets = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs.get(path, P())))
        for path, shape in SHAPES.items()
    }
    arrays = load_onto(find(checkpoint()), targets)
    wanted = random_leaves()
    for path, array in arrays.items():
        assert array.sharding == targets[path].sharding
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), wanted[path].astype(dtype))
    back = dict(export_tensors(ROWS, arrays, N))
    for name, tensor in checkpoint().items():
        np.testing.assert_array_equal(back[name], tensor.astype(dtype))


def test_loaded_weights_do_not_share_memory_with_the_file():
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in checkpoint().items()}
    target = jax.ShapeDtypeStruct((20, D), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    loaded = load_onto(find(tensors), {"embeddings/position/embedding": target})["embeddings/position/embedding"]
    tensors["embeddings.position_embeddings.weight"][:] = 7
    assert not (np.asarray(loaded) == 7).any()


def test_prefixes_old_names_and_heads():
    tensors = {f"bert.{name}": tensor for name, tensor in checkpoint().items()}
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors.pop("bert.embeddings.LayerNorm.weight")
    tensors["bert.encoder.layer.0.output.LayerNorm.beta"] = tensors.pop("bert.encoder.layer.0.output.LayerNorm.bias")
    tensors["bert.pooler.dense.weight"] = np.zeros((D, D))
    tensors["bert.embeddings.position_ids"] = np.arange(20)
    tensors["cls.predictions.bias"] = np.zeros(100)
    leaves = find(tensors)
    for path, leaf in random_leaves().items():
        np.testing.assert_array_equal(leaves[path][()], leaf)


def test_every_problem_is_listed_at_once():
    tensors = checkpoint()
    del tensors["encoder.layer.1.output.dense.weight"]
    tensors["encoder.layer.3.output.dense.weight"] = np.zeros((D, F), np.float32)
    tensors["encoder.layer.0.intermediate.dense.bias"] = np.zeros(F + 1, np.float32)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(D, np.int8)
    with pytest.raises(UserError) as caught:
        import_leaves(ROWS, tensors, SHAPES | {"layers/router/kernel": (N, D)}, N, where="folder")
    message = str(caught.value)
    assert message.startswith("folder: the weights do not fit the model: ")
    for part in (
        f"missing tensor encoder.layer.1.output.dense.weight [{D}, {F}] (for layers/mlp/down/kernel)",
        f"unknown tensor encoder.layer.3.output.dense.weight [{D}, {F}]",
        f"tensor encoder.layer.0.intermediate.dense.bias has shape [{F + 1}], wants [{F}]",
        "tensor embeddings.LayerNorm.bias is int8, wants floating point",
        f"nothing fills layers/router/kernel [{N}, {D}]",
    ):
        assert part in message
    assert message.count(";") == 4
    assert "\n" not in message


def test_every_missing_tensor_is_named():
    with pytest.raises(UserError, match=r"missing tensor") as caught:
        find({})
    for row in ROWS:
        assert all(f"missing tensor {name} [" in str(caught.value) for name in row.names(N))


def test_a_tensor_under_two_names():
    tensors = checkpoint()
    tensors["embeddings.LayerNorm.gamma"] = tensors["embeddings.LayerNorm.weight"]
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.gamma is there twice"):
        find(tensors)


def test_export_drops_no_leaf():
    leaves = random_leaves()
    leaves["layers/extra/kernel"] = leaves.pop("layers/mlp/up/kernel")
    with pytest.raises(ValueError, match="layers/extra/kernel, layers/mlp/up/kernel"):
        export_tensors(ROWS, leaves, N)
    with pytest.raises(ValueError, match="do not hold 4 layers"):
        export_tensors(ROWS, random_leaves(), 4)


@pytest.mark.parametrize(
    ("transform", "ours", "theirs"),
    [
        (Same(), (4, 5), (4, 5)),
        (Flat(), (4, 5), (20,)),
        (Linear(), (4, 5), (5, 4)),
        (Linear(), (4, 2, 3), (6, 4)),
        (Linear(inputs=2), (2, 3, 4), (4, 6)),
        (PadRows(3), (5, 2), (3, 2)),
    ],
)
def test_transforms_are_views_both_ways(transform, ours, theirs):
    assert transform.hf_shape(ours) == theirs
    tensor = np.arange(np.prod(theirs)).reshape(theirs)
    view = transform.to_ours(tensor, ours)
    assert np.shares_memory(view, tensor)
    leaf = LazyLeaf(ours, tensor.dtype, (view,), stacked=0)[()]
    assert leaf.shape == ours
    back = transform.to_hf(leaf)
    assert np.shares_memory(back, leaf)
    np.testing.assert_array_equal(back, tensor)


def test_rows_name_every_leaf_of_the_model_once():
    assert sorted(row.ours for row in ROWS) == sorted(SHAPES)
    assert Row("a.{i}.b", "a/b").names(2) == ["a.0.b", "a.1.b"]


X = 6
# Of four layers two are sparse; a router for each, and a tensor per layer and expert.
SPARSE = (
    Row("{i}.up", "layers/up", Linear()),
    Row("{i}.experts.{x}.up", "experts/up", Linear(), at=(1, 3), experts=X),
    Row("{i}.router", "experts/router", Linear(), at=(1, 3)),
    Row("{i}.dense", "mlps/up", Linear(), at=(0, 2)),
    Row("norm", "norm"),
)
SPARSE_SHAPES = {"layers/up": (4, D, F), "experts/up": (2, X, D, F), "experts/router": (2, D, X), "mlps/up": (2, D, F)}
SPARSE_SHAPES["norm"] = (D,)


def sparse_tensors():
    """Each is one number everywhere: 100 · layer + expert, by its name."""
    numbers = {f"{i}.experts.{x}.up": 100 * i + x for i in (1, 3) for x in range(X)} | {"norm": 7}
    numbers |= {f"{i}.{name}": i for name, at in (("up", range(4)), ("router", (1, 3)), ("dense", (0, 2))) for i in at}
    shapes = {"norm": (D,), "router": (X, D)}
    return {name: np.full(shapes.get(name.split(".")[-1], (F, D)), n, np.float32) for name, n in numbers.items()}


def test_a_tensor_per_layer_and_expert():
    tensors = sparse_tensors()
    leaves = import_leaves(SPARSE, tensors, SPARSE_SHAPES, 4, where="folder")
    assert SPARSE[1].names(4)[:2] == ["1.experts.0.up", "1.experts.1.up"] and len(SPARSE[1].names(4)) == 2 * X
    leaf = leaves["experts/up"]
    assert all(any(np.shares_memory(part, tensor) for tensor in tensors.values()) for part in leaf.parts)
    want = np.broadcast_to(np.array([[100 * i + x for x in range(X)] for i in (1, 3)])[..., None, None], leaf.shape)
    for index in ((), (slice(1, 2), slice(2, 5), slice(4, 9)), (slice(None), slice(3, 6), slice(None), slice(1, 2))):
        np.testing.assert_array_equal(leaf[index], want[index])
    np.testing.assert_array_equal(leaves["mlps/up"][()][:, 0, 0], [0, 2])
    again = dict(export_tensors(SPARSE, {path: leaf[()] for path, leaf in leaves.items()}, 4))
    assert again.keys() == tensors.keys()
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_a_device_reads_its_own_experts_alone(monkeypatch):
    """In pieces smaller than a layer's experts: what other devices hold is not looked at."""
    monkeypatch.setattr(loading, "PIECE_BYTES", 2 * D * F * 4)
    tensors = sparse_tensors()
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            read.append(float(self.flat[0]))
            return super().__getitem__(index)

    tensors = {name: tensor.view(Watched) for name, tensor in tensors.items()}
    leaf = import_leaves(SPARSE, tensors, SPARSE_SHAPES, 4, where="folder")["experts/up"]
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    layout = NamedSharding(mesh, P(None, "expert"))
    index = layout.addressable_devices_indices_map(leaf.shape)[mesh.devices[1]]
    read.clear()
    loading._read_onto(mesh.devices[1], leaf, index, np.float32)
    assert read == [103, 104, 105, 303, 304, 305]
    whole = load_onto({"up": leaf}, {"up": jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=layout)})["up"]
    np.testing.assert_array_equal(whole, leaf[()])


def test_the_first_layers_follow_from_the_table():
    """Of the first two layers one is sparse."""
    small = [dataclasses.replace(row, at=tuple(i for i in row.at if i < 2)) for row in SPARSE]
    leaves = {
        path: leaf[()] for path, leaf in import_leaves(SPARSE, sparse_tensors(), SPARSE_SHAPES, 4, where="").items()
    }
    cut = first_layers(small, leaves, 2)
    assert {path: leaf.shape for path, leaf in cut.items()} == {
        path: shape if path == "norm" else ({"layers/up": 2}.get(path, 1), *shape[1:])
        for path, shape in SPARSE_SHAPES.items()
    }
    back, whole = dict(export_tensors(small, cut, 2)), sparse_tensors()
    assert set(back) == {name for name in whole if name == "norm" or int(name.split(".")[0]) < 2}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, whole[name])


def test_a_long_list_of_problems_is_cut():
    rows = (Row("{i}.{x}", "up", Linear(), experts=50),)
    with pytest.raises(UserError) as caught:
        import_leaves(rows, {}, {"up": (9, 50, D, F)}, 9, where="folder")
    assert str(caught.value).endswith("missing tensor 3.49 [24, 16] (for up); and 250 more")
