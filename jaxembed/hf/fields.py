"""Fields of config.json, read one by one; a wrong one is a UserError that says what is wrong and where."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxembed.errors import UserError

# Our activation → its names in transformers; the first is the one we write.
ACTIVATION_NAMES: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}


class SpecialIds(Protocol):
    """What is asked of a tokenizer; ids are -1 where it has none. See `jaxembed.data.tokenizer.Tokenizer`."""

    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int
    eos_id: int


def read_count(hf: Mapping[str, Any], field: str, where: str, default: int = 0) -> int:
    """Returns a whole number above 0; `default` where the field is missing or null, 0 for none.

    Raises:
      UserError: it is something else, or missing without a default.
    """
    value = default if hf.get(field) is None else hf[field]
    if type(value) is not int or value < 1:
        found = "is missing" if hf.get(field) is None else f"is {value!r}"
        raise UserError(f"{where}: {field} {found}, wants a whole number above 0")
    return value


def read_number(hf: Mapping[str, Any], field: str, where: str, default: float = 0.0) -> float:
    """Returns a number above 0; `default` where the field is missing or null, 0 for none.

    Raises:
      UserError: it is something else, or missing without a default.
    """
    value = default if hf.get(field) is None else hf[field]
    if type(value) not in (int, float) or not value > 0:
        found = "is missing" if hf.get(field) is None else f"is {value!r}"
        raise UserError(f"{where}: {field} {found}, wants a number above 0")
    return float(value)


def read_activation(hf: Mapping[str, Any], field: str, where: str, default: str) -> str:
    """Returns our name of an activation function, a key of ACTIVATION_NAMES.

    Raises:
      UserError: it is not supported.
    """
    theirs = hf.get(field) or default
    for ours, names in ACTIVATION_NAMES.items():
        if theirs in names:
            return ours
    known = ", ".join(name for names in ACTIVATION_NAMES.values() for name in names)
    raise UserError(f"{where}: {field} = {theirs!r} is not supported; supported: {known}")


def refuse_others(hf: Mapping[str, Any], where: str, supported: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError where a field is there, not null, and none of the supported values; the first is the default."""
    for field, values in supported.items():
        if hf.get(field) is not None and hf[field] not in values:
            named = ", ".join(repr(value) for value in values)
            raise UserError(f"{where}: {field} = {hf[field]!r} is not supported; supported: {named}")
