"""The Python packages that are installed here, with what their metadata says of their licences."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator

# Licences that let anyone redistribute the code, as metadata names them: SPDX identifiers, trove classifiers, and
# customary wordings of the free text.
PERMISSIVE = frozenset(
    {
        *("0BSD", "AFL-2.1", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CNRI-Python", "ISC", "MIT"),
        *("MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
        *("Apache Software License", "BSD License", "MIT License", "Python Software Foundation License"),
        *("Apache 2.0", "Apache 2.0 License", "Apache License 2.0", "Apache License Version 2.0"),
        "3-Clause BSD License",
    }
)
STANDARD_LIBRARY = "python"
_STANDARD_LIBRARY_LICENCE = "PSF-2.0"  # https://docs.python.org/3/license.html
_FULL_TEXT = 500  # characters from which the metadata's free text is the licence itself, which begins with its name


@dataclasses.dataclass(frozen=True)
class Package:
    """A package and where its source files lie.

    Attributes:
      name: as its metadata says, or 'python' for the standard library.
      version: likewise.
      licence: likewise.
      root: the folder that module names count from.
      list_files: gives the names of the files below `root` that belong to the package.
    """

    name: str
    version: str
    licence: str
    root: pathlib.Path
    list_files: Callable[[], Iterable[str]]

    def source_files(self) -> list[pathlib.PurePosixPath]:
        """Returns the Python files, relative to `root`, sorted. One of them may be gone meanwhile."""
        paths = {pathlib.PurePosixPath(name) for name in self.list_files() if name.endswith(".py")}
        return sorted(path for path in paths if ".." not in path.parts)


def standard_library() -> Package:
    """Returns the standard library of the Python that runs."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    return Package(STANDARD_LIBRARY, platform.python_version(), _STANDARD_LIBRARY_LICENCE, root, lambda: _below(root))


def permissive(names: Iterable[str]) -> list[Package]:
    """Returns the installed packages among `names` whose metadata names none but permissive licences."""
    packages = []
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        licence = licence_of(distribution.metadata)
        if is_permissive(licence):
            root = pathlib.Path(str(distribution.locate_file("")))
            packages.append(Package(distribution.name, distribution.version, licence, root, _files_of(distribution)))
    return packages


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """Returns the licence in the metadata's own words, '' where it says nothing.

    The SPDX expression comes first, then the classifiers joined by AND, then the first words of the free text.
    """
    if expression := " AND ".join(metadata.get_all("License-Expression") or []):
        return expression
    trove = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    if named := [name for name in trove if name != "OSI Approved"]:
        return " AND ".join(named)
    text = " ".join(" ".join(metadata.get_all("License") or []).split())
    if len(text) < _FULL_TEXT:
        return text
    return next((name for name in sorted(PERMISSIVE, key=len, reverse=True) if text.startswith(name)), text[:80])


def is_permissive(licence: str) -> bool:
    """Says whether every licence in an expression is permissive; where there is a choice, the others must be, too."""
    return all(name.strip(" ()") in PERMISSIVE for name in re.split(r"\s(?:AND|OR)\s", licence))


def _files_of(distribution: importlib.metadata.Distribution) -> Callable[[], Iterable[str]]:
    return lambda: (file.as_posix() for file in distribution.files or ())


def _below(root: pathlib.Path) -> Iterator[str]:
    """Yields the files below a folder that do not belong to packages installed there."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        yield from (pathlib.Path(folder, name).relative_to(root).as_posix() for name in files)
