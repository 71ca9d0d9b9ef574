"""Documented functions, out of Python source files."""

import ast
import dataclasses
import inspect
import pathlib
import re
import warnings
from collections.abc import Iterator

MIN_WORDS, MAX_QUERY = 3, 600  # of a docstring's first paragraph: words of letters, characters
MIN_STATEMENTS, MAX_CODE = 2, 6_000  # of a function without its docstring: statements, characters

_SKIPPED_FOLDERS = frozenset(
    {
        *("test", "tests", "testing", "_testing", "idle_test", "dummy_data", "__pycache__"),
        *("vendor", "_vendor", "vendored", "third_party", "extern", "external", "_external", "externals"),
    }
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_tests?|conftest|setup|.*_pb2(_grpc)?")
_GENERATED = re.compile(r"(auto[- ]?|automatically )generated|generated (by|from)|do not (edit|modify)", re.IGNORECASE)
_HEAD = 2_000  # characters at the top of a file where generated ones say so
# Where the prose of a first paragraph ends: fields, sections and examples that follow without an empty line.
_END_OF_PROSE = re.compile(
    r"\s*([:@]\w+|>>>|\.\. |[-=~]{3}|\w+ ?\(`|(args|arguments|parameters|returns?|raises|yields|examples?):?\s*$)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function or method.

    Attributes:
      name: its name within the module, such as 'Class.method'.
      summary: the docstring's first paragraph on one line.
      code: from `def` on, without docstrings and decorators, dedented; the comments stay.
    """

    name: str
    summary: str
    code: str


def is_source(path: pathlib.PurePosixPath) -> bool:
    """Says whether a file, named relative to its package's root, is neither a test nor another project's."""
    return not (_SKIPPED_FOLDERS.intersection(path.parts) or _SKIPPED_FILE.fullmatch(path.stem))


def read_functions(path: pathlib.Path) -> list[Function]:
    """Returns the functions of a file that say enough to be looked for; none where the file cannot be read.

    Left out are dunder methods, functions in functions, generated files, and functions whose summary or body is
    shorter or longer than the limits above.
    """
    try:
        text = path.read_bytes().decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler says of other people's code
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    if _GENERATED.search(text[:_HEAD]):
        return []
    # The lines that `ast` counts: `splitlines` would also split at form feeds and other separators.
    lines = re.split(r"\r\n|\r|\n", text)
    return [function for name, node in _definitions(tree, "") if (function := _function(name, node, lines))]


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yields functions and methods, not those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, prefix)


def _function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or node.name.startswith("__") or not _does_something(node.body[1:]):
        return None
    summary = first_paragraph(docstring)
    if len(_WORD.findall(summary)) < MIN_WORDS or len(summary) > MAX_QUERY:
        return None
    code = _code(node, lines)
    return Function(name, summary, code) if code and len(code) <= MAX_CODE else None


def first_paragraph(docstring: str) -> str:
    """Returns the first paragraph of prose, its whitespace joined."""
    taken: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.strip() or _END_OF_PROSE.match(line):
            break
        taken.append(line)
    return " ".join(" ".join(taken).split())


def _does_something(body: list[ast.stmt]) -> bool:
    """Says whether there are two statements, or one with others in it, that are more than ways to do nothing."""
    idle = (ast.Pass, ast.Raise, ast.Import, ast.ImportFrom, ast.Global)
    enough = len(body) >= MIN_STATEMENTS or any(hasattr(statement, "body") for statement in body)
    return enough and not all(isinstance(statement, idle) for statement in body)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Returns the function's lines without docstrings, its own or those in it; '' where they share lines with code."""
    drop: set[int] = set()
    for owner in [node, *_inner_definitions(node)]:
        first = owner.body[0]
        if ast.get_docstring(owner, clean=False) is None:
            continue
        before = lines[first.lineno - 1].encode()[: first.col_offset]  # ast counts bytes
        after = lines[first.end_lineno - 1].encode()[first.end_col_offset :]
        if before.strip() or after.strip() or len(owner.body) == 1:
            return ""
        drop.update(range(first.lineno, first.end_lineno + 1))
    kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in drop]
    return "\n".join(_dedent(line, node.col_offset) for line in kept)


def _inner_definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields the functions and classes within statements; expressions, most of a tree, are not looked into."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, field, ())
        for child in inner if isinstance(inner, list) else ():
            if isinstance(child, _DEFINITIONS):
                yield child
            yield from _inner_definitions(child)


def _dedent(line: str, margin: int) -> str:
    """Takes `margin` blanks off; the lines of a string in several lines may have fewer."""
    blanks = len(line) - len(line.lstrip())
    return line[min(margin, blanks) :].rstrip()
