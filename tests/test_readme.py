"""The commands of the README and the pages parse, links and names exist, and set-up is what CI and users run."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import predict
import test_la
from tools import check, command_line, pictures, reproduce, share
from utils.checkpoint import load_checkpoint
from utils.options import Parser, fill

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLLOWED = ("adding-a-method.md", "own-data.md", "recipes.md")  # to the letter, in tests of their own
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {ROOT / "README.md": README, **{path: text for path, text in PAGES.items() if path.name not in FOLLOWED}}
COMMANDS = list(
    dict.fromkeys(
        line.split(" #")[0].strip()
        for text in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.splitlines()
    )
)
TRAINING = [c for c in COMMANDS if c.startswith("python train_dtml.py") and "--from-diagnostic" not in c]


def test_training_commands_parse_and_name_their_own_folders(monkeypatch, tmp_path):
    """The first command of all tests the folder that it trains."""
    monkeypatch.chdir(tmp_path)
    first = next(c for c in COMMANDS if "requirements.txt" in c).split("&&")
    tested = shlex.split(first[-1])
    assert first[-2].strip() == "python train_dtml.py --data data/phantom" and tested[:2] == ["python", "test_la.py"]
    assert Path(tested[tested.index("--checkpoint") + 1]) == command_line.read_options(["--data", "data/phantom"])[2]
    (tmp_path / "data" / "la").mkdir(parents=True)
    folders = set()
    for command in TRAINING:
        options, _, folder, state = command_line.read_options(shlex.split(command)[2:])
        assert state is None and folder.parts[:1] == ("runs",) and f"seed{options.seed}" in folder.name, command
        folders.add(folder)
    assert len(folders) == len(TRAINING) >= 6


OTHERS = {  # start of a command: what its words are, before the flags
    "python test_la.py": (test_la.Options, {}),
    "python -m tools.pictures": (
        pictures.Options,
        {"figure": {"choices": list(pictures.FIGURES)}, "runs": {"nargs": "+"}},
    ),
    "python -m tools.share": (share.Options, {"folders": {"nargs": 2}}),
    "python -m tools.reproduce": (reproduce.Options, {}),
    "python -m tools.check": (check.Options, {"folder": {}}),
}


@pytest.mark.parametrize("start", OTHERS)
def test_other_commands_parse(start):
    options, positional = OTHERS[start]
    parser = Parser()
    for name, how in positional.items():
        parser.add_argument(name, **how)
    parser.add_dataclass(options)
    commands = [c for c in COMMANDS if c.startswith(start)]
    parsed = [parser.parse(shlex.split(c)[len(start.split()) :]) for c in commands]
    assert all(parsed) and commands
    if options is reproduce.Options:  # each names runs of the grid
        assert all(reproduce.select(fill(reproduce.Options, words))[0] for words in parsed)


def test_predicting_commands_parse_and_their_weights_are_there():
    parser = Parser()
    parser.add_dataclass(predict.Options)
    lines = [shlex.split(c)[2:] for c in COMMANDS if c.startswith("python predict.py")]
    found = [parser.parse([word for word in line if not word.endswith(".nrrd")]) for line in lines]
    shared = [ROOT / run for words in found for run in words["checkpoint"] if run.startswith("results/")]
    assert shared and all(load_checkpoint(run)["iteration"] == 2400 for run in shared)


def test_the_example_in_python_runs():
    """Ten lines of code; what they leave is a step of training and a prediction."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    left: dict = {}
    exec(code, left)  # of this repository's own page
    assert sum(bool(line) for line in code.splitlines()) <= 10 and set(left["losses"].terms) >= {"seg", "mask"}
    assert left["p"].shape == (4, 1, 32, 32, 16) and 0 <= left["p"].min() <= left["p"].max() <= 1


def steps_of(target: str) -> str:
    """What make would run in an empty environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ["make", "-n", target, "VENV=no-such-folder"]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_runs_the_plain_commands_and_ci_runs_make():
    first, second = (
        next(c for c in COMMANDS if f"-r {name}" in c) for name in ("requirements.txt", "requirements-dev.txt")
    )
    for command, target in ((first, "demo"), (second, "test")):
        steps = steps_of(target).replace(" --quiet", "")
        for step in map(str.strip, command.split("&&")):
            words = step.split()
            assert step.startswith((". ", "python3 -m venv")) or " ".join(words[1:]) in steps, step
    assert "make test" in COMMANDS and "\nmake test VENV=" in (ROOT / ".ci" / "run").read_text()
    assert {f"make {target}" for target in ("demo", "test")} <= set(COMMANDS)


def test_links_lead_somewhere_and_equations_name_functions():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert [link for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose) if not (ROOT / link).exists()] == []
    functions = re.findall(r"\[`([\w.]+)`\]\((\w+/\w+\.py)\)", prose)
    assert len(functions) >= 4
    for name, file in functions:
        assert f"def {name.split('.')[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), name


RELIABILITY = ROOT / "docs" / "reliability.md"
PROMISES = re.findall(r"^(\d)\. .*: \[`(\w+)`\]\(([\w/.]+)\)\.$", PAGES[RELIABILITY], re.MULTILINE)


def test_the_nine_promises_name_tests_that_are_there():
    assert [number for number, *_ in PROMISES] == [str(n) for n in range(1, 10)]
    for _, name, file in PROMISES:
        assert f"\ndef {name}(" in (RELIABILITY.parent / file).read_text(), name
