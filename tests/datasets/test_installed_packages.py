"""Licences as metadata states them, and which of them count as permissive."""

import email

import pytest

from jaxembed.datasets.installed_packages import is_permissive, licence_of, permissive, standard_library

APACHE = "License: Apache License\n" + "        Version 2.0, January 2004\n" * 30


@pytest.mark.parametrize(
    ("metadata", "licence", "allowed"),
    [
        ("License-Expression: MIT\nLicense: GPL", "MIT", True),
        ("License-Expression: BSD-3-Clause AND (MIT OR Zlib)", "BSD-3-Clause AND (MIT OR Zlib)", True),
        ("License-Expression: MIT OR GPL-3.0-only", "MIT OR GPL-3.0-only", False),
        ("License-Expression: Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception", False),
        ("Classifier: License :: OSI Approved :: BSD License\nClassifier: Topic :: X", "BSD License", True),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
            "MIT License AND Mozilla Public License 2.0 (MPL 2.0)",
            False,
        ),
        ("Classifier: License :: OSI Approved\nLicense: Apache 2.0", "Apache 2.0", True),
        ("License: MPL-2.0 AND MIT", "MPL-2.0 AND MIT", False),
        (APACHE, "Apache License Version 2.0", True),
        ("License: " + "Only for friends of the author. " * 30, "Only for friends of the author. " * 2, False),
        ("Name: nothing", "", False),
    ],
)
def test_licences(metadata, licence, allowed):
    found = licence_of(email.message_from_string(metadata))
    assert found[: len(licence)] == licence if licence else found == ""
    assert is_permissive(found) == allowed


def test_only_installed_and_permissive_packages():
    found = {package.name: package for package in permissive(["numpy", "certifi", "no-such-package-here"])}
    assert list(found) == ["numpy"]  # certifi is MPL
    files = found["numpy"].source_files()
    assert (found["numpy"].root / "numpy" / "__init__.py").is_file()
    assert len(files) > 100 and files == sorted(files) and all(path.suffix == ".py" for path in files)


def test_standard_library_without_what_is_installed_into_it():
    files = [str(path) for path in standard_library().source_files()]
    assert "heapq.py" in files and "xml/etree/ElementTree.py" in files
    assert not [path for path in files if "site-packages" in path]
