"""Draw a run's curves and write its report.

    python -m jaxembed.report --workdir=RUN

Reads what training left in RUN and writes RUN/report/: README.md (a summary in Markdown), curves.png and, of a mixture
of experts, routers.png. Training does so at its end; this makes it anew, also while training is going on.
"""

import json
import sys

from absl import flags

from jaxembed import cli
from jaxembed.errors import UserError
from jaxembed.run_folder import write_whole
from jaxembed.storage import AnyPath, path_of

FOLDER = "report"


def write_report(workdir: AnyPath) -> None:
    """Writes WORKDIR/report, each file whole or not at all.

    Args:
      workdir: the run's.

    Raises:
      UserError: not a run's folder, no metrics in it yet, or no picture can be drawn.
      OSError: it cannot be written.
    """
    from jaxembed.reporting import curves, routers
    from jaxembed.reporting.record import RunRecord
    from jaxembed.reporting.run_report import report

    record = RunRecord.read(workdir)
    if not record.history.series:
        raise UserError(f"{workdir}: no metrics in it yet, so nothing to report")
    pictures = {curves.NAME: curves.draw(record.history, record.title)}
    loads = routers.read_loads(workdir)
    if loads:
        pictures[routers.NAME] = routers.draw(record.history, loads, record.title)
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for name, content in (pictures | {"README.md": report(record).encode()}).items():
        write_whole(folder / name, content)


def main() -> None:
    """Runs the command."""
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: name the run's folder")
    from rich.console import Console

    from jaxembed.reporting.summary import summary

    workdir = path_of(flags.FLAGS.workdir)
    try:
        write_report(workdir)
    except OSError as error:
        raise UserError(f"{workdir / FOLDER}: cannot be written: {error.strerror}") from error
    Console(file=sys.stderr).print(summary(workdir))
    print(json.dumps({"report": str(workdir / FOLDER)}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The run's folder.")
    cli.run(main, __doc__)
