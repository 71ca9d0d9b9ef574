"""Estimates of a step's time: by hand, and which way they go."""

import dataclasses
import types

import numpy as np
import pytest

from jaxembed.hardware import chip_of
from jaxembed.planning import roofline
from jaxembed.planning.hlo import Collective, Work
from jaxembed.planning.roofline import Rates, estimate

RATES = Rates({"f32": 100.0, "bf16": 200.0}, 0.5, 10.0, 0.0, lambda c: c.sent_bytes / 5.0)
SUM = Collective("all-reduce", 50, (0, 1), False, 3)  # 50 bytes sent, 10 s, three times


def program(work=(), collectives=()):
    return types.SimpleNamespace(work=list(work), collectives=list(collectives))


def test_the_longer_of_products_and_traffic_counts_and_instructions_take_turns():
    found = estimate(program([Work(200.0, "f32", False, 5, 2), Work(100.0, "bf16", False, 30, 1)]), RATES)
    assert found.products == 2 * 2 + 0.5
    assert found.memory == 2 * 0.5 + 3
    assert found.step == 2 * 2 + 3
    assert estimate(program([Work(200.0, "f32", True, 5, 1)]), RATES).step == 2 * 2


def test_collectives_wait_or_hide():
    work = [Work(2000.0, "f32", False, 0, 1)]  # 20 s
    waited = estimate(program(work, [SUM]), RATES)
    assert (waited.network, waited.exposed, waited.step) == (30, 30, 50)
    hidden = estimate(program(work, [dataclasses.replace(SUM, hidden=True)]), RATES)
    assert (hidden.network, hidden.exposed, hidden.step) == (30, 10, 30)


@pytest.mark.parametrize("field", ["flops", "of_batched", "memory", "launch"])
def test_a_better_chip_is_no_slower(field):
    base = dataclasses.replace(RATES, launch=0.5)
    better = {"flops": {"f32": 150.0, "bf16": 300.0}, "of_batched": 0.7, "memory": 20.0, "launch": 0.1}[field]
    work = [Work(200.0, "f32", True, 5, 2), Work(100.0, "bf16", False, 300, 1)]
    assert (
        estimate(program(work), dataclasses.replace(base, **{field: better})).step < estimate(program(work), base).step
    )


def devices(shape):
    """Stand-ins for the devices of a grid."""
    at = [tuple(map(int, place)) for place in np.ndindex(*shape)]
    chips = [types.SimpleNamespace(coords=list(place), process_index=i // 8) for i, place in enumerate(at)]
    return types.SimpleNamespace(devices=np.array(chips, dtype=object))


@pytest.mark.parametrize(
    ("kind", "shape", "group", "links"),
    [
        ("TPU v5 lite", (16, 16, 1), range(16), 2),  # a whole axis closes to a ring
        ("TPU v5 lite", (16, 16, 1), range(0, 256, 16), 2),
        ("TPU v5 lite", (16, 16, 1), range(256), 4),
        ("TPU v5 lite", (4, 4, 1), range(16), 2),  # short axes do not close
        ("TPU v5", (4, 4, 4), range(64), 6),
        ("TPU v5", (4, 4, 4), range(4), 2),
        ("TPU v5", (4, 4, 8), range(4), 1),  # half of an axis is no ring
        ("TPU v5", (2, 2, 4), range(4), 1),  # no whole cube, so no axis closes
    ],
)
def test_links_of_a_group_of_tpus(kind, shape, group, links):
    chip = chip_of(kind)
    collective = Collective("all-gather", 1000, tuple(group), False, 1)
    seconds = roofline.rates_of(chip, devices(shape), shape).network(collective)
    assert seconds == pytest.approx(collective.sent_bytes / (roofline.OF_LINKS * links * chip.link_bandwidth))


def test_gpus_of_several_nodes_wait_for_the_network():
    chip = chip_of("NVIDIA H100 80GB HBM3")
    network = roofline.rates_of(chip, devices((16, 1, 1)), (16,)).network
    inside, across = (network(Collective("all-reduce", 1000, group, False, 1)) for group in ((0, 7), (0, 8)))
    assert across / inside == pytest.approx(chip.link_bandwidth / chip.network_bandwidth)
    # Of two whole nodes every GPU has a card of its own: together they carry nearly what a switch does.
    whole = Collective("all-gather", 1000, tuple(range(16)), False, 1)
    assert whole.sent_bytes / network(whole) == pytest.approx(roofline.OF_LINKS * 8 * chip.network_bandwidth)
