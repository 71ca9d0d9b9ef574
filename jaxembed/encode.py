"""Encode texts into a folder of vectors: any number of them, on every device of every process, safe to kill.

    python -m jaxembed.encode --model=FOLDER --input=corpus.jsonl.gz --out=vectors
    python -m jaxembed.encode --model=RUN@best --input='shards/*.parquet' --out=vectors --precision=int8 --dims=256,64

--model takes a run's folder (RUN, RUN@STEP, RUN@best), a sentence-transformers or transformers folder, or the name of a
model on the hub. Started again with the same flags, on any number of processes, it goes on after the shards that are
there. Prints a table and one JSON line last. `jaxembed.search`, `mine` and `head` read the folder, and so do
`numpy.load` and pyarrow: manifest.json says what it holds.

  --input        texts: JSON lines, plain lines (.txt) or parquet, also .gz: a file, folder or glob; tfds:NAME:SPLIT,
                 hf:NAME:SPLIT. --field: their column (text, with a title before it); --id_field: of their ids (_id, id)
  --out          folder of vectors-00000.npy and ids-00000.json; --layout=parquet: both in one file. On disk or in a
                 store; with several processes, one that all of them see
  --prompt_name  the model's prompt that is put before each text: document, query …; --prompt: or this very text
  --precision    of the numbers stored: float32, float16; int8, uint8, each dimension in 255 steps of the range that it
                 has in the first --calibration texts; binary, ubinary, signs: all as quantize_embeddings of
                 sentence-transformers makes them
  --dims         keep the first dimensions only, as Matryoshka models can; several widths go into folders OUT/dim-N
  --normalize    bring vectors to length 1, after cutting
  --raw          leave the model's own scaling to length 1 out, as jaxembed.head wants vectors
  --fsdp         devices of a process over which the weights are spread, for models larger than one; --tensor likewise
"""

import dataclasses
import json
from typing import TYPE_CHECKING

from absl import flags

from jaxembed import cli
from jaxembed.config import SourceConfig
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory
from jaxembed.progress import short
from jaxembed.storage import AnyPath, path_of
from jaxembed.vectors.folder import LAYOUTS
from jaxembed.vectors.quantize import DTYPES

if TYPE_CHECKING:
    from jaxembed.data.texts import TextReader
    from jaxembed.embedder import Embedder
    from jaxembed.vectors.encoding_run import Work
    from jaxembed.vectors.folder import Manifest


def main() -> None:
    """Runs the command."""
    _require_flags()
    keep_freed_memory()
    with connect() as peers:
        _encode(peers)


def _encode(peers: Peers) -> None:
    import jax

    from jaxembed import sharding
    from jaxembed.config import MeshConfig
    from jaxembed.data.texts import TextReader
    from jaxembed.embedder import Embedder
    from jaxembed.progress import WorkBar
    from jaxembed.vectors.encoding_run import Encoding
    from jaxembed.vectors.folder import ShardWriter

    flag = flags.FLAGS
    reader = TextReader(flag.input, "--input", flag.field, flag.id_field)
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=flag.fsdp, tensor=flag.tensor), jax.local_devices())
    embedder = Embedder.load(flag.model, template=flag.template, dtype=flag.dtype, mesh=mesh)
    if flag.raw:
        embedder = embedder.raw()
    prompt = embedder.prompt_of(flag.prompt_name) if flag.prompt is None else flag.prompt
    manifests = _manifests(embedder, reader, prompt)
    peers.require_same("encoding", [dataclasses.asdict(manifest) for manifest in manifests.values()])
    writers = [ShardWriter(path, manifest) for path, manifest in manifests.items()]
    encoding = Encoding(embedder, reader, prompt, writers, flag.normalize, flag.batch_size)
    with WorkBar("encoding", reader.source.total, active=peers.main) as bar:

        def show(work: "Work") -> None:
            own = f" (process 0 of {peers.count})" if peers.count > 1 else ""
            rates = f"{short(work.texts / work.seconds)} texts/s  {short(work.tokens / work.seconds)} tokens/s"
            bar.update(work.read, f"{work.texts:,.0f} texts  {rates}  waste {work.waste:.1%}{own}")

        work = encoding.run(peers, show)
    if peers.main:
        _say(work, manifests, peers.count)


def _manifests(embedder: "Embedder", reader: "TextReader", prompt: str) -> dict[AnyPath, "Manifest"]:
    """Returns each folder that is written, and what its vectors are."""
    from jaxembed.model_source import fingerprint
    from jaxembed.storage import stamp
    from jaxembed.vectors.folder import Manifest
    from jaxembed.vectors.quantize import CALIBRATED

    flag, blueprint = flags.FLAGS, embedder.blueprint
    full = embedder.width
    widths = list(map(int, flag.dims)) or [blueprint.truncate_dim or full]
    if max(widths) > full:
        raise UserError(f"--dims={','.join(flag.dims)}: the model's vectors have {full} dimensions")
    if flag.raw and (blueprint.truncate_dim or len(embedder.tokenizers) > 1):
        raise UserError("--raw: a head goes before the model cuts or averages its vectors: this model does either")
    said = Manifest(
        model=flag.model,
        weights=fingerprint(flag.model, blueprint),
        input=flag.input,
        files=tuple((str(file), *stamp(file)) for file in reader.source.files),
        rows=tuple(reader.source.identity),
        field=flag.field,
        id_field=flag.id_field,
        prompt=prompt,
        template=flag.template,
        max_length=blueprint.max_length,
        width=full,
        dtype=flag.precision,
        compute_dtype=flag.dtype,
        normalized=False,
        raw=flag.raw,
        similarity=blueprint.similarity,
        layout=flag.layout,
        shard_size=flag.shard_size,
        calibration=flag.calibration if flag.precision in CALIBRATED else 0,
    )
    manifests = {}
    for width in widths:
        unit = flag.normalize or (blueprint.head.unit and width == full)
        path = path_of(flag.out) / f"dim-{width}" if len(widths) > 1 else path_of(flag.out)
        manifests[path] = dataclasses.replace(said, width=width, normalized=unit)
    return manifests


def _say(work: "Work", manifests: dict[AnyPath, "Manifest"], processes: int) -> None:
    """Prints what was done."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from jaxembed.storage import sizes

    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    for name in ("vectors", "dimensions", "stored as", "MB"):
        table.add_column(name, justify="right")
    for path, manifest in manifests.items():
        megabytes = sum(sizes(path).values()) / 1e6
        table.add_row(f"{work.count:,}", f"{manifest.width:,}", manifest.dtype, f"{megabytes:,.1f}")
    seconds = max(work.seconds, 1e-9)
    rates = {"texts_per_s": work.texts / seconds, "tokens_per_s": work.tokens / seconds}
    where = f" in process 0 of {processes}" if processes > 1 else ""
    kept = f" {work.kept} shards were there already." if work.kept else ""
    Console().print(table)
    print(
        f"{work.texts:,.0f} texts, {work.tokens:,} tokens encoded{where} in {work.seconds:,.1f} s: "
        f"{short(rates['texts_per_s'])} texts/s, {short(rates['tokens_per_s'])} tokens/s, "
        f"padding waste {work.waste:.1%}.{kept}"
    )
    figures = {
        "texts": work.count,
        "encoded": round(work.texts),
        "tokens": work.tokens,
        "seconds": work.seconds,
        **rates,
    }
    print(json.dumps({"model": flags.FLAGS.model, "out": flags.FLAGS.out, **figures, "waste": work.waste}))


def _require_flags() -> None:
    """Refuses at once what needs no look into the files."""
    flag = flags.FLAGS
    for name, wanted in (("model", "a run's folder or an exported one"), ("input", "texts"), ("out", "a folder")):
        if not flag[name].value:
            raise UserError(f"--{name} is missing: name {wanted}")
    if not all(dim.isdecimal() and int(dim) for dim in flag.dims) or len(set(flag.dims)) < len(flag.dims):
        raise UserError(f"--dims={','.join(flag.dims)}: wants whole numbers above 0, each once")
    if flag.prompt is not None and flag["prompt_name"].present:
        raise UserError("--prompt and --prompt_name: give one of both")
    if flag.raw and flag.normalize:
        raise UserError("--raw leaves vectors' lengths alone and --normalize makes them 1: give one of both")
    if flag["calibration"].present and flag.precision not in ("int8", "uint8"):
        raise UserError(f"--calibration is of --precision=int8 and uint8, has {flag.precision}: leave it out")
    check_place(SourceConfig(**parse_spec(flag.input)), "--input")


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_string("input", "", "The texts.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_string("field", "", "Column of the texts; '' = text, with title before it.")
    flags.DEFINE_string("id_field", "", "Column of the ids; '' = _id or id, else the rows' numbers.")
    flags.DEFINE_string("prompt_name", "document", "The model's prompt by name; '' = none.")
    flags.DEFINE_string("prompt", None, "The prompt itself; '' = none.")
    flags.DEFINE_string("template", "", "Put every text into it: prompt_eol, echo, meta_eol, or a text with {text}.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    flags.DEFINE_enum("precision", "float32", DTYPES, "Of the numbers stored.")
    flags.DEFINE_integer("calibration", 10_000, "Texts that ranges are taken from.", lower_bound=2)
    flags.DEFINE_list("dims", [], "Keep the first so many dimensions; several: a folder each.")
    flags.DEFINE_bool("normalize", False, "Bring vectors to length 1, after cutting.")
    flags.DEFINE_bool("raw", False, "Leave the model's own scaling to length 1 out.")
    flags.DEFINE_enum("layout", "npy", LAYOUTS, "Of the shards.")
    flags.DEFINE_integer("shard_size", 32_768, "Texts in a shard, which are sorted by length.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 0, "Texts per device batch; 0 = by tokens.", lower_bound=0)
    flags.DEFINE_integer("fsdp", 1, "Devices of a process that share the weights.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices of a process that share each layer's work.", lower_bound=1)
    cli.run(main, __doc__)
