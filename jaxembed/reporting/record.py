"""What a run left in its folder, put together for people: how it was set up, what it learnt from, how it went."""

import dataclasses
import json

from jaxembed import run_folder
from jaxembed.config import Config
from jaxembed.reporting.history import History
from jaxembed.stages import stages_of
from jaxembed.storage import AnyPath


@dataclasses.dataclass(frozen=True)
class Source:
    """What is said of one source of training data in data.json; its texts and paths are not."""

    stage: str
    source: str  # a label
    records: int
    texts: int
    tokens: int
    truncated: int  # texts that were longer than the limit
    skipped: int  # records that were bad
    weight: float
    licence: str  # '' where none is known


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
      name: of its folder.
      config: the resolved one.
      architecture: of the model, such as 'bert'.
      sources: the training data, of all stages that were reached.
      history: the metrics.
    """

    name: str
    config: Config
    architecture: str
    sources: tuple[Source, ...]
    history: History

    @classmethod
    def read(cls, workdir: AnyPath, until: int | None = None) -> "RunRecord":
        """Reads a run's folder.

        Args:
          workdir: the folder.
          until: the step at which to look; None for the last one.

        Raises:
          UserError: it is not a run's folder.
        """
        config = run_folder.read_config(workdir)
        history = History.read(workdir, until)
        path = workdir / run_folder.DATA
        rows = [Source(**row) for row in json.loads(path.read_text())] if path.exists() else []
        reached = [name for name, _ in history.stages]
        sources = tuple(row for row in rows if not reached or row.stage in reached)
        blueprint = workdir / "model" / "blueprint.json"
        hf_config = json.loads(blueprint.read_text())["hf_config"] if blueprint.exists() else {}
        architecture = hf_config.get("model_type", config.model.arch)
        return cls(workdir.resolve().name, config, architecture, sources, history)

    @property
    def title(self) -> str:
        """The run in one line."""
        all_losses = [loss.title for stage in stages_of(self.config) for loss in stage.config.all_losses]
        losses = " + ".join(dict.fromkeys(all_losses))
        stages = f", {len(self.config.stages)} stages" if self.config.stages else ""
        return (
            f"{self.name}: {self.architecture}, {losses}, batch {self.config.batch_size:,}, "
            f"{self.history.last_step:,} steps{stages}"
        )
