"""Runs a command in this process, on a tiny model, through its own flags."""

import contextlib
import json
import runpy
import sys

import word_models
from absl import flags

from jaxembed import cli, model_source
from jaxembed.embedder import Embedder
from jaxembed.reporting import curves


class Recorder(contextlib.nullcontext):
    """Process 0 of two; keeps what they must have in common."""

    def __init__(self) -> None:
        super().__init__(self)
        self.main, self.count, self.said = True, 2, {}

    def require_same(self, what: str, value: object) -> None:
        self.said |= {what: json.loads(json.dumps(value))}


def run(monkeypatch, capsys, name: str, *args: str, model=None, teacher=None) -> tuple[int, str, str]:
    """Runs `python -m jaxembed.NAME ARGS`; --model=tiny is `model`, --teacher=other is `teacher`.

    Returns:
      Exit code, standard output and standard error.
    """
    models = {"tiny": model or word_models.make("bert"), "other": teacher}
    monkeypatch.setattr(Embedder, "load", lambda path, **_: models[path])
    monkeypatch.setattr(model_source, "fingerprint", lambda spec, blueprint: f"weights of {spec}")
    monkeypatch.setattr(curves, "render", lambda title, fill: b"no picture")
    for logging in ("use_absl_handler", "set_verbosity"):
        monkeypatch.setattr(cli.logging, logging, lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.setenv("COLUMNS", "120")
    before, code = set(flags.FLAGS), 0
    try:
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, f"jaxembed.{name}", raising=False)
            runpy.run_module(f"jaxembed.{name}", run_name="__main__", alter_sys=False)
    except SystemExit as left:
        code = left.code
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
    return code, *capsys.readouterr()
