"""The pages of docs/: the code of the worked example runs, every flag exists, and every stated default is one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_set

import settings
from methods import METHODS
from tools import command_line
from utils.errors import UserError
from utils.options import Parser

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
OURS = ["methods", "networks", "dataloaders", "utils", "losses", "evaluation", "tools", "tests", "docs", "results",
        "benchmarks", "data", ".ci"]  # fmt: skip
ADDING, DIFFERENCES = PAGES["adding-a-method.md"], PAGES["differences.md"]


def test_links_lead_somewhere_and_the_readme_leads_here():
    readme = ROOT / "README.md"
    for page in (readme, *(ROOT / "docs" / name for name in PAGES)):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), (page, target)
        assert page == readme or f"](docs/{page.name})" in readme.read_text(encoding="utf-8"), page


# -- what differs from the papers --


def sections() -> dict[str, str]:
    """Method -> its section; '' -> what all share."""
    result = {}
    for part in re.split(r"^## ", DIFFERENCES, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        name = re.search(r"\(`([\w-]+)`\)$", title)
        result[name[1] if name else ""] = part
    return result


def flags_in(text: str) -> list[str]:
    """What stands in code type and begins with a flag."""
    return [code for code in re.findall(r"`([^`]+)`", text) if code.startswith("--")]


def parsed(method: str, args: str) -> dict:
    """Option -> value of a flag as written; {} if it stands there without its value."""
    parser = Parser()
    parser.add_dataclass(settings.Options)
    parser.add_dataclass(METHODS[method].Options)
    try:
        return parser.parse(shlex.split(args))
    except UserError as e:
        if "expected" in str(e) and " " not in args:
            return {}
        raise


def default(method: str, name: str):
    """The value of an option of the method or of the script when nothing is given."""
    settled = command_line.resolve({"data": "set", "method": method}, METHODS[method])
    return next(getattr(options, name) for options in settled if hasattr(options, name))


@pytest.mark.parametrize("method", ["", *METHODS])
def test_flags_are_the_methods_and_defaults_are_defaults(method):
    assert set(sections()) == {"", *METHODS}
    text, name, here = sections()[method], method or "ua-mt", 0
    assert all(isinstance(parsed(name, args), dict) for args in flags_in(text))
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 3 and {len(row) for row in rows} == {5}
    for row in rows[1:]:
        for args in flags_in(row[3]):
            for option, value in parsed(name, args).items():
                here += 1
                assert value == default(name, option), args
        for args in flags_in(row[4]):
            for option, value in parsed(name, args).items():
                assert value != default(name, option), args
    assert here >= 2


# -- adding a method --


def code_after(place: str, language: str = "python") -> str:
    """The first block of code after these words of the page."""
    return re.search(rf"```{language}\n(.*?)```", ADDING[ADDING.index(place) :], re.S)[1]


def put(path: Path, after: str, lines: str) -> None:
    """Adds lines after the first line that ends so."""
    text = path.read_text(encoding="utf-8")
    assert after in text
    path.write_text(text.replace(after, after + "\n" + lines.rstrip(), 1), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, without the records, and with what the page adds, block by block."""
    folder = tmp_path_factory.mktemp("copy") / "code"
    others = shutil.ignore_patterns("__pycache__", ".git", "runs", "la", "phantom-*", ".*_cache", "*-seed*")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in OURS:
            shutil.copytree(path, folder / path.name, ignore=others)
        elif path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".cff"):
            shutil.copy(path, folder)
    (folder / "methods" / "entropy_minimisation.py").write_text(code_after("## 2. The file"), encoding="utf-8")
    table = "METHODS: dict[str, type[Method]] = {  # by the names of --method"
    put(folder / "methods" / "__init__.py", "from methods.dtml_plus import DTMLPlus", code_after("## 3. The import"))
    put(folder / "methods" / "__init__.py", table, code_after("and the line of `METHODS`"))
    put(folder / "docs" / "differences.md", DIFFERENCES.rstrip(), "\n" + code_after("## 5. Presets", "markdown"))
    losses = "| tag | method | healthy | trouble |\n|---|---|---|---|"
    put(folder / "docs" / "curves.md", losses, code_after("In [curves.md]", "markdown"))
    put(folder / "tests" / "changing_flags.py", "\nOWN_FLAGS = {", code_after("In `OWN_FLAGS`"))
    put(folder / "tests" / "test_methods.py", "\nUNSUPERVISED = {", code_after("in `UNSUPERVISED`"))
    put(folder / "tools" / "grid.py", "\nLA_RUNS = {", code_after("In `LA_RUNS`"))
    put(folder / "tools" / "grid.py", '    "3": ("Table 3: methods", [', code_after("and in table 3"))
    put(folder / "tools" / "grid.py", "\nRECENT = {", code_after("In `RECENT`"))
    heads = "| what the unlabeled crops learn from | tested |\n|---|---|---|---|---|---|"
    put(folder / "docs" / "methods.md", heads, code_after("In the first table of [methods.md]", "markdown"))
    return folder


def shell(copy: Path, block: str) -> None:
    """Runs a block of commands of the page in the copy."""
    env = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-e", "-c", block], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(copy: Path, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *args], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


IN_TURN = """
import importlib, json, sys
for name, argv in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name).main(argv)
    except SystemExit as end:  # of --help
        assert not end.code
"""


def test_the_worked_example_trains_resumes_is_tested_and_is_in_the_grid(copy):
    """One process for all programs, as each would take seconds to start."""
    flags = ["--method", "entropy", "--data", str(make_set(copy / "set")), *TINY, "--iterations", "3", "--name", "run"]
    programs = [
        ("train_dtml", [*flags, "--log-every", "1", "--picture-every", "3"]),
        ("train_dtml", [*flags, "--resume", "auto"]),
        ("test_la", ["--checkpoint", "runs/run"]),
        ("train_dtml", ["--method", "entropy", "--help"]),
        ("tools.reproduce", ["--list", "--rows", "entropy"]),
    ]
    text = python(copy, "-c", IN_TURN, json.dumps(programs))
    assert "lambda" in text and "already done: 3 of 3" in text and (copy / "runs/run/pictures").is_dir()
    assert "| seg | largest |" in text and "largest weight of the entropy" in text
    assert "--method entropy --labeled 16" in text and "missing" in text


@pytest.mark.slow
def test_the_worked_example_is_taken_in_by_the_tests_and_passes_them(copy):
    """The page to its end, the losses and the tables that it has written included; then the tests of its own and those
    that go through all methods or rows at once."""
    for place in ("## 6. The tests", "The tables in `results/`"):
        shell(copy, code_after(place, "bash"))
    others = {p.parent.name for p in ROOT.glob("results/*/tables.md") if "UniMatch" in p.read_text(encoding="utf-8")}
    assert others == set(re.search(r"for name in (.*?);", ADDING)[1].split())  # the tables with the methods of RECENT
    assert "Entropy minimisation" in (copy / "results" / "half" / "tables.md").read_text(encoding="utf-8")
    python(copy, "-m", "ruff", "check", ".")
    python(copy, "-m", "ruff", "format", "--check", ".")
    at_once = "every_method_that or every_method_whose or every_flag or the_stored"
    named = " or ".join(METHODS)  # their own tests pass here as they do there
    chosen = f"(entropy or {at_once}) and not (worked or {named})"
    names = ("methods", "batch_norm", "flags", "help", "unused_flags", "golden", "precision", "docs")
    files = [*(f"tests/test_{name}.py" for name in names), "tests/faults/test_stop_and_resume.py"]
    result = python(copy, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert int(re.search(r"(\d+) passed", result)[1]) >= 15, result
