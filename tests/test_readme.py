"""The commands of the README and the pages parse, links and names exist."""

import re
import shlex
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
        options, _, folder, state, _ = command_line.read_options(shlex.split(command)[2:])
        assert state is None and folder.parts[:1] == ("runs",) and f"seed{options.seed}" in folder.name, command
        folders.add(folder)
    assert len(folders) == len(TRAINING) >= 6


OTHERS = {  # start of a command: what its words are, before the flags
    "python test_la.py": (test_la.Options, {}),
    "python -m tools.pictures": (pictures.Options, {}),
    "python -m tools.share": (share.Options, {}),
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
        assert all(reproduce.select(fill(reproduce.Options, args))[0] for args in parsed)


def test_predicting_commands_parse_and_their_weights_are_there():
    parser = Parser()
    parser.add_dataclass(predict.Options)
    lines = [shlex.split(c)[2:] for c in COMMANDS if c.startswith("python predict.py")]
    result = [parser.parse([word for word in line if not word.endswith(".nrrd")]) for line in lines]
    shared = [ROOT / run for args in result for run in args["checkpoint"] if run.startswith("results/")]
    assert shared and all(load_checkpoint(run)["iteration"] == 2400 for run in shared)


def test_the_example_in_python_runs():
    """Ten lines of code; what they leave is a step of training and a prediction."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    left: dict = {}
    exec(code, left)  # of this repository's own page
    assert sum(bool(line) for line in code.splitlines()) <= 10 and set(left["losses"].terms) >= {"seg", "mask"}
    assert left["p"].shape == (4, 1, 32, 32, 16) and 0 <= left["p"].min() <= left["p"].max() <= 1


def test_equations_name_functions():
    functions = re.findall(r"\[`([\w.]+)`\]\((\w+/\w+\.py)\)", README)
    assert len(functions) >= 4
    for name, file in functions:
        assert f"def {name.split('.')[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", ["docs/reliability.md", "tests/faults/README.md"])
def test_named_tests_are_there(page):
    named = re.findall(r"\[`(test_\w+)`\]\(([\w/.]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= 9
    for name, file in named:
        assert f"\ndef {name}(" in ((ROOT / page).parent / file).read_text(encoding="utf-8"), name
