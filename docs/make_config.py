"""Writes docs/config.md from the dataclasses of jaxembed/config.py: python -m docs.make_config."""

import dataclasses
import inspect
import pathlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxembed import config
from jaxembed.stages import CHANGEABLE

PAGE = pathlib.Path(__file__).with_name("config.md")
HEAD = """# Every field of the config

*Made by `make docs` from `jaxembed/config.py`; change that file, not this page.*

A config file has a function `get_config(arg)` that changes `default_config()`. Any field can be set by a flag, in
quotes where a shell reads brackets (zsh does):

```bash
python -m jaxembed.train --config=configs/finetune_pairs.py --workdir=runs/first --data=pairs.jsonl \\
    --config.batch_size=256 --config.optimizer.learning_rate=1e-5 \\
    '--config.data.train[0].format=st' --config.prompts.query='query: ' "--config.eval.sts=('stsb-dev.jsonl.gz',)"
```

An unknown field, a wrong type or a set-up that cannot be right is refused within seconds, with one line.
"""


def page() -> str:
    """Returns the text of docs/config.md."""
    sections = "\n".join(_section(kind, where) for kind, where in _walk(config.Config, ""))
    staged = ", ".join(f"`{field}`" for field in CHANGEABLE)
    tail = f"\n## Stages\n`stages` is a tuple of mappings, each with a `name` and what it changes: {staged}.\n"
    return f"{HEAD}\n{sections}{tail}"


def _walk(kind: type, where: str) -> Iterator[tuple[type, str]]:
    """Yields the dataclasses that a config is made of, each with the path of its fields."""
    yield kind, where
    for name, field_type in typing.get_type_hints(kind).items():
        inner = typing.get_args(field_type)
        if dataclasses.is_dataclass(field_type):
            yield from _walk(field_type, f"{where}{name}.")
        elif inner and dataclasses.is_dataclass(inner[0]):
            yield from _walk(inner[0], f"{where}{name}[i].")


def _section(kind: type, where: str) -> str:
    title = f"`{where.rstrip('.')}`" if where else "The run"
    lines = [f"## {title}", inspect.getdoc(kind) or "", "", "| field | type | default | meaning |", "|---|---|---|---|"]
    comments = _comments(kind)
    for field in dataclasses.fields(kind):
        field_type = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(field_type) or field.name == "train":
            continue
        cells = (f"`{where}{field.name}`", _type_name(field_type), _default(field), comments[field.name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _comments(kind: type) -> dict[str, str]:
    """Returns what the source says of each field: behind it, or on the line above."""
    said, above = {}, ""
    for line in map(str.strip, inspect.getsource(kind).splitlines()):
        name, colon, rest = line.partition(":")
        if colon and name.isidentifier():
            said[name] = rest.partition("  # ")[2] or above
        above = line[2:] if line.startswith("# ") else ""
    return said


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return "any"
    if origin is tuple:
        return "tuple of " + " and ".join(_type_name(t) for t in inner if t is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping to {_type_name(inner[1])}"
    return kind.__name__


def _default(field: dataclasses.Field) -> str:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return f"`{value!r}`"


if __name__ == "__main__":
    PAGE.write_text(page())
