"""The commands of the README and the pages parse, links and names exist, and set-up is what CI and users run."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import predict
import settings
import test_la
from methods import METHODS
from tools import check, pictures, reproduce, share
from utils.checkpoint import load_checkpoint
from utils.options import Parser, fill

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLLOWED = ("adding-a-method.md", "own-data.md")  # to the letter, in tests of their own
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


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_parse_and_name_their_own_folders(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "la").mkdir(parents=True)
    options, _, folder, state = settings.read_options(shlex.split(command)[2:])
    assert state is None and folder.parts[:1] == ("runs",) and f"seed{options.seed}" in folder.name


def test_every_training_command_has_a_run_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "la").mkdir(parents=True)
    folders = [settings.read_options(shlex.split(command)[2:])[2] for command in TRAINING]
    assert len(TRAINING) >= 6 and len(set(folders)) == len(folders)


def test_the_first_command_tests_the_folder_that_it_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = next(c for c in COMMANDS if "requirements.txt" in c)
    steps = [step.strip() for step in first.split("&&")]
    assert steps[-2] == "python train_dtml.py"
    tested = shlex.split(steps[-1])
    assert tested[:2] == ["python", "test_la.py"]
    assert Path(tested[tested.index("--checkpoint") + 1]) == settings.read_options([])[2]


def test_test_commands_parse():
    parser = Parser()
    parser.add_dataclass(test_la.Options)
    found = [c for c in COMMANDS if c.startswith("python test_la.py")]
    assert found and all(parser.parse(shlex.split(c)[2:]) for c in found)


def test_predicting_commands_parse_and_their_weights_are_there():
    parser = Parser()
    parser.add_dataclass(predict.Options)
    lines = [shlex.split(c)[2:] for c in COMMANDS if c.startswith("python predict.py")]
    found = [parser.parse([word for word in line if not word.endswith(".nrrd")]) for line in lines]
    shared = [ROOT / run for words in found for run in words["checkpoint"] if run.startswith("results/")]
    assert shared and all(load_checkpoint(run)["iteration"] == 2400 for run in shared)


def test_drawing_commands_parse():
    found = [shlex.split(c)[3:] for c in COMMANDS if c.startswith("python -m tools.pictures")]
    for figure, *words in found:
        parser = Parser()
        parser.add_argument("runs", nargs="+")
        parser.add_dataclass(pictures.Options)
        assert figure in pictures.FIGURES and parser.parse(words)["runs"]
    assert found


def test_sharing_commands_parse():
    parser = Parser()
    parser.add_argument("folders", nargs=2)
    parser.add_dataclass(share.Options)
    found = [c for c in COMMANDS if c.startswith("python -m tools.share")]
    assert found and all(parser.parse(shlex.split(c)[3:]) for c in found)


def test_reproduce_commands_name_runs_of_the_grid():
    parser = Parser()
    parser.add_dataclass(reproduce.Options)
    found = [parser.parse(shlex.split(c)[3:]) for c in COMMANDS if c.startswith("python -m tools.reproduce")]
    assert found and all(reproduce.select(fill(reproduce.Options, words))[0] for words in found)


def test_checks_of_data_parse():
    parser = Parser()
    parser.add_argument("folder")
    parser.add_dataclass(check.Options)
    lines = [shlex.split(c)[3:] for c in COMMANDS if c.startswith("python -m tools.check")]
    assert lines and all(parser.parse(words) for words in lines)


def test_the_table_at_a_glance_is_what_the_records_give(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce.main(["--profile", "half", "--table", "glance"])
    table = capsys.readouterr().out.strip()
    assert 2 + 3 <= len(table.splitlines()) <= 2 + 8 and f"\n\n{table}\n\n" in README


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


PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", PROSE))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


EQUATIONS = re.findall(r"\[`([\w.]+)`\]\((\w+/\w+\.py)\)", PROSE)


@pytest.mark.parametrize(("name", "file"), EQUATIONS)
def test_equations_name_functions_that_are_there(name, file):
    assert f"def {name.split('.')[-1]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_equation_names_its_functions():
    parts = re.split(r"^\$\$.*\$\$$", README, flags=re.MULTILINE)[:-1]
    assert len(parts) >= 4 and all(re.search(r"\.py\)", part[-400:]) for part in parts)


RELIABILITY = ROOT / "docs" / "reliability.md"
PROMISES = re.findall(r"^(\d)\. .*: \[`(\w+)`\]\(([\w/.]+)\)\.$", PAGES[RELIABILITY], re.MULTILINE)


def test_the_nine_promises_name_tests_that_are_there():
    assert [number for number, *_ in PROMISES] == [str(n) for n in range(1, 10)]
    for _, name, file in PROMISES:
        assert f"\ndef {name}(" in (RELIABILITY.parent / file).read_text(), name


def test_flags_named_exist():
    parser = Parser()
    parser.add_dataclass(settings.Options)
    known = set(parser._option_string_actions) | {
        "--checkpoint",
        "--weighting",
        "--sdm-weights",
        "--nproc-per-node",
        "--logdir",
    }
    known |= {"--metric", "--picture", "--dist", "--requeue", "--max-restarts"}  # of other programs
    for program in (test_la, predict, pictures, share):
        known |= {f"--{name.replace('_', '-')}" for name in program.Options.__dataclass_fields__}
    known |= {f"--{name}" for name in reproduce.Options.__dataclass_fields__}
    for kind in METHODS.values():
        for name, f in kind.Options.__dataclass_fields__.items():
            known |= {f"--{no}{name.replace('_', '-')}" for no in (["", "no-"] if f.type is bool else [""])}
    for path, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known, path
