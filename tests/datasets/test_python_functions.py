"""Functions out of source files: what is kept, what is left out, and that no docstring stays behind."""

import pathlib
import textwrap

import pytest

from jaxembed.datasets.python_functions import first_paragraph, is_source, read_functions

MODULE = '''
import os

def area(width, height=1):
    """Return the area of
    a rectangle.

    Args:
        width: in metres.
    """
    # The sides may have a sign.
    size = abs(width) * abs(height)
    return size

class Shop:
    """A shop of many things, none of which is a function."""

    @property
    def größe(self):
        "Gives the größe of this shop."
        text = """first
  second, indented less"""
        return text

    async def open(self):
        """Open the doors, then wait for customers."""
        def greet():
            """Say hello to a customer."""
            return 1
        if greet():
            return 2

if os.name:
    def conditional(x):
        """Found where a condition allows."""
        x += 1
        return x
'''
LEFT_OUT = {
    "few words": 'def f(x):\n    """Do it."""\n    x += 1\n    return x\n',
    "no docstring": "def f(x):\n    x += 1\n    return x\n",
    "dunder": 'def __len__(self):\n    """Return the number of items."""\n    x = 1\n    return x\n',
    "one statement": 'def f(x):\n    """Return the same thing again."""\n    return x\n',
    "not implemented": 'def f(x):\n    """Return it plus one."""\n    import os\n    raise NotImplementedError\n',
    "on one line": 'def f(x): """Return the same thing again."""; x += 1; return x\n',
    "only fields": 'def f(x):\n    """:param x: the number to be used"""\n    x += 1\n    return x\n',
    "generated": '# This file was automatically generated from x.\ndef f(x):\n    """Return it plus one."""\n'
    "    x += 1\n    return x\n",
    "broken": 'def f(x:\n    """Return it plus one."""\n',
    "nul": 'x = "\0"\n',
    "very long": 'def f(x):\n    """Return it plus one."""\n' + "    x += 1\n" * 1000 + "    return x\n",
}


def functions_of(tmp_path: pathlib.Path, text: str):
    path = tmp_path / "module.py"
    path.write_bytes(text.encode())
    return read_functions(path)


def test_functions_and_methods_without_their_docstrings(tmp_path):
    found = functions_of(tmp_path, MODULE)
    assert [(f.name, f.summary) for f in found] == [
        ("area", "Return the area of a rectangle."),
        ("Shop.größe", "Gives the größe of this shop."),
        ("Shop.open", "Open the doors, then wait for customers."),
        ("conditional", "Found where a condition allows."),
    ]
    area, size, opened, _ = (f.code for f in found)
    assert area == (
        "def area(width, height=1):\n    # The sides may have a sign.\n"
        "    size = abs(width) * abs(height)\n    return size"
    )
    assert size == 'def größe(self):\n    text = """first\nsecond, indented less"""\n    return text'
    assert opened == "async def open(self):\n    def greet():\n        return 1\n    if greet():\n        return 2"


@pytest.mark.parametrize("newline", ["\r\n", "\r", "\n"])
def test_lines_are_counted_as_python_does(tmp_path, newline):
    text = '# \f form feed, \u2028 separator\ndef f(x):\n    """Return it plus one."""\n    x += 1\n    return x\n'
    (function,) = functions_of(tmp_path, text.replace("\n", newline))
    assert function.code == "def f(x):\n    x += 1\n    return x"


@pytest.mark.parametrize("text", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_says_too_little_is_left_out(tmp_path, text):
    assert functions_of(tmp_path, text) == []


def test_missing_and_undecodable_files_are_skipped(tmp_path):
    assert read_functions(tmp_path / "gone.py") == []
    (tmp_path / "latin.py").write_bytes(b'x = "\xe9"\n')
    assert read_functions(tmp_path / "latin.py") == []


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line."),
        ("\n    Two\n    lines.\n\n    More.\n    ", "Two lines."),
        ("Sum up.\n:param x: a number", "Sum up."),
        ("Sum up.\nArgs:\n    x: a number", "Sum up."),
        ("Sum up.\n>>> f(1)\n2", "Sum up."),
        ("x (`int`): a number", ""),
        ("Returns:\n  a number", ""),
    ],
)
def test_first_paragraph(docstring, expected):
    assert first_paragraph(textwrap.dedent(docstring)) == expected


def test_tests_and_other_projects_are_no_source():
    said = {path: is_source(pathlib.PurePosixPath(path)) for path in ("a/b.py", "a/tests/b.py", "a/_vendor/b/c.py")}
    said |= {path: is_source(pathlib.PurePosixPath(path)) for path in ("a/test_b.py", "a/b_test.py", "a/x_pb2.py")}
    assert [path for path, source in said.items() if source] == ["a/b.py"]
