"""Where a command may write a model, and whether its records are there: answers at once, imports nothing heavy."""

import json
from collections.abc import Sequence

from jaxembed.config import SourceConfig
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.errors import UserError
from jaxembed.storage import path_of

_SETTINGS = "config_sentence_transformers.json"  # of a folder that `jaxembed.hf.writer` wrote, names jaxembed in it


def require_exportable(out: str, where: str, models: Sequence[str]) -> None:
    """Refuses a place at which no model can be written, which `export_model` would find out after all the work.

    Args:
      out: a folder; it need not exist.
      where: the flag that names it.
      models: what the new model is made of, as the user named them, which it must not replace.

    Raises:
      UserError: there is something at `out` that is no exported folder, or it is one of `models`.
    """
    folder = path_of(out)
    taken = [spec for spec in models if spec and path_of(spec).resolve() == folder.resolve()]
    if taken:
        raise UserError(f"{where}={out}: is one of the models that are read: take another folder")
    if not folder.exists() or (folder.is_dir() and not any(True for _ in folder.iterdir())):
        return
    try:
        exported = "jaxembed" in json.loads((folder / _SETTINGS).read_text())["__version__"]
    except (OSError, ValueError, KeyError, TypeError):
        exported = False
    if not exported:
        raise UserError(f"{where}={out}: is there already and is no exported folder; remove it, or take another")


def require_records(spec: str, where: str) -> None:
    """Refuses records that are not there.

    Raises:
      UserError: a file or folder is missing; names the flag.
    """
    check_place(SourceConfig(**parse_spec(spec)), where)
