"""The pages that are made from the code say what the code says."""

import pathlib
import re

import pytest

from docs.make_config import PAGE, page

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_page_of_the_config_is_up_to_date():
    assert PAGE.read_text() == page(), "run: make docs"


def test_every_field_has_a_meaning():
    rows = [re.split(r"(?<!\\)\|", line) for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert not [row[1] for row in rows if not row[4].strip()]


@pytest.mark.parametrize("name", ["README.md", "docs/coming_from.md"])
def test_the_fields_that_a_page_names_exist(name):
    """What stands in backticks and begins like a field, is one; '.name' goes on from the field before it."""
    text = (ROOT / name).read_text()
    known = {row.split("`")[1].replace("[i]", "[0]") for row in page().splitlines() if row.startswith("| `")}
    groups = {field.split(".")[0].split("[")[0] for field in known if "." in field}
    wrong = []
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) + re.findall(r"--config\.([\w.\[\]]+)", text):
        code = code.removeprefix("--config.")
        field = re.match(r"[a-z_]+(\[\w\])?(\.[a-z_]+(\[\w\])?)+", code)
        if field and field[0].split(".")[0] in groups and not code[field.end() :].startswith("("):
            path = re.sub(r"\[\w\]", "[0]", field[0])
            if path not in known and not any(other.startswith((f"{path}.", f"{path}[")) for other in known):
                wrong.append(code)
    assert not wrong
