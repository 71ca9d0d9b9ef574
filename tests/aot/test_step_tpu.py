"""A 7B model's train step on the TPU slices that its config names, compiled ahead of time: does it fit?

In a tier of its own, `make test-aot`: XLA's compiler for TPUs is a 200 MB download, and each case takes minutes.
"""

import pytest

from benchmarks.step_tpu import TPUS, compile_step


@pytest.mark.parametrize("machine", TPUS)
def test_a_7b_model_with_adapters_fits(machine, capsys):
    found = compile_step("mistral_7b_lora", machine)
    with capsys.disabled():
        print(f"\nmistral_7b_lora:{machine}: {found.state / 1e9:.2f} + {found.temporaries / 1e9:.2f} GB on each chip")
    assert found.state + found.temporaries < TPUS[machine][1]
    # The base lies in bfloat16, once over 16 chips; what is trained and its optimizer are small beside it.
    assert 2 * 7.1e9 / 16 < found.state < 1.5 * 2 * 7.1e9 / 16
