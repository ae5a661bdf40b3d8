"""The pages of docs/: the code of the worked example runs, every flag exists, and every stated default is one."""

import csv
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_set

import settings
import test_la
from evaluation.statistics import compare, read_row
from methods import METHODS
from tools import reproduce
from tools.grid import Row
from utils.errors import UserError
from utils.options import Parser

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
OURS = (
    "methods",
    "networks",
    "dataloaders",
    "utils",
    "losses",
    "evaluation",
    "tools",
    "tests",
    "docs",
    "results",
    "benchmarks",
    "data",
    ".ci",
)
ADDING, DIFFERENCES = PAGES["adding-a-method.md"], PAGES["differences.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_the_readme_leads_here(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / "docs" / target).exists(), target
    assert f"](docs/{page})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_files_named_exist(page):
    for name in re.findall(r"`((?:utils|networks|methods|dataloaders|tests)/[\w.]+\.py)`", PAGES[page]):
        assert (ROOT / name).exists() or f"`{name}`:\n\n```python" in PAGES[page], name  # or it is the worked example


# -- what differs from the papers --


def sections() -> dict[str, str]:
    """Method -> its section; '' -> what all share."""
    found = {}
    for part in re.split(r"^## ", DIFFERENCES, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        name = re.search(r"\(`([\w-]+)`\)$", title)
        found[name[1] if name else ""] = part
    return found


def flags_in(text: str) -> list[str]:
    """What stands in code type and begins with a flag."""
    return [code for code in re.findall(r"`([^`]+)`", text) if code.startswith("--")]


def parsed(method: str, words: str) -> dict:
    """Option -> value of a flag as written; {} if it stands there without its value."""
    parser = Parser()
    parser.add_dataclass(settings.Options)
    parser.add_dataclass(METHODS[method].Options)
    try:
        return parser.parse(shlex.split(words))
    except UserError as e:
        if "expected" in str(e) and " " not in words:
            return {}
        raise


def default(method: str, name: str):
    """The value of an option of the method or of the script when nothing is given."""
    settled = settings.settle({"data": "set", "method": method}, METHODS[method])
    return next(getattr(options, name) for options in settled if hasattr(options, name))


def test_every_method_has_a_section():
    assert set(sections()) == {"", *METHODS}


@pytest.mark.parametrize("method", ["", *METHODS])
def test_flags_are_the_methods_and_defaults_are_defaults(method):
    text, name, here = sections()[method], method or "ua-mt", 0
    assert all(isinstance(parsed(name, words), dict) for words in flags_in(text))
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 3 and {len(row) for row in rows} == {5}
    for row in rows[1:]:
        for words in flags_in(row[3]):
            for option, value in parsed(name, words).items():
                here += 1
                assert value == default(name, option), words
        for words in flags_in(row[4]):
            for option, value in parsed(name, words).items():
                assert value != default(name, option), words
    assert here >= 2


@pytest.mark.parametrize("method", METHODS)
def test_what_an_authors_preset_changes_is_on_the_page(method):
    """Each option that the second preset sets is named in the method's section, or in that of all."""
    for preset in list(METHODS[method].PRESETS.values())[1:]:
        usual = next(iter(METHODS[method].PRESETS.values()))
        for option in {name for name in preset if preset[name] != usual.get(name)} - {
            "lr_steps",
            "logit_scale",
            "weight_decay",
        }:
            flag = "--" + option.replace("_", "-")
            assert flag in sections()[method] + sections()[""], flag


# -- adding a method --


def code_after(words: str, language: str = "python") -> str:
    """The first block of code after these words of the page."""
    return re.search(rf"```{language}\n(.*?)```", ADDING[ADDING.index(words) :], re.S)[1]


def put(path: Path, after: str, lines: str) -> None:
    """Adds lines after the first line that ends so."""
    text = path.read_text(encoding="utf-8")
    assert after in text
    path.write_text(text.replace(after, after + "\n" + lines.rstrip(), 1), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with what the page adds, block by block."""
    folder = tmp_path_factory.mktemp("copy") / "code"
    others = shutil.ignore_patterns("__pycache__", ".git", "runs", "la", "phantom-*", ".*_cache")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in OURS:
            shutil.copytree(path, folder / path.name, ignore=others)
        elif path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".cff"):
            shutil.copy(path, folder)
    file = code_after("## 2. The file")
    assert 40 <= len(file.splitlines()) <= 70
    (folder / "methods" / "entropy_minimisation.py").write_text(file, encoding="utf-8")
    table = "TABLE = {  # name of --method: file and class"
    put(folder / "methods" / "__init__.py", table, code_after("## 3. The line"))
    put(folder / "docs" / "differences.md", DIFFERENCES.rstrip(), "\n" + code_after("## 5. Presets", "markdown"))
    losses = "| tag | method | healthy | trouble |\n|---|---|---|---|"
    put(folder / "docs" / "curves.md", losses, code_after("In [curves.md]", "markdown"))
    put(folder / "tests" / "test_flags.py", "\nOWN = {", code_after("In `OWN`"))
    put(folder / "tests" / "test_methods.py", "\nUNSUPERVISED = {", code_after("in `UNSUPERVISED`"))
    put(folder / "tools" / "grid.py", "\nLA_RUNS = {", code_after("In `LA_RUNS`"))
    put(folder / "tools" / "grid.py", '    "3": ("Table 3: methods", [', code_after("and in table 3"))
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


def python(copy: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_worked_example_trains_resumes_is_tested_and_shows_its_options(copy):
    data = make_set(copy / "set")
    flags = ["--method", "entropy", "--data", str(data), *TINY, "--iterations", "3", "--name", "run"]
    assert "lambda" in python(copy, "train_dtml.py", *flags, "--log-every", "1", "--picture-every", "3")
    assert (copy / "runs/run/pictures").is_dir()
    assert "already done: 3 of 3" in python(copy, "train_dtml.py", *flags, "--resume", "auto")
    assert "| seg | largest |" in python(copy, "test_la.py", "--checkpoint", "runs/run")
    assert "largest weight of the entropy" in python(copy, "train_dtml.py", "--method", "entropy", "--help")


def test_the_worked_example_is_in_the_grid(copy):
    found = python(copy, "-m", "tools.reproduce", "--list", "--rows", "entropy")
    assert "--method entropy --labeled 16" in found and "missing" in found


@pytest.mark.slow
def test_the_worked_example_is_taken_in_by_the_tests_and_passes_them(copy):
    """The page to its end, the losses and the tables that it has written included; then the tests that know the method,
    and those that go through all methods or rows at once."""
    for words in ("## 6. The tests", "The tables in `results/`"):
        shell(copy, code_after(words, "bash"))
    assert "Entropy minimisation" in (copy / "results" / "half" / "tables.md").read_text(encoding="utf-8")
    at_once = "every_method or every_flag or every_option or every_tag or house or the_stored or committed_tables"
    others = " or ".join(name for name in METHODS if name != "dtml")  # their own tests pass here as they do there
    chosen = f"(entropy or {at_once} or mistakes_are_named_before or differences)"
    chosen += f" and not (worked or replicas or {others})"
    found = python(copy, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, "tests")
    assert int(re.search(r"(\d+) passed", found)[1]) > 200, found


def test_the_commands_of_the_page_parse(monkeypatch, tmp_path):
    parsers = {}
    for script, classes in {
        "train_dtml.py": [settings.Options],
        "test_la.py": [test_la.Options],
        "tools.reproduce": [reproduce.Options],
    }.items():
        parsers[script] = Parser()
        for options in classes:
            parsers[script].add_dataclass(options)
    parsers["train_dtml.py"]._option_string_actions["--method"].choices = None  # entropy is none of them yet
    blocks = re.findall(r"```bash\n(.*?)```", ADDING, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line.removeprefix("python ").removeprefix("-m ") for line in lines if line.startswith("python ")]
    assert len(commands) >= 5
    for script, *words in map(shlex.split, commands):
        assert script == "tests.test_golden" or parsers[script].parse([word for word in words if word != "--help"])
    known = {flag for parser in parsers.values() for flag in parser._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ADDING)) <= known | {"--filters", "--lambda-max"}


# -- findings --


def test_the_table_of_what_goes_beyond_is_the_recorded_one():
    recorded = (ROOT / "results" / "short" / "tables.md").read_text(encoding="utf-8")
    table = recorded[recorded.index("One thing done in another way") :].split("\n\n")[1]
    assert table.count("\n") > 15 and table in PAGES["findings.md"]


LIVE_RUNS = {
    "M_d alone": "supervised-sdm-16",
    "DTML": "dtml-16",
    "DTML, labeled scans alone": "dtml-16-0",
    "DTML, L_dis": "dtml-dis-16",
    "DTML, L_dis + L_mask": "dtml-both-16",
    "DTML, `authors`": "dtml-authors-16",
    "DTML `tuned`": "tuned-16",
    "DTML `tuned`, labeled scans alone": "tuned-16-0",
}


def test_the_table_of_lost_gradients_is_what_the_curves_and_scans_give():
    page = PAGES["findings.md"]
    head = "| run | seed | k | live voxels, mean % | logged iterations with none | M_d, Dice % |"
    rows = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 9
    for row in rows:
        name, seed, k, *found = (cell.strip() for cell in row.strip("|").split("|"))
        folder = ROOT / "results" / "half" / f"{LIVE_RUNS[name]}-seed{seed}"
        assert json.loads((folder / "manifest.json").read_text())["options"]["k"] == float(k)
        with open(folder / "scalars.csv", newline="") as f:
            live = [float(line["live_gradient/sdm"]) for line in csv.DictReader(f)]
        dice = 100 * statistics.mean(read_row(f"{folder}:sdm", "dice", "all").values())
        assert found == [f"{100 * statistics.mean(live):.3f}", f"{live.count(0)} of {len(live)}", f"{dice:.2f}"]


TUNED_ROWS = {  # of the page: of the table of `tuned` that tools/reproduce.py prints
    "V-Net, 16 / 0": "V-Net, 16 / 0",
    "DTML `paper`, M_s, 16 / 64": "DTML, 16 / 64",
    "V-Net, rate and intensities of `tuned`, 16 / 0": "V-Net, rate and intensities of `tuned`, 16 / 0",
    "`tuned`: M_d, 16 / 64": "DTML `tuned`: M_d, 16 / 64",
    "`tuned`: mean of both, 16 / 64": "DTML `tuned`: mean of both, 16 / 64",
    "`tuned`: M_s, 16 / 64": "DTML `tuned`: M_s, 16 / 64",
    "V-Net, 80 / 0": "V-Net, 80 / 0",
}


def cells_of(text, start):
    """The rows of the first table after `start`: their cells."""
    rows = text[text.index(start) :].split("\n\n|", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def shown(c):
    """A comparison of Dice in points, as the page has it."""
    text = f"{100 * c.difference:+.2f} ({100 * c.low:+.2f} to {100 * c.high:+.2f})"
    return text.replace("-", "\N{MINUS SIGN}")


def dice_of(row, seeds):
    """Seed -> Dice of each test scan of a row of the grid at half resolution."""
    folder = ROOT / "results" / "half"
    return {seed: read_row(f"{folder}/{row.key}-seed{seed}:{row.output}", "dice", "all") for seed in seeds}


def test_the_table_of_tuned_on_the_test_scans_is_what_the_records_give():
    rows = cells_of(PAGES["findings.md"], "So `tuned` was frozen as it is")
    of_grid = {f"{row.label}, {row.scans}": row for row in reproduce.LA_TABLES["tuned"][1]}
    seeds = (1337, 1338, 1339)
    reference = dice_of(of_grid["V-Net, rate and intensities of `tuned`, 16 / 0"], seeds)
    assert {f"{row[0]}, {row[1]}" for row in rows} == set(TUNED_ROWS)
    for label, scans, told, dice, hd95, difference, higher in rows:
        row = of_grid[TUNED_ROWS[f"{label}, {scans}"]]
        found = dice_of(row, seeds)
        means = [100 * statistics.mean(run.values()) for run in found.values()]
        assert told == ", ".join(f"{mean:.2f}" for mean in means)
        assert dice == f"{statistics.mean(means):.2f} ± {statistics.stdev(means):.2f}"
        far = [read_row(f"{ROOT}/results/half/{row.key}-seed{s}:{row.output}", "hd95", "all").values() for s in seeds]
        assert hd95 == f"{statistics.mean(map(statistics.mean, far)):.2f}"
        if difference:
            c = compare(reference, found)
            assert (difference, higher) == (shown(c), f"{c.higher} of {c.pairs}")
        else:
            assert found == reference


def unlabeled_rows(seeds):
    """The table of `tuned` without and with the 64 unlabeled scans, over these seeds."""
    rows = [
        [f"16 / 0, seeds {', '.join(map(str, seeds))}"],
        ["16 / 64, the same seeds"],
        ["difference (95 % interval over runs and scans)"],
        ["higher in seed pairs"],
    ]
    for output in ("seg", "sdm", "mean"):
        without, with_them = (dice_of(Row("", "", key, output=output), seeds) for key in ("tuned-16-0", "tuned-16"))
        for row, runs in zip(rows, (without, with_them), strict=False):
            row.append(", ".join(f"{100 * statistics.mean(run.values()):.2f}" for run in runs.values()))
        c = compare(without, with_them)
        rows[2].append(shown(c))
        rows[3].append(f"{c.higher} of {c.pairs}")
    return rows


def test_the_table_of_the_unlabeled_scans_is_what_the_records_give():
    seeds = sorted(int(path.name[-4:]) for path in (ROOT / "results" / "half").glob("tuned-16-0-seed*"))
    assert cells_of(PAGES["findings.md"], "**What the unlabeled scans add**") == unlabeled_rows(seeds)
