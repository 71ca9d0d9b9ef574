"""Code search out of what is installed: a docstring's first paragraph → the function without its docstring.

    tfds.builder("py_docstrings").download_and_prepare(file_format="array_record")

Real pairs on any machine, with no download: the source files of the Python standard library and of permissively
licensed packages that training needs anyway. Whole files are held out. Which functions are left out, `python_functions`
says; tests, generated files and copies of other projects are. The function's own name stays in its code, and its words
are often the docstring's, which makes lexical search strong here.
"""

import contextlib
import dataclasses
import gc
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import tensorflow_datasets as tfds

from jaxembed.datasets.installed_packages import Package, permissive, standard_library
from jaxembed.datasets.python_functions import is_source, read_functions

# What requirements.txt brings, so that one environment has the same pairs as another. Each is taken only where its
# metadata names a permissive licence.
PACKAGES = (
    *("absl-py", "aiofiles", "anyio", "array_record", "attrs", "bm25s", "charset-normalizer", "click", "cloudpickle"),
    *("contourpy", "cycler", "dm-tree", "docstring_parser", "etils", "filelock", "flax", "fonttools", "fsspec"),
    *("grain", "h11", "httpcore2", "httpx2", "huggingface_hub", "humanize", "idna", "immutabledict", "jax", "jaxlib"),
    *("markdown-it-py", "matplotlib", "ml_collections", "msgpack", "numpy", "opt_einsum", "optax"),
    *("orbax-checkpoint", "packaging", "pillow", "portpicker", "prometheus_client", "promise", "protobuf", "psutil"),
    *("pyarrow", "pydantic", "Pygments", "pyparsing", "python-dateutil", "PyYAML", "requests", "rich", "safetensors"),
    *("scipy", "shellingham", "simple-parsing", "simplejson", "six", "tensorboardX", "tensorflow-datasets"),
    *("tensorflow-metadata", "termcolor", "tokenizers", "transformers", "treescope", "truststore", "typer"),
    *("typing_extensions", "typing-inspection", "urllib3", "wrapt"),
)
MOST_OF_A_PACKAGE = 4_000  # pairs
HELD_OUT = {"validation": 5, "test": 5}  # per cent of the files
TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Example:
    """A pair, as it is stored.

    Attributes:
      id: 'package.module.Class.method'.
      query: the docstring's first paragraph.
      positive: the function without its docstring.
      group: the query's words, without case, digits and punctuation: rows of one group say the same.
      package: 'name version'.
      licence: the package's, in the words of its metadata.
    """

    id: str
    query: str
    positive: str
    group: str
    package: str
    licence: str


@dataclasses.dataclass(eq=False)
class PyDocstringsConfig(tfds.core.BuilderConfig):
    """Which packages are read."""

    packages: Sequence[Package] = ()


def installed() -> PyDocstringsConfig:
    """Returns the config of what is installed here; its name changes with any version."""
    packages = [standard_library(), *permissive(PACKAGES)]
    versions = "\n".join(f"{package.name} {package.version}" for package in packages)
    name = f"installed_{hashlib.sha256(versions.encode()).hexdigest()[:8]}"
    return PyDocstringsConfig(name=name, description=versions.replace("\n", ", "), packages=packages)


class PyDocstrings(tfds.core.GeneratorBasedBuilder):
    """The tfds builder. Prepared anew when other versions are installed, as its config is then another."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (installed(),)
    # Where tfds would look for checksums of downloads; to find it itself, tfds 4.9.10 wants a package that it neither
    # requires nor installs on a current Python (importlib_resources).
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        packages = self.builder_config.packages
        sources = "\n".join(f"{package.name} {package.version}: {package.licence}" for package in packages)
        licences = "; ".join(sorted({package.licence for package in packages}))
        return tfds.core.DatasetInfo(  # `dataset_info_from_configs` looks for files that we have no use for
            builder=self,
            description=f"{__doc__}\nThe packages, and their licences in the words of their metadata:\n{sources}",
            features=tfds.features.FeaturesDict(
                {field.name: tfds.features.Text() for field in dataclasses.fields(Example)}
            ),
            license=f"permissive, each package's own: {licences}",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager  # nothing to download
        from rich.progress import track

        files = track(list(list_files(self.builder_config.packages)), "reading the installed packages", transient=True)
        with _no_garbage_collection():
            splits = collect(files)
        return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[str, dict[str, str]]]:
        for example in examples:
            yield example.id, dataclasses.asdict(example)


def list_files(packages: Iterable[Package]) -> Iterator[tuple[Package, str]]:
    """Yields each package's source files, in an order in which those of one folder are not together."""
    for package in packages:
        names = [str(path) for path in package.source_files() if is_source(path)]
        yield from ((package, name) for name in sorted(names, key=_number))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles: looking for some would take a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def collect(files: Iterable[tuple[Package, str]]) -> dict[str, list[Example]]:
    """Reads the functions of the files and deals them to the splits.

    A query or a code that occurred before is left out, as are pairs of a package that gave `MOST_OF_A_PACKAGE`, and
    held-out pairs whose query says the same as one in training.

    Args:
      files: package and file, relative to the package's root.

    Returns:
      The examples of 'train', 'validation' and 'test'.
    """
    splits: dict[str, list[Example]] = {TRAIN: [], **{split: [] for split in HELD_OUT}}
    seen: set[str] = set()
    taken: dict[str, int] = {}
    for package, file in files:
        if taken.get(package.name, 0) >= MOST_OF_A_PACKAGE:
            continue
        for function in read_functions(package.root / file):
            name = f"{_module(file)}.{function.name}"
            if not seen.isdisjoint((name, function.summary, function.code)):
                continue
            seen.update((name, function.summary, function.code))
            taken[package.name] = taken.get(package.name, 0) + 1
            group = " ".join(re.findall(r"[^\W\d_]+", function.summary.lower()))
            said_of_package = (f"{package.name} {package.version}", package.licence)
            splits[_split(file)].append(Example(name, function.summary, function.code, group, *said_of_package))
    trained = {example.group for example in splits[TRAIN]}
    for split in HELD_OUT:
        splits[split] = [example for example in splits[split] if example.group not in trained]
    return splits


def _split(file: str) -> str:
    """Deals whole files, by a hash of their names."""
    place = _number(f"split of {file}") % 100
    for split, per_cent in HELD_OUT.items():
        if place < per_cent:
            return split
        place -= per_cent
    return TRAIN


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
