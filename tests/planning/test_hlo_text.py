"""What is read from compiled programs: products, traffic, collectives, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed.models.layers.blocks import evenly
from jaxembed.planning.hlo import Program

REPEATS, N = 5, 8

# As XLA's compiler for TPUs writes it: no trip count, sums that are cut afterwards, groups by axes, memory on the chip.
WRITTEN = """
HloModule jit_step, is_scheduled=true

%cut (p.0: f32[6,64,128], p.1: s32[]) -> f32[64,128] {
  %p.0 = f32[6,64,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %ds = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %out = f32[64,128]{1,0:T(8,128)} bitcast(%ds)
}

%all-reduce-scatter.1 (p.2: f32[64,128]) -> f32[4,128] {
  %p.2 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0:T(8,128)} all-reduce(%p.2), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %at = s32[]{:T(128)} constant(0)
  ROOT %mine = f32[4,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %at, %at), dynamic_slice_sizes={4,128}
}

%start (p.3: f32[4,128]) -> (f32[4,128], f32[32,128]) {
  %p.3 = f32[4,128]{1,0:T(8,128)} parameter(0)
  %all-gather.2 = f32[32,128]{1,0:T(8,128)} all-gather(%p.3), replica_groups=[1,8]<=[8]
  ROOT %go = (f32[4,128]{1,0}, f32[32,128]{1,0}) custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.4: f32[4,128]) -> f32[32,128] {
  %p.4 = f32[4,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.3 = f32[32,128]{1,0:T(8,128)} all-gather(%p.4), replica_groups=[1,8]<=[8]
}

%body (b: (s32[], f32[6,64,128])) -> (s32[], f32[6,64,128]) {
  %b = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %all = f32[6,64,128]{2,1,0:T(8,128)} get-tuple-element(%b), index=1
  %f = f32[64,128]{1,0:T(8,128)} fusion(%all, %i), kind=kLoop, calls=%cut
  %near = f32[64,128]{1,0:T(8,128)S(1)} copy(%f)
  %conv = f32[4,16,16]{2,1,0} convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %x = f32[4,16,8]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %y = f32[4,16,8]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%f), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}) tuple(%i, %all)
}

%condition (c: (s32[], f32[6,64,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(6), metadata={op_name="jit(step)/while"}
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[6,64,128]) -> f32[6,64,128] {
  %a = f32[6,64,128]{2,1,0:T(8,128)} parameter(0)
  %k = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}) tuple(%k, %a)
  %loop = (s32[]{:T(128)}, f32[6,64,128]{2,1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %w = f32[64,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %rs = f32[4,128]{1,0:T(8,128)} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %ag = (f32[4,128]{1,0:T(8,128)}, /*index=1*/f32[32,128]{1,0:T(8,128)}) fusion(%rs), kind=kCustom, calls=%start
  %more = f32[32,128]{1,0:T(8,128)} fusion(%rs), kind=kCustom, calls=%async_collective_fusion.1
  %cp = (f32[4,128]{1,0}, f32[4,128]{1,0}, u32[]) collective-permute-start(%rs), source_target_pairs={{0,1},{1,0}}
  %done = f32[4,128]{1,0:T(8,128)} collective-permute-done(%cp)
  ROOT %r = f32[6,64,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def written():
    return Program(WRITTEN, 8, 128)


def test_collectives_of_a_written_program(written):
    block, slice_ = 64 * 128 * 4, 4 * 128 * 4
    found = [(c.kind, c.operand_bytes, c.group, c.hidden, c.count) for c in written.collectives]
    assert found == [
        ("all-reduce", block, (0, 2), False, 6),
        ("reduce-scatter", block, (0, 1, 2, 3), False, 1),
        ("all-gather", slice_, tuple(range(8)), True, 1),
        ("collective-permute", slice_, (0, 1), True, 1),
    ]
    sent = [c.sent_bytes for c in written.collectives]
    assert sent == [2 * block / 2, block * 3 / 4, slice_ * 7, slice_]


def test_work_of_a_written_program(written):
    block = 64 * 128 * 4
    fusion, copy, product, *_ = (w for w in written.work if w.count == 6)
    assert fusion.bytes == 2 * block + 4  # the cut alone, not the six blocks it is cut from; and its index
    assert copy.bytes == block  # read from main memory, written to that on the chip
    assert product.flops == 2 * 4 * 16 * 16 * 8
    assert (product.dtype, product.batched) == ("f32", True)
    assert written.uncounted_loops == 0


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", (0, 2, 4, 6)),
        ("replica_groups={{0,3},{1,2}}", (0, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups(text, group):
    lines = ["ENTRY %m (a: f32[8]) -> f32[8] {", "  %a = f32[8]{0} parameter(0)"]
    lines += [f"  ROOT %s = f32[8]{{0}} all-reduce(%a), {text}, to_apply=%add", "}"]
    (found,) = Program("\n".join(lines), 8, 128).collectives
    assert sorted(found.group) == sorted(group)


def test_groups_of_another_form():
    text = "ENTRY %m (a: f32[8]) -> f32[8] {\n  ROOT %s = f32[8]{0} all-reduce(), replica_groups=other\n}"
    with pytest.raises(ValueError, match="a form that is not known"):
        _ = Program(text, 8, 128).collectives


def test_attention_kernels():
    q = "bf16[3,4,256,64]{3,2,1,0}"
    lines = [
        f'  %q = {q} custom-call(), custom_call_target="AllocateBuffer"',
        *(
            f'  %{name} = {q} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"'
            for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv", "unknown")
        ),
    ]
    program = Program("\n".join(["ENTRY %m (a: f32[]) -> f32[] {", *lines, "}"]), 1, 256)
    product = 2 * 3 * 4 * 256 * 256 * 64
    assert [w.flops / product for w in program.work] == [0, 2, 3, 4, 0]


def test_products_of_rows_sorted_by_expert():
    # As XLA's compiler for TPUs writes them: what a kernel is to know of the groups, the products, and megablox's sums.
    rows, experts, d, f = 640, 8, 256, 384
    lines = [
        f"  %x = bf16[{rows},{d}]{{1,0}} parameter(0)",
        f"  %w = bf16[{experts},{d},{f}]{{2,1,0}} parameter(1)",
        f"  %sizes = s32[{experts}]{{0}} parameter(2)",
        "  %ragged-dot-metadata = (s32[9]{0}, s32[1]{0}) custom-call(%sizes), custom_call_target="
        '"tpu_custom_call", metadata={op_name="ragged-dot-metadata"}',
        "  %n = s32[1]{0} get-tuple-element(%ragged-dot-metadata), index=1",
        f"  %ragged-dot-none.1 = f32[{rows},{f}]{{1,0}} custom-call(%n, %x, %w), custom_call_target="
        '"tpu_custom_call", metadata={op_name="jit(f)/ragged_dot_general/ragged-dot-none"}',
        f"  %xt = bf16[{d},{rows}]{{1,0}} parameter(3)",
        f"  %dy = bf16[{rows},{f}]{{1,0}} parameter(4)",
        f"  ROOT %sums = f32[{experts},{d},{f}]{{2,1,0}} custom-call(%n, %xt, %dy), custom_call_target="
        '"tpu_custom_call", metadata={op_name="jit(f)/shard_map/jit(tgmm)/pallas_call"}',
    ]
    # A length of rows that is a width, too: these are no attention kernels.
    program = Program("\n".join([f"ENTRY %m (a: bf16[{rows},{d}]) -> f32[] {{", *lines, "}"]), 1, d)
    product = pytest.approx(2 * rows * d * f)
    assert [(w.flops, w.batched) for w in program.work] == [(0, False), (product, False), (product, False)]
    assert program.work[1].bytes == 2 * rows * d + 2 * experts * d * f + 4 * rows * f + 4


def test_what_nested_fusions_cut_from_stacks():
    # A layer's states are cut from a stack of all layers in a fusion within a fusion, and its output put into another.
    text = """
%cut (p.0: bf16[48,16,128], p.1: s32[]) -> bf16[16,128,1] {
  %p.0 = bf16[48,16,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %z = s32[] constant(0)
  %same = bf16[48,16,128]{2,1,0} bitcast(%p.0)
  %ds = bf16[1,16,128]{2,1,0} dynamic-slice(%same, %p.1, %z, %z), dynamic_slice_sizes={1,16,128}
  ROOT %flat = bf16[16,128,1]{1,0,2} bitcast(%ds)
}

%put (q.0: bf16[48,16,128], q.1: bf16[16,128,1], q.2: s32[]) -> bf16[48,16,128] {
  %q.0 = bf16[48,16,128]{2,1,0} parameter(0)
  %q.1 = bf16[16,128,1]{1,0,2} parameter(1)
  %q.2 = s32[] parameter(2)
  %y = s32[] constant(0)
  %one = bf16[1,16,128]{2,1,0} bitcast(%q.1)
  ROOT %dus = bf16[48,16,128]{2,1,0} dynamic-update-slice(%q.0, %one, %q.2, %y, %y)
}

%outer (r.0: bf16[48,16,128], r.1: s32[], r.2: bf16[48,16,128]) -> bf16[48,16,128] {
  %r.0 = bf16[48,16,128]{2,1,0} parameter(0)
  %r.1 = s32[] parameter(1)
  %r.2 = bf16[48,16,128]{2,1,0} parameter(2)
  %states = bf16[16,128,1]{1,0,2} fusion(%r.0, %r.1), kind=kLoop, calls=%cut
  ROOT %all = bf16[48,16,128]{2,1,0} fusion(%r.2, %states, %r.1), kind=kLoop, calls=%put
}

ENTRY %main (a: bf16[48,16,128], i: s32[], b: bf16[48,16,128]) -> bf16[48,16,128] {
  %a = bf16[48,16,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[48,16,128]{2,1,0} parameter(2)
  ROOT %f = bf16[48,16,128]{2,1,0} fusion(%a, %i, %b), kind=kOutput, calls=%outer
}
"""
    (work,) = Program(text, 1, 128).work
    assert work.bytes == 2 * 16 * 128 * 2 + 4  # read, written; the index


def test_loops_as_long_as_data_say():
    def loop(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)

    def said(n, x):
        with evenly(3):
            return loop(n, x)

    x = jax.ShapeDtypeStruct((16, 16), np.float32)
    n = jax.ShapeDtypeStruct((), np.int32)
    for f, turns, uncounted, even in ((loop, 1, 1, 0), (said, 3, 0, 1)):
        program = Program(jax.jit(f).lower(n, x).compile().as_text(), 1, 128)
        assert sum(w.count * w.flops for w in program.work) == turns * 2 * 16**3
        assert (program.uncounted_loops, program.even_loops) == (uncounted, even)


@pytest.fixture(scope="module")
def compiled():
    """A scan over sharded products with each kind of collective, compiled for 8 CPU devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    def local(x, kernels):
        def body(x, kernel):
            x = jnp.tanh(x @ kernel)
            x = x + jax.lax.psum(x, "b")
            x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
            whole = jax.lax.all_gather(x, "b", tiled=True)
            return jax.lax.psum_scatter(whole, "b", tiled=True), None

        return jax.lax.scan(body, x, kernels)[0]

    with jax.set_mesh(mesh):
        f = jax.shard_map(
            local, in_specs=(P(("a", "b"), None), P(None)), out_specs=P(("a", "b"), None), check_vma=False
        )
        x = jax.ShapeDtypeStruct((16 * N, 256), np.float32, sharding=NamedSharding(mesh, P(("a", "b"), None)))
        kernels = jax.ShapeDtypeStruct((REPEATS, 256, 256), np.float32, sharding=NamedSharding(mesh, P(None)))
        return Program(jax.jit(f).lower(x, kernels).compile().as_text(), N, 128)


def test_collectives_of_a_compiled_program(compiled):
    shard = 16 * 256 * 4
    found = {c.kind: (c.operand_bytes, len(c.group), c.count) for c in compiled.collectives}
    assert found == {
        "all-reduce": (shard, 4, REPEATS),
        "collective-permute": (shard, 2, REPEATS),
        "all-gather": (shard, 4, REPEATS),
        "reduce-scatter": (4 * shard, 4, REPEATS),
    }
    groups = {c.kind: sorted(c.group) for c in compiled.collectives}
    assert groups["all-reduce"] == [0, 1, 2, 3]
    assert groups["collective-permute"] == [0, 4]


def test_work_of_a_compiled_program(compiled):
    assert sum(w.count * w.flops for w in compiled.work) == REPEATS * 2 * 16 * 256 * 256
    read = REPEATS * 256 * 256 * 4  # each kernel once
    assert read <= sum(w.count * w.bytes for w in compiled.work) <= 5 * read  # cut out, multiplied; states are small
    assert compiled.uncounted_loops == 0
