"""The house's rules: who may import whom, and that the loop does not know which method it runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {  # each imports only what is named: scripts > methods > networks, dataloaders > utils
    "utils": {"utils"},
    "networks": {"networks", "utils"},
    "dataloaders": {"dataloaders", "utils"},
    "methods": {"methods", "networks", "utils"},
    "scripts": {"methods", "networks", "dataloaders", "utils"},
}
OURS = {"utils", "networks", "dataloaders", "methods", "train_dtml", "test_la"}


def modules() -> list[tuple[str, Path]]:
    found = [("scripts", path) for path in sorted(ROOT.glob("*.py"))]
    return found + [(floor, path) for floor in FLOORS for path in sorted((ROOT / floor).glob("*.py"))]


@pytest.mark.parametrize(("floor", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_a_module_imports_only_what_is_below_it(floor, path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= FLOORS[floor]


def test_the_training_script_names_no_method():
    """Outside its docstring, its help texts and the default of --method."""
    from methods import METHODS

    code = (ROOT / "train_dtml.py").read_text()
    code = code.replace(ast.get_docstring(ast.parse(code), clean=False) or "", "")
    body = code[code.index("def read_options") :]
    for name, kind in METHODS.items():
        assert not re.search(rf"\b{kind.__name__}\b|[\"']{name}[\"']", body), name


def test_the_base_of_the_methods_stays_small():
    assert len((ROOT / "methods" / "base.py").read_text().splitlines()) < 120


@pytest.mark.parametrize(("floor", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_public_functions_and_classes_have_docstrings(floor, path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node) or node.name in ("Options",), f"{path.name}: {node.name}"
