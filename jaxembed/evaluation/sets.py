"""The files of evaluation sets, and whether they are there: answers at once, reads nothing, imports nothing heavy."""

import re

from jaxembed.config import EvalConfig, SourceConfig
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.errors import UserError
from jaxembed.evaluation.lines import find_file
from jaxembed.storage import AnyPath, path_of

_PLAIN = re.compile(r"\.txt(\.gz)?$")


def require_sets(config: EvalConfig, prefix: str) -> None:
    """Refuses sets that are not there.

    Args:
      config: names them.
      prefix: what messages put before a set's field: 'config.eval.' or '--'.

    Raises:
      UserError: a file or folder is missing; names the field.
    """
    for kind, specs in (("pairs", config.pairs), ("texts", config.texts)):
        for spec in specs:
            if kind == "pairs" or not is_plain(spec) or not path_of(spec).is_file():
                check_place(SourceConfig(**parse_spec(spec)), f"{prefix}{kind}")
    checks = {"sts": existing_file, "retrieval": retrieval_files, "classification": classification_files}
    for kind, check in checks.items():
        for spec in getattr(config, kind):
            try:
                check(spec)
            except UserError as error:
                raise type(error)(f"{prefix}{kind}: {error}") from error


def existing_file(spec: str) -> AnyPath:
    """Returns the path of a file.

    Raises:
      UserError: there is none.
    """
    path = path_of(spec)
    if path.is_dir():
        raise UserError(f"{spec} is a folder, wants a file")
    if not path.is_file():
        raise UserError(f"no such file or folder: {spec}")
    return path


def is_plain(spec: str) -> bool:
    """Whether a set of texts is a plain file, a text per line."""
    return _PLAIN.search(spec) is not None


def plain_name(path: AnyPath) -> str:
    """Returns a plain file's name without its endings."""
    return _PLAIN.sub("", path.name)


def retrieval_files(spec: str) -> tuple[AnyPath, AnyPath, AnyPath]:
    """Returns a BEIR folder's corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv, each as it is or as .gz.

    Raises:
      UserError: no such folder, or a file that it lacks.
    """
    folder = path_of(spec)
    if not folder.is_dir():
        raise UserError(f"no such file or folder: {spec} (wants a folder of corpus.jsonl, queries.jsonl and qrels.tsv)")
    corpus, queries = find_file(folder, "corpus.jsonl"), find_file(folder, "queries.jsonl")
    return corpus, queries, find_file(folder, "qrels.tsv", "qrels/test.tsv")


def classification_files(spec: str) -> tuple[AnyPath, AnyPath]:
    """Returns the training and the test file of 'TRAIN:TEST', or of a folder with train.jsonl and test.jsonl (or .gz).

    Raises:
      UserError: `spec` is neither of both, or a file is missing.
    """
    folder = path_of(spec)
    if folder.is_dir():
        return find_file(folder, "train.jsonl"), find_file(folder, "test.jsonl")
    files = re.split(r":(?!//)", spec, maxsplit=1)  # not at the ':' of s3://
    if len(files) < 2:
        raise UserError(
            f"no such file or folder: {spec} (wants TRAIN_FILE:TEST_FILE, or a folder of train.jsonl and test.jsonl)"
        )
    return existing_file(files[0]), existing_file(files[1])
