"""What tests of reports share: the folder of a run that never was, with figures chosen by hand."""

import json
import pathlib

import numpy as np
from tiny_run import tiny_config

from jaxembed import config as config_lib

SOURCE = {"records": 1500, "texts": 5000, "tokens": 60_000, "truncated": 50, "skipped": 3, "weight": 2.0}
SCORES = {"sts/dev": "spearman", "pairs/held-out": "ndcg@10"}
BM25 = 52.5


def write_run(
    workdir: pathlib.Path,
    steps: int,
    every: int = 0,
    stages: tuple[str, ...] = (),
    licences: tuple[str, ...] = ("Apache-2.0", ""),
    **changes: object,
) -> pathlib.Path:
    """Writes config.json, data.json and metrics.jsonl; returns the folder.

    Args:
      workdir: the folder to make.
      steps: of the run; each stage has an equal share.
      every: steps between evaluations; 0 for none. Scores rise by 1 per step, but fall by 5 at the last.
      stages: names.
      licences: one per source.
      changes: fields of the config, dots as '__'.
    """
    workdir.mkdir(parents=True)
    staged = tuple({"name": name, "steps": steps // len(stages)} for name in stages)
    config = tiny_config(workdir, stages=staged, steps=steps, **changes)
    (workdir / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    sources = [
        {"stage": stage, "source": f"source-{i}.jsonl", "licence": licence, **SOURCE}
        for stage in stages or ("",)
        for i, licence in enumerate(licences)
    ]
    (workdir / "data.json").write_text(json.dumps(sources))
    lines = (_line(step, steps, every, stages) for step in range(steps + 1))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if len(line) > 2))
    return workdir


def _line(step: int, steps: int, every: int, stages: tuple[str, ...]) -> dict:
    line = {"step": step, "stage": stages[max(step - 1, 0) * len(stages) // steps]} if stages else {"step": step}
    if step:
        wobble = float(np.sin(step))
        rate = 20.0 if step == 1 else 2000.0 + 100 * wobble  # the first step compiles
        line |= {"loss": 4 / step + 0.1 * wobble + 0.2, "grad_norm": 1 + 0.5 * wobble, "learning_rate": 1e-3 / step}
        line |= {"pairs": 32, "tokens": 1600, "padded_tokens": 1684, "padding_waste": 0.05}
        line |= {"pairs_per_s": rate, "tokens_per_s": 50 * rate, "padded_tokens_per_s": 52 * rate}
    if every and (step % every == 0 or step == steps):
        value = 20.0 + step - 5 * (step == steps)
        line |= {f"eval/{task}": value for task in SCORES} | {"eval/pairs/held-out/recall@1": value / 2}
        if step == 0:
            line |= {"bm25/pairs/held-out": BM25, "bm25/pairs/held-out/recall@1": BM25 / 2}
    return line
