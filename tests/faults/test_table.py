"""The table of README.md is true: every row is there, every test it names exists, and no file of tests is left out."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {int(n): line for n, line in re.findall(r"^\| (\d+) (\|.*)$", (HERE / "README.md").read_text(), re.M)}
LINK = re.compile(r"\[`(\w+)`\]\(([\w./]+)\)")
NAMED = [(row, name, file) for row, line in ROWS.items() for name, file in LINK.findall(line)]
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path != Path(__file__))


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_is_there_with_a_test_or_the_reason_why_not():
    assert sorted(ROWS) == list(range(1, 52))
    without = set(ROWS) - {row for row, *_ in NAMED}
    assert without == {20} and all("**not covered**: " in ROWS[row] for row in without)


def test_named_tests_exist():
    assert [(row, name) for row, name, file in NAMED if name not in functions_of(HERE / file)] == []


def test_a_test_is_named_after_a_row_whose_line_names_its_file():
    for file in FILES:
        for name in functions_of(HERE / file):
            if name.startswith("test_"):
                assert f"({file})" in ROWS[int(name[5:7])], name
