"""Leave out training records that say nothing new, that give an evaluation away, or that are most likely noise.

    python -m jaxembed.clean --pairs=pairs.jsonl.gz --out=clean.jsonl.gz --exact_duplicates --near_duplicates=0.8
    python -m jaxembed.clean --pairs=PAIRS --out=OUT --against=stsb-dev.jsonl.gz,scifact --model=FOLDER --consistency=2

Reads records and writes those that are left, as training takes them: a JSON object per line, or parquet. The rules come
in the order below, the cheapest first; what one has dropped, the next does not see. Prints how many records each has
dropped, and one JSON line last.

  --pairs             records: a file, folder or glob, tfds:NAME:SPLIT, hf:NAME:SPLIT; --format: theirs, as in training
  --out               .jsonl, .jsonl.gz or .parquet; --report: a folder for README.md with examples, else OUT.report
  --exact_duplicates  drop records whose query and positives equal those of an earlier one, but for case and spaces
  --against           evaluation sets, by commas: drop records one of whose texts has the letters and digits of a text
                      of them, or shares --ngram words in a row with one (0 = whole texts only); of negatives only the
                      text is left out. Similarity files, BEIR folders, classification (a file or TRAIN:TEST), records
  --near_duplicates   drop records whose query and positives share so large a part of their runs of 3 words (Jaccard)
                      with an earlier record that is kept
  --consistency       drop pairs whose positive is not among the first so many documents that --model finds for the
                      query (E5, arXiv:2212.03533), of --pool documents, drawn by a hash. Holds all records in memory;
                      their `instruction` fills {instruction} in the model's prompt for queries, as in training
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.config import CHOICES, SourceConfig
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory
from jaxembed.mining.writing import report_folder, require_out, row_of, write_records
from jaxembed.storage import AnyPath

if TYPE_CHECKING:
    from jaxembed.data.records import Record, RecordReader
    from jaxembed.data.rows import RowSource
    from jaxembed.mining.dropping import Dropped, Rule

README = "README.md"
Rows = list[tuple[str, str, int, int]]


def main() -> None:
    """Runs the command."""
    out = _require_flags()
    keep_freed_memory()
    with connect() as peers:
        _clean(out, peers)


def _clean(out: AnyPath, peers: Peers) -> None:
    """Cleans, a model on the devices of all processes; process 0 writes."""
    flag = flags.FLAGS
    from rich.console import Console

    from jaxembed.data.records import RecordReader
    from jaxembed.mining.dropping import Dropped, sieve
    from jaxembed.mining.inputs import asked
    from jaxembed.mining.report import rich_table

    source = SourceConfig(**parse_spec(flag.pairs), format=flag.format)
    reader, dropped = RecordReader(source, "error", "--pairs"), Dropped()
    if peers.count > 1:
        peers.require_same("command", asked([reader.source, *_sets()]))
    counted = _Counted(reader, bar=peers.main)
    records: Iterable[Record] = sieve(counted, _rules(), dropped)
    if flag.consistency:
        records = _consistent(list(records), dropped, peers)
    if not peers.main:
        return
    kept = _Rows(records)
    write_records(out, kept)
    rows = _table(dropped, counted.count, kept.count)
    Console().print(rich_table("Records", "became", rows))
    _write_report(report_folder(out, flag.report), reader.source.label, rows, dropped)
    counts = {"read": counted.count, "kept": kept.count, "texts_left_out": dropped.texts}
    print(json.dumps({"out": str(out), **counts, "dropped": dropped.counts}))


def _sets() -> "list[RowSource]":
    """Returns the rows of --against."""
    from jaxembed.mining.contamination import sources

    return [source for spec in flags.FLAGS.against for source in sources(spec)]


def _rules() -> "list[Rule]":
    """Returns the rules that look at one record at a time, the cheapest first."""
    flag = flags.FLAGS
    from jaxembed.mining.contamination import Contamination
    from jaxembed.mining.duplicates import ExactDuplicates, NearDuplicates

    rules: list[Rule] = []
    if flag.exact_duplicates:
        rules.append(ExactDuplicates())
    if flag.against:
        rules.append(Contamination(flag.against, flag.ngram))
    if flag.near_duplicates:
        rules.append(NearDuplicates(flag.near_duplicates))
    return rules


def _consistent(records: "list[Record]", dropped: "Dropped", peers: Peers) -> "list[Record]":
    flag = flags.FLAGS
    from jaxembed import model_source
    from jaxembed.embedder import Embedder
    from jaxembed.mining.consistency import consistent
    from jaxembed.mining.inputs import require_matches
    from jaxembed.mining.scoring import prompts_of, require_searchable

    said = f"--model={flag.model}"
    require_matches(records, f"--consistency: --pairs={flag.pairs}")
    embedder = Embedder.load(flag.model, dtype=flag.dtype)
    require_searchable(embedder, said)
    prompts = prompts_of(embedder, said)
    if peers.count > 1:
        weights = model_source.fingerprint(flag.model, embedder.blueprint)
        peers.require_same("model", {"weights": weights, "records": len(records)})
    return consistent(records, embedder, prompts, flag.consistency, flag.pool, dropped, peers.main)


class _Counted:
    """Records as they are read, with a bar on standard error, and how many there were."""

    def __init__(self, reader: "RecordReader", bar: bool) -> None:
        self._reader, self._bar, self.count = reader, bar, 0

    def __iter__(self) -> "Iterator[Record]":
        from rich.console import Console
        from rich.progress import Progress

        source = self._reader.source
        with Progress(console=Console(stderr=True), transient=True, disable=not self._bar) as progress:
            task = progress.add_task("reading", total=source.total)
            for record in self._reader:
                self.count += 1
                if self.count % 256 == 0:
                    progress.update(task, completed=source.done)
                yield record


class _Rows:
    """The rows of records, and how many there were."""

    def __init__(self, records: "Iterable[Record]") -> None:
        self._records, self.count = records, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self._records:
            self.count += 1
            yield row_of(record, record.negatives, record.scores, record.negative_queries)


def _table(dropped: "Dropped", read: int, kept: int) -> Rows:
    """Returns the table of what became of the records."""
    flag = flags.FLAGS
    said = {"near duplicate": f"{flag.near_duplicates:g}"}
    rows = [(f"dropped: {name}", said.get(name, ""), count, read) for name, count in dropped.counts.items()]
    rows += [("kept", "", kept, read), ("read", "", read, read)]
    return [*rows, ("texts left out of those kept", "", dropped.texts, 0)] if dropped.texts else rows


def _write_report(folder: AnyPath, label: str, rows: Rows, dropped: "Dropped") -> None:
    """Writes README.md."""
    from jaxembed.mining import report

    text = f"# What is left of {label}\n\n{report.markdown('records', rows)}"
    text += report.examples("Dropped, the first of each kind", dropped.examples)
    report.write(folder, {README: text.encode()})


def _require_flags() -> AnyPath:
    """Refuses at once what needs no look into the files; returns where records go to."""
    flag = flags.FLAGS
    if not flag.pairs:
        raise UserError("--pairs is missing: name the records, as pairs.jsonl.gz")
    out = require_out(flag.out)
    report_folder(out, flag.report)
    check_place(SourceConfig(**parse_spec(flag.pairs)), "--pairs")
    if not (flag.exact_duplicates or flag.against or flag.near_duplicates or flag.consistency):
        raise UserError("no rule: give --exact_duplicates, --against, --near_duplicates or --consistency")
    if not math.isfinite(flag.near_duplicates):
        raise UserError(f"--near_duplicates={flag.near_duplicates}: must be finite")
    if flag.consistency and not flag.model:
        raise UserError("--consistency asks a model for its documents: name it by --model")
    if flag.model and not flag.consistency:
        raise UserError("--model is only asked by --consistency=K: give that too, as --consistency=2")
    if flag["pool"].present and not flag.consistency:
        raise UserError("--pool is what --consistency=K searches: give that too")
    if flag.pool <= flag.consistency:
        raise UserError(f"--pool={flag.pool} holds no more documents than --consistency={flag.consistency} accepts")
    if flag["ngram"].present and not flag.against:
        raise UserError("--ngram looks for words of the sets of --against: give one")
    if flag.against:
        from jaxembed.mining.contamination import places

        for spec in flag.against:
            if not spec:
                raise UserError("--against: an empty name between its commas")
            places(spec)
    return out


if __name__ == "__main__":
    flags.DEFINE_string("pairs", "", "Records.")
    flags.DEFINE_enum("format", "jaxembed", CHOICES["data.train[].format"], "Of the records.")
    flags.DEFINE_string("out", "", "File of the records that are left.")
    flags.DEFINE_string("report", "", "Folder of the report; '' = OUT.report.")
    flags.DEFINE_bool("exact_duplicates", False, "Drop what equals an earlier record.")
    flags.DEFINE_list("against", [], "Evaluation sets.")
    flags.DEFINE_integer("ngram", 13, "Words in a row that give a text of --against away; 0 = whole texts only.", 0)
    flags.DEFINE_float("near_duplicates", 0.0, "Jaccard index of near duplicates; 0 = off.", 0.0, 1.0)
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_integer("consistency", 0, "A positive must be among so many; 0 = off.", lower_bound=0)
    flags.DEFINE_integer("pool", 1_000_000, "Documents that are searched.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
