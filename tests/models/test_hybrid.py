"""The hybrid backbone against transformers, causal and with attention that sees both ways."""

import pytest
from ssm_peers import assert_as_torch


@pytest.mark.parametrize("name", ["bamba", "bamba both ways"])
def test_states_of_every_layer_equal_transformers_and_tensors_come_back(name, tmp_path):
    assert_as_torch(name, tmp_path)
