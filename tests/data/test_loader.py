import dataclasses
import gc
import threading

import jax
import numpy as np
import pytest
from fake_cache import random_cache, simple_cache, tokens_of_name

from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data.batch import NO_TEXT, VOID
from jaxembed.data.loader import BatchBuilder, prefetch
from jaxembed.data.plan import Plan
from jaxembed.data.rungs import choose_row_length
from jaxembed.errors import UserError

P, K, T = 2, 3, 6


@pytest.fixture(scope="module")
def plan():
    """Two sources with repeated texts, groups, several positives, missing negatives and different token types."""
    caches = [random_cache(90, 0, prompt_length=2), random_cache(50, 1, first_name=30_000_000, token_type=np.uint32)]
    sources = [SourceConfig(path="a"), SourceConfig(path="b", weight=2.0, negatives_from="all")]
    return Plan(caches, sources, batch_size=64, positives=P, negatives=K, seed=7)


def slots(batch, shards, micro_batches, n_texts=T):
    """Reads every text back from the rows: {(row of the relation, place in the pair): (segment, tokens, prompt)}."""
    rows = batch.rows
    n_queries = batch.queries.pair.size // (shards * micro_batches)
    rung = rows.tokens.shape[1] // shards
    found = {}
    for m in range(micro_batches):
        for s in range(shards):
            own = slice(s * rung, (s + 1) * rung)
            spans, segments = rows.span_ids[m, own], rows.segment_ids[m, own]
            np.testing.assert_array_equal(spans == -1, segments == 0)
            for slot in np.unique(spans[spans >= 0]):
                here = spans == slot
                assert np.unique(np.nonzero(here)[0]).size == 1  # one row
                assert np.all(np.diff(np.flatnonzero(here)) == 1)  # without holes
                assert rows.positions[m, own][here].tolist() == list(range(here.sum()))
                (segment,) = set(segments[here].tolist())
                of_bin, other = (slot, -1) if slot < n_queries else divmod(slot - n_queries, n_texts - 1)
                index = (s * micro_batches + m) * n_queries + int(of_bin)
                assert divmod(segment - 1, n_texts) == (batch.queries.pair[index], other + 1)
                found[index, int(other + 1)] = (segment, rows.tokens[m, own][here], rows.prompt_mask[m, own][here])
    return found


def by_segment(batch, shards, micro_batches):
    """What the batch says of each text, whatever the mesh: {segment id: (tokens, prompt, relation row)}."""
    result = {}
    for (index, place), (segment, tokens, prompt) in slots(batch, shards, micro_batches).items():
        relation, where = (batch.documents, (index, place - 1)) if place else (batch.queries, index)
        row = [np.asarray(getattr(relation, f.name)[where]).tolist() for f in dataclasses.fields(relation)]
        assert segment not in result
        result[segment] = (tokens.tolist(), prompt.tolist(), str(row))
    return result


@pytest.mark.parametrize("shards, micro_batches, row_length", [(8, 1, 32), (1, 4, 64), (4, 2, 40), (8, 8, 32)])
def test_the_same_batch_whatever_the_mesh(plan, shards, micro_batches, row_length):
    builder = BatchBuilder(plan, shards, micro_batches, row_length)
    for n in (0, 5):
        batch, info = builder.build(n)
        expected, _ = BatchBuilder(plan, 1, 1, 32).build(n)
        assert by_segment(batch, shards, micro_batches) == by_segment(expected, 1, 1)
        assert batch.rows.tokens.shape == (micro_batches, shards * info.rows_per_bin, row_length)


def test_rows_hold_what_the_plan_names(plan):
    batch, info = BatchBuilder(plan, 2, 2, 32).build(3)
    step = plan.step(3)
    found = slots(batch, 2, 2)
    assert len(found) == np.count_nonzero(step.texts_BxT >= 0)
    for segment, tokens, prompt in found.values():
        pair, place = divmod(segment - 1, T)
        cache, text = plan.caches[step.source_B[pair]], step.texts_BxT[pair, place]
        np.testing.assert_array_equal(tokens, tokens_of_name(cache.names[text], cache.lengths[text]))
        assert prompt.sum() == cache.prompt_lengths[text] and prompt[: prompt.sum()].all()
    assert info.pairs == 64 and info.step == 3
    assert info.real_tokens == np.count_nonzero(batch.rows.segment_ids) == step.lengths_BxT.sum()
    assert info.padded_tokens == batch.rows.tokens.size
    assert info.waste == pytest.approx(1 - info.real_tokens / batch.rows.tokens.size)


def test_the_hard_negatives_own_queries_lie_behind_the_documents():
    caches = [random_cache(90, 0, negative_queries=True, prompt_length=2), random_cache(50, 1)]
    sources = [SourceConfig(path="a"), SourceConfig(path="b")]
    options = {"batch_size": 32, "positives": P, "negatives": K, "seed": 7}
    plan = Plan(caches, sources, **options, negative_queries=True)
    builder = BatchBuilder(plan, 4, 2, 32)
    batch, info = builder.build(3)
    np.testing.assert_array_equal(info.lengths, plan.step(3).lengths_BxT)
    assert info.lengths.sum() == info.real_tokens and (info.lengths == 0).any()
    assert batch.documents.pair.shape == (32, P + K)
    found = slots(batch, 4, 2, n_texts=T + K)
    assert info.real_tokens == sum(len(tokens) for _, tokens, _ in found.values())
    n_queries = 0
    for index in range(32):
        pair = batch.queries.pair[index]
        cache = caches[plan.step(3).source_B[pair]]
        for k in range(K):
            negative, query = found.get((index, 1 + P + k)), found.get((index, 1 + P + K + k))
            if negative is None or cache is caches[1]:
                assert query is None
                continue
            name = negative[1][1] + 60
            length = 3 + name * 7919 % 28
            np.testing.assert_array_equal(query[1], tokens_of_name(name, length))
            assert query[0] == negative[0] + K and query[2].sum() == 2
            n_queries += 1
    assert n_queries > 20


def test_missing_texts_are_void_slots(plan):
    batch, _ = BatchBuilder(plan, 4, 1, 32).build(0)
    n_void = np.count_nonzero(plan.step(0).texts_BxT < 0)
    assert n_void > 0
    assert np.count_nonzero(batch.documents.pair == VOID) == np.count_nonzero(batch.documents.text == NO_TEXT) == n_void
    assert np.all(batch.queries.pair >= 0)


def test_bins_are_equal_in_pairs_and_nearly_in_tokens():
    sources = [SourceConfig(path="a")]
    plan = Plan([simple_cache(500, negatives=2)], sources, batch_size=128, positives=1, negatives=2, seed=0)
    layout = BatchBuilder(plan, 8, 2, 32).layout(1)
    assert layout.texts_BinsxN.shape == (16, 32)
    queries = layout.texts_BinsxN[:, :8]
    assert not np.any(queries % 4)
    np.testing.assert_array_equal(layout.texts_BinsxN[:, 8:].reshape(16, 8, 3), queries[:, :, None] + np.arange(1, 4))
    assert sorted(layout.texts_BinsxN.ravel().tolist()) == list(range(512))
    loads = plan.step(1).lengths_BxT.ravel()[layout.texts_BinsxN].sum(axis=1)
    assert loads.max() - loads.min() < 0.02 * loads.mean()


def test_only_the_named_shards_are_filled(plan):
    builder = BatchBuilder(plan, 4, 2, 32)
    whole, info = builder.build(2)
    part, _ = builder.build(2, shards=(1, 3))
    own = np.isin(np.arange(whole.rows.tokens.shape[1]) // info.rows_per_bin, (1, 3))
    for field in dataclasses.fields(whole.rows):
        a, b = getattr(whole.rows, field.name), getattr(part.rows, field.name)
        if field.name == "source":  # the step fills it, where it is needed
            assert a is None and b is None
            continue
        np.testing.assert_array_equal(a[:, own], b[:, own])
        assert not b[:, ~own].any()
    jax.tree.map(np.testing.assert_array_equal, (whole.queries, whole.documents), (part.queries, part.documents))


def test_rungs_are_chosen_once_and_can_be_given(plan):
    builder = BatchBuilder(plan, 2, 1, 32)
    needed = [builder.layout(n).rows_needed for n in range(300)]
    assert len(builder.rungs) <= 6 and builder.rungs[-1] == 64 * T // 2
    assert {builder.build(n)[1].rows_per_bin for n in range(5)} <= set(builder.rungs)
    assert np.mean(np.array(needed) <= builder.rungs[-2]) > 0.98
    assert BatchBuilder(plan, 2, 1, 32, rungs=[150, 192]).build(0)[1].rows_per_bin == 150


def test_set_ups_that_cannot_be_are_refused(plan):
    with pytest.raises(UserError, match="batch_size = 64 is not a multiple of 3 shards"):
        BatchBuilder(plan, 3, 1, 32)
    with pytest.raises(UserError, match="row_length = 16 does not hold the longest text, 30 tokens"):
        BatchBuilder(plan, 1, 1, 16)


def test_prefetch_is_in_order_and_ends(plan):
    builder = BatchBuilder(plan, 2, 2, 32)
    batches = list(prefetch(builder, 3, 9, buffer=3))
    assert [info.step for _, info in batches] == [3, 4, 5, 6, 7, 8]
    expected, _ = builder.build(5)
    jax.tree.map(np.testing.assert_array_equal, batches[2][0], expected)
    assert list(prefetch(builder, 4, 4, buffer=2)) == []


def test_batches_are_placed_where_they_are_made(plan):
    """By the thread, so that the loop does not wait for their way to the devices."""
    threads = []

    def place(batch):
        threads.append(threading.current_thread())
        return dataclasses.replace(batch, rows=jax.device_put(batch.rows))

    builder = BatchBuilder(plan, 1, 1, 32)
    placed = [batch for batch, _ in prefetch(builder, 0, 3, buffer=2, place=place)]
    assert len(threads) == 3 and threading.main_thread() not in threads
    for n, batch in enumerate(placed):
        assert isinstance(batch.rows.tokens, jax.Array)
        np.testing.assert_array_equal(batch.rows.tokens, builder.build(n)[0].rows.tokens)


def test_prefetch_lets_errors_through_and_closes(plan):
    class Broken(BatchBuilder):
        def build(self, n, shards=None):
            if n == 2:
                raise UserError("tokens.bin: gone")
            return super().build(n, shards)

    batches = prefetch(Broken(plan, 1, 1, 32), 0, 10, buffer=2)
    assert [next(batches)[1].step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match=r"tokens\.bin: gone"):
        next(batches)
    unfinished = prefetch(BatchBuilder(plan, 1, 1, 32), 0, 10**9, buffer=2)
    next(unfinished)
    unfinished.close()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
            assert not thread.is_alive()


def test_captions_waste_at_most_five_percent(data_dir, minilm_dir, tmp_path):
    from jaxembed.data.cache import build_or_open
    from jaxembed.data.tokenizer import Tokenizer

    source = SourceConfig(path=str(data_dir / "pairs" / "captions_val.jsonl.gz"))
    tokenizer = Tokenizer.load(f"hf:{minilm_dir}")
    cache = build_or_open(source, tokenizer, PromptConfig("", ""), MaxLength(256, 256), tmp_path, "error", False)
    plan = Plan([cache], [source], batch_size=128, positives=1, negatives=7, seed=0)
    builder = BatchBuilder(plan, 1, 1, choose_row_length([cache], 8))
    infos = [builder.build(n)[1] for n in range(1000, 1030)]
    assert 1 - sum(i.real_tokens for i in infos) / sum(i.padded_tokens for i in infos) < 0.05
    step = plan.step(1000)
    batch, _ = builder.build(1000)
    tokens = batch.rows.tokens[batch.rows.segment_ids == 1 + 2 * 17]  # the query of pair 17
    np.testing.assert_array_equal(tokens, cache.tokens_of(int(step.texts_BxT[17, 0])))
