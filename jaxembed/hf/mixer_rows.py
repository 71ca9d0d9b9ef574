"""Rows of state-space mixers' tensors, which the tables of several architectures share."""

import dataclasses
import math

import numpy as np

from jaxembed.hf.rows import linear_rows
from jaxembed.hf.table import Flat, Fused, Linear, Row, Same, Shape, Transform
from jaxembed.models.layers.ssm import Mamba1Shape, Mamba2Shape


@dataclasses.dataclass(frozen=True)
class Depthwise:
    """torch's [channels, 1, K] of a convolution of each channel by itself ↔ our [K, …], the rest being the channels."""

    def hf_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[1:]), 1, shape[0]

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor[:, 0].T.reshape(shape)  # splits axes only: a view

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array), -1).T[:, None]


def mamba1_rows(hf: str, ours: str, shape: Mamba1Shape) -> tuple[Row, ...]:
    """Returns the rows of Mamba's mixers.

    Args:
      hf: what stands before the tensors' names, with '{i}' in it.
      ours: what stands before the leaves' paths.
      shape: the mixers'.
    """
    biases = [_fused(f"{hf}.in_proj.bias", [f"{ours}/{name}/bias" for name in ("into", "gate")], Same())]
    return (
        _fused(f"{hf}.in_proj.weight", [f"{ours}/{name}/kernel" for name in ("into", "gate")], Linear()),
        *(biases if shape.bias else []),
        Row(f"{hf}.conv1d.weight", f"{ours}/conv/kernel", Depthwise()),
        *([Row(f"{hf}.conv1d.bias", f"{ours}/conv/bias")] if shape.conv_bias else []),
        Row(f"{hf}.x_proj.weight", f"{ours}/select/kernel", Linear()),
        Row(f"{hf}.dt_proj.weight", f"{ours}/step/kernel", Linear()),
        Row(f"{hf}.dt_proj.bias", f"{ours}/step/bias", full_precision=True),
        Row(f"{hf}.A_log", f"{ours}/a_log", full_precision=True),
        Row(f"{hf}.D", f"{ours}/skip", full_precision=True),
        *linear_rows(f"{hf}.out_proj", f"{ours}/out", bias=shape.bias),
    )


def mamba2_rows(hf: str, ours: str, shape: Mamba2Shape) -> tuple[Row, ...]:
    """Returns the rows of Mamba-2's mixers; arguments as of `mamba1_rows`."""
    into = [f"{ours}/{name}" for name in ("gate", "into", "write", "read", "step")]
    convolved = [f"{ours}/conv_{name}" for name in ("into", "write", "read")]
    biases = [_fused(f"{hf}.in_proj.bias", [f"{path}/bias" for path in into], Flat())]
    conv_biases = [_fused(f"{hf}.conv1d.bias", [f"{path}/bias" for path in convolved], Flat())]
    return (
        _fused(f"{hf}.in_proj.weight", [f"{path}/kernel" for path in into], Linear()),
        *(biases if shape.bias else []),
        _fused(f"{hf}.conv1d.weight", [f"{path}/kernel" for path in convolved], Depthwise()),
        *(conv_biases if shape.conv_bias else []),
        Row(f"{hf}.dt_bias", f"{ours}/step_bias", full_precision=True),
        Row(f"{hf}.A_log", f"{ours}/a_log", full_precision=True),
        Row(f"{hf}.D", f"{ours}/skip", full_precision=True),
        Row(f"{hf}.norm.weight", f"{ours}/norm/scale", Flat()),
        *linear_rows(f"{hf}.out_proj", f"{ours}/out", inputs=2, bias=shape.bias),
    )


def _fused(hf: str, ours: list[str], transform: Transform) -> Fused:
    first, *others = ours
    return Fused(hf, first, transform, others=tuple((path, transform) for path in others))
