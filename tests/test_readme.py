"""The README's commands parse, its links and names exist, and its two set-up commands are what CI and users run."""

import re
import shlex
from pathlib import Path

import pytest

import predict
import settings
import test_la
from methods import METHODS
from tools import pictures, reproduce, share
from utils.checkpoint import load_checkpoint
from utils.options import Parser, fill

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
TRAINING = [c for c in COMMANDS if c.startswith("python train_dtml.py")]


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


@pytest.mark.parametrize("name", ["1", "2", "3", "tuned"])
def test_the_tables_are_the_recorded_ones(name):
    title = f"**{reproduce.LA_TABLES[name][0]}**"
    page, recorded = (
        text[text.index(title) :].split("\n\n")[1]
        for text in (README, (ROOT / "results" / "half" / "tables.md").read_text(encoding="utf-8"))
    )
    assert recorded.count("\n") > 3 and page == recorded


def test_ci_runs_the_second_command():
    second = next(c for c in COMMANDS if "requirements-dev.txt" in c)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "requirements-dev.txt" in ci and second.split("&&")[-1].strip() in ci


PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", PROSE))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


PROMISES = re.findall(r"^(\d)\. .*: \[`(\w+)`\]\(([\w/.]+)\)\.$", PROSE, re.MULTILINE)


def test_the_nine_promises_name_tests_that_are_there():
    assert [number for number, *_ in PROMISES] == [str(n) for n in range(1, 10)]
    for _, name, file in PROMISES:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:utils|networks|methods|dataloaders)/\w+\.py)", README))))
def test_files_named_exist(name):
    assert (ROOT / name).exists()


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
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known
