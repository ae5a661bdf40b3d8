"""The house's rules: who may import whom, and that the loop does not know which method it runs."""

import ast
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

from tests.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {  # each imports only what is named
    "utils": {"utils"},
    "losses": {"losses", "utils"},
    "networks": {"networks", "utils"},
    "evaluation": {"evaluation", "utils"},
    "dataloaders": {"dataloaders", "losses", "utils"},
    "methods": {"methods", "networks", "losses", "utils"},
    "tools": {"tools", "methods", "networks", "losses", "evaluation", "dataloaders", "utils", "settings"},
    "scripts": {"tools", "methods", "networks", "losses", "evaluation", "dataloaders", "utils", "settings"},
}
OURS = {*FLOORS, "settings", "train_dtml", "test_la", "predict"}


def modules() -> list[tuple[str, Path]]:
    result = [("scripts", path) for path in sorted(ROOT.glob("*.py"))]
    for floor in FLOORS:
        for path in sorted((ROOT / floor).glob("*.py")):
            result.append((floor, path))
    return result


def test_a_module_imports_only_what_is_below_it():
    for floor, path in modules():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
        assert imported & OURS <= FLOORS[floor], path.name
        assert "h5py" not in imported or floor in ("dataloaders", "tools"), f"{path.name} may open a case"


def test_no_module_imports_itself_through_others():
    graph = {}
    for _, path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[name] = {node.module for node in imports} | {f"{x.module}.{a.name}" for x in imports for a in x.names}
    TopologicalSorter({name: result & graph.keys() - {name} for name, result in graph.items()}).prepare()


def test_the_training_script_names_no_method():
    """Outside its docstring, its help texts and the default of --method."""
    from methods import METHODS

    code = (ROOT / "train_dtml.py").read_text()
    code = code.replace(ast.get_docstring(ast.parse(code), clean=False) or "", "")
    for name, kind in METHODS.items():
        assert not re.search(rf"\b{kind.__name__}\b|[\"']{name}[\"']", code), name


def test_every_mutation_finds_its_text():
    """Otherwise tests/mutations.py would count a fault that it never makes."""
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.name
        assert mutation.new != mutation.old and all(
            (ROOT / word).is_file() for word in shlex.split(mutation.tests) if word.endswith(".py")
        ), mutation.name
