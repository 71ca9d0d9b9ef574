"""State-space backbones against transformers, and against our own torch class where they read both ways."""

import pytest
from ssm_peers import SHAPES, assert_as_torch


@pytest.mark.parametrize("name", [name for name, (model_type, _) in SHAPES.items() if model_type != "bamba"])
def test_states_of_every_layer_equal_torch_and_tensors_come_back(name, tmp_path):
    assert_as_torch(name, tmp_path)
