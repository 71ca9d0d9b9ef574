"""Rows that the tables of several architectures share."""

from jaxembed.hf.table import Flat, Linear, Row


def projection_rows(hf: str, ours: str, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a linear layer into heads: kernel [D, H, K] and, if any, bias [H, K]."""
    kernel = Row(f"{hf}.weight", f"{ours}/kernel", Linear())
    return (kernel, Row(f"{hf}.bias", f"{ours}/bias", Flat())) if bias else (kernel,)


def linear_rows(hf: str, ours: str, inputs: int = 1, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of another linear layer; `inputs`: the kernel's input dimensions."""
    kernel = Row(f"{hf}.weight", f"{ours}/kernel", Linear(inputs))
    return (kernel, Row(f"{hf}.bias", f"{ours}/bias")) if bias else (kernel,)


def norm_rows(hf: str, ours: str, bias: bool = True, first: int = 0) -> tuple[Row, ...]:
    """Returns the rows of a norm; `first`: the first layer that has it."""
    scale = Row(f"{hf}.weight", f"{ours}/scale", first=first)
    return (scale, Row(f"{hf}.bias", f"{ours}/bias", first=first)) if bias else (scale,)
