"""A run's metrics as columns, for people to look at: curves, scores before and after, speed, time."""

import array
import collections
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxembed.config_check import LOWER_IS_BETTER
from jaxembed.evaluation.report import MAIN_METRIC
from jaxembed.metrics import iter_metrics
from jaxembed.observing import rest
from jaxembed.storage import AnyPath

WARM_UP = 0.1  # of the steps: compilation falls there, so that speed is taken from the rest


class Series(NamedTuple):
    """What one metric was: float64 [n], at increasing steps, int64 [n]."""

    steps: np.ndarray
    values: np.ndarray

    def at(self, step: int) -> float:
        """Returns the newest value at `step`."""
        return float(self.values[np.searchsorted(self.steps, step, side="right") - 1])


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a task's metric went: scores and the steps they belong to; `bm25` is None where it was not asked for."""

    task: str  # 'KIND/NAME'
    metric: str
    first: float
    best: float
    last: float
    first_step: int
    best_step: int
    last_step: int
    bm25: float | None


@dataclasses.dataclass(frozen=True)
class History:
    """The metrics of a run.

    Attributes:
      series: of each number by its name in metrics.jsonl.
      stages: the run's stages with the first step that was logged in each; empty for a run without.
      before: the last step that was logged before these; 0 for none.
      rest: seconds that no line holds; see `jaxembed.observing.rest`.
    """

    series: Mapping[str, Series]
    stages: tuple[tuple[str, int], ...]
    before: int = 0
    rest: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, workdir: AnyPath, until: int | None = None) -> "History":
        """Reads metrics.jsonl: nothing, where there is none.

        Args:
          workdir: the run's.
          until: the last step to read; None for all.
        """
        steps = collections.defaultdict(lambda: array.array("q"))  # a run may have a million lines
        values = collections.defaultdict(lambda: array.array("d"))
        stages: dict[str, int] = {}
        for line in iter_metrics(workdir):
            step = line.pop("step")
            if until is not None and step > until:
                break
            if "stage" in line:
                stages.setdefault(line["stage"], step)
            for name, value in line.items():
                if isinstance(value, int | float):
                    steps[name].append(step)
                    values[name].append(value)
        series = {name: Series(np.array(steps[name]), np.array(values[name])) for name in values}
        return cls(series, tuple(stages.items()), rest=rest.read(workdir, until))

    @property
    def last_step(self) -> int:
        """The last step that a line was written for; 0 for none."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    @property
    def tasks(self) -> list[str]:
        """The evaluation sets, as 'KIND/NAME'."""
        return [name.removeprefix("eval/") for name in self.series if name.startswith("eval/") and name.count("/") == 2]

    def scores(self, task: str) -> list[Scores]:
        """Returns how a task's metrics went, the main one first."""
        return [self._scores(task, metric) for metric in self._metrics(task)]

    def bm25(self, task: str) -> float | None:
        """Returns BM25's main score on a task, where it was measured."""
        baseline = self.series.get(f"bm25/{task}")
        return float(baseline.values[-1]) if baseline else None

    def seconds(self) -> float:
        """Returns how long the steps took by themselves; a step that was not logged counts as the next."""
        if "pairs_per_s" not in self.series:
            return 0.0
        pairs, rate = self.series["pairs"], self.series["pairs_per_s"]
        return float(np.sum(np.diff(pairs.steps, prepend=self.before) * pairs.values / np.maximum(rate.values, 1e-9)))

    def typical(self, name: str) -> float | None:
        """Returns a metric's median after the first steps, in which compilation falls; None where it was not logged."""
        if name not in self.series:
            return None
        values = self.series[name].values
        return float(np.median(values[min(int(np.ceil(WARM_UP * len(values))), len(values) - 1) :]))

    def between(self, first: int, last: float) -> "History":
        """Returns the part from step `first` up to, not with, step `last`."""
        parts, before = {}, self.before
        for name, (steps, values) in self.series.items():
            start, end = np.searchsorted(steps, (first, last))
            if start:
                before = max(before, int(steps[start - 1]))
            if start < end:
                parts[name] = Series(steps[start:end], values[start:end])
        return History(parts, tuple((name, step) for name, step in self.stages if first <= step < last), before)

    def by_stage(self) -> list[tuple[str, "History"]]:
        """Returns the part of each stage; a run without stages is one, called ''."""
        if not self.stages:
            return [("", self)]
        ends = [step for _, step in self.stages[1:]] + [np.inf]
        return [(name, self.between(step, end)) for (name, step), end in zip(self.stages, ends)]

    def _metrics(self, task: str) -> list[str]:
        prefix = f"eval/{task}/"
        main = MAIN_METRIC[task.split("/")[0]]
        return [main, *(name.removeprefix(prefix) for name in self.series if name.startswith(prefix))]

    def _scores(self, task: str, metric: str) -> Scores:
        name = task if metric == MAIN_METRIC[task.split("/")[0]] else f"{task}/{metric}"
        steps, values = self.series[f"eval/{name}"]
        best = int(values.argmin() if metric in LOWER_IS_BETTER else values.argmax())
        return Scores(
            task,
            metric,
            *(float(values[i]) for i in (0, best, -1)),
            *(int(steps[i]) for i in (0, best, -1)),
            self.bm25(name),
        )
