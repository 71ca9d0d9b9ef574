"""The loss on 256 TPU chips, compiled ahead of time and never run: what fits, what travels, and what hides it.

In a tier of its own, `make test-aot`: XLA's compiler for TPUs is a 200 MB download.
"""

import functools

import pytest

from benchmarks.loss_tpu import BATCH, CASES, DOCUMENTS, WIDTH, collectives, compile_loss, memory

HBM = 15.75e9  # of a v5e chip
ON_A_CHIP = BATCH * DOCUMENTS // 256  # documents
KIND = {"float32": "f32", "bfloat16": "bf16"}

compiled = functools.cache(compile_loss)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory(case):
    exchange, _, batch = case
    held, temporaries = memory(compiled(*case))
    assert held + temporaries < HBM
    if exchange == "ring":  # at 16 times the pairs the scores of a chip's rows would be 34 GB, all columns 8.6 GB
        assert temporaries <= 1.5 * held + 256e6
    else:  # all documents, their gradient, its sum over chips, and one more while it is laid out
        assert temporaries <= 4.1 * batch * DOCUMENTS * WIDTH * 4


@pytest.mark.parametrize("precision", KIND)
def test_gather_collects_all_documents_and_sums_their_gradient(precision):
    sent = [c for c in collectives(compiled("gather", precision, BATCH)) if c.of_vectors]
    assert [c.kind for c in sent if c.kind == "all-gather"] == ["all-gather"]
    gathered, summed = sent
    assert gathered.shapes == (f"{KIND[precision]}[{BATCH * DOCUMENTS},{WIDTH}]",)
    # Asked for is a reduce-scatter. This compiler makes of it an all-reduce of which each chip takes its slice.
    assert summed.kind in ("reduce-scatter", "all-reduce")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "ring"], ids=str)
def test_ring_passes_blocks_on_while_it_multiplies(case):
    _, precision, batch = case
    sent = collectives(compiled(*case))
    assert {c.kind for c in sent} == {"collective-permute"}
    hops = [c for c in sent if c.repeated]
    assert all(c.hidden and c.products for c in hops), hops
    # Forward: a block. Backward: a block, and the gradient of the one before.
    rows = batch // BATCH * ON_A_CHIP
    block, gradient = f"{KIND[precision]}[{rows},{WIDTH}]", f"f32[{rows},{WIDTH}]"
    assert sorted(c.shapes for c in hops if c.of_vectors) == sorted([(block,), (block,), (gradient,)])
