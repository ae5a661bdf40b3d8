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
from evaluation.rows import Runs, read_runs
from evaluation.statistics import Comparison, compare
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


# -- findings --


CLAIMS = {  # section: of each of its lines the reference and the row, as evaluation.statistics takes them
    "mutual-learning": [("half/supervised-16-seed*", "half/dtml-16-seed*")],
    "m_d-alone": [("half/supervised-16-seed133[78]", "half/supervised-sdm-16-seed*")],
    "the-loss-of-m_d": [("half/dtml-dis-16-seed1337", "half/dtml-16-seed1337")],
    "what-the-unlabeled-scans-add": [
        ("half/dtml-16-0-seed1337", "half/dtml-16-seed1337"),
        ("half/tuned-16-0-seed*:mean", "half/tuned-16-seed133[78]:mean"),
    ],
    "all-labels": [("half/supervised-16-seed*", "half/supervised-80-seed*")],
    "a-better-recipe-for-the-v-net": [("half/dtml-16-seed*", "half/supervised-tuned-16-seed*")],
    "the-preset-tuned": [
        ("half/dtml-16-seed*", "half/tuned-16-seed*"),
        ("half/supervised-tuned-16-seed*", "half/tuned-16-seed*"),
    ],
    "each-scan-on-its-own-scale": [
        (f"half/supervised-tuned-{n}-seed*", f"half/supervised-normalized-{n}-seed*") for n in (16, 8)
    ],
    "dtml": [
        ("half/plus-alone-8-seed*:ema_mean", "half/plus-8-seed*:ema_mean"),
        ("half/supervised-normalized-8-seed*", "half/plus-8-seed*:ema_mean"),
        ("half/plus-alone-4-seed*:ema_mean", "half/plus-4-seed*:ema_mean"),
        ("half/supervised-normalized-4-seed*", "half/plus-4-seed*:ema_mean"),
        ("half/plus-alone-16-seed*:ema_mean", "half/plus-16-seed*:ema_mean"),
    ],
    "dtml-on-the-hippocampus": [
        ("hippocampus/plus-alone-8-seed*:ema_mean", "hippocampus/plus-8-seed*:ema_mean"),
        ("hippocampus/supervised-normalized-8-seed*", "hippocampus/plus-alone-8-seed*:ema_mean"),
    ],
    "newer-methods": [
        ("hippocampus/supervised-softmax-8-seed*", "hippocampus/bcp-8-seed*"),
        ("hippocampus/supervised-softmax-8-seed*", "hippocampus/ad-mt-8-seed*:teacher_1"),
    ],
    "dk-uxnet-after-600-iterations": [("short/supervised-16-seed1337", "short/dk-uxnet-16-seed1337")],
}
OTHERS = ("asdnet", "tcse", "ua-mt", "dtc", "sassnet", "double-unc")


def shown(c: Comparison) -> str:
    """A comparison of Dice in points, as the page has it."""
    text = f"{100 * c.difference:+.2f} ({100 * c.low:+.2f} to {100 * c.high:+.2f}; {c.runs[0]} and {c.runs[1]} runs"
    return text.replace("-", "\N{MINUS SIGN}") + (", scans only)" if c.over.startswith("scans only") else ")")


def verdict(reference: Runs, row: Runs) -> str:
    """By the page's rule."""

    def excluded(out: str | None = None) -> bool:
        """Whether the interval excludes 0, without one scan if it is named."""
        both = ({seed: {scan: v for scan, v in run.items() if scan != out} for seed, run in side.items()}
                for side in (reference, row))  # fmt: skip
        c = compare(*both, most=1)
        return c.low > 0 or c.high < 0

    if not excluded():
        return "not shown"
    several = min(len(reference), len(row)) > 1
    return "shown" if several and all(map(excluded, next(iter(reference.values())))) else "open"


def curve(run: str, column: str) -> dict[int, float]:
    """Iteration -> value of a column of scalars.csv in results/; {} if it has none."""
    with open(ROOT / "results" / run / "scalars.csv", newline="") as f:
        return {int(row["iteration"]): float(row[column]) for row in csv.DictReader(f) if column in row}


def test_other_figures_are_what_the_records_give():
    """Live voxels by k, the spread of the V-Nets, the scan that is not drawn, and a median of the screening."""
    live: dict[float, list[float]] = {}
    for path in [*(ROOT / "results" / "half").glob("*-seed*"), *(ROOT / "results" / "short").glob("*-seed*")]:
        options = json.loads((path / "manifest.json").read_text())["options"]
        own = options["method"] == "dtml" or options.get("head") == "sdm"
        if own and not re.match("beyond-(flips|grow)", path.name):  # the test of another run; k changes
            share = curve(f"{path.parent.name}/{path.name}", "live_gradient/sdm").values()
            live.setdefault(options["k"], []).append(100 * statistics.mean(share))
    text = " ".join(PAGES["findings.md"].split())
    assert f"learn, {min(live[1500]):.2f} to {max(live[1500]):.2f} % of all" in text
    assert f"4 of {len(live[1500])} runs with k = 1500" in text and f"4 of the {len(live[1500])} recorded" in text
    assert f"k = 50, {min(live[50]):.0f} to {max(live[50]):.0f} % of the voxels learn" in text
    assert f"none of {len(live[50])} runs of DTML failed" in text
    died = curve("half/supervised-sdm-16-seed1338", "live_gradient/sdm")
    assert max(share for i, share in died.items() if 69 <= i < 510) < 1e-4 and died[69] == 0 < died[59]
    rows = {path.name[: path.name.index("-seed")] for path in (ROOT / "results" / "half").glob("supervised*-seed*")}
    vnets = [read_runs(f"{ROOT}/results/half/{row}-seed*", "dice", "all") for row in rows if "sdm" not in row]
    means = [[statistics.mean(run.values()) for run in runs.values()] for runs in vnets]
    assert f"furthest apart differ by {100 * max(max(row) - min(row) for row in means):.2f}." in text
    names = [f"{ROOT}/results/half/{row}-16-seed1337" for row in ("supervised", "dtml")]
    vnet, dtml = (read_runs(name, "dice", "all")[1337] for name in names)
    assert f"one scan is {100 * max(dtml[scan] - vnet[scan] for scan in vnet):.0f} points lower" in text
    both, every = (read_runs(f"{ROOT}/results/screening/quick-plus-4{name}-seed*:ema_mean", "dice", "all")[1337]
                   for name in ("", "-all"))  # fmt: skip
    gains = [100 * (every[scan] - both[scan]) for scan in both]
    page = (ROOT / "results/screening/README.md").read_text(encoding="utf-8")
    shown_median = f"{statistics.median(gains):.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"lower on {sum(gain < 0 for gain in gains)} of {len(gains)} scans (median {shown_median})" in page


SLOW, FAST = ("cps", "dtc", "dtml", "mean-teacher", "sassnet", "tcse", "ua-mt"), ("ad-mt", "bcp", "plus", "ss-net")


def test_the_weight_of_the_unlabeled_loss_counts_as_the_records_give():
    """Its mean by its maximum, with the learning rate as weight, in every run of `tuned` with 8 labels."""
    shares: dict[str, float] = {}
    for path in [*(ROOT / "results/half").glob("*-8-seed*"), *(ROOT / "results/hippocampus").glob("*-8-seed*")]:
        row = re.sub(r"(-tuned|-softmax|-joint|-pasted)?-8-seed\d+$", "", path.name)
        if row in SLOW + FAST:
            run = f"{path.parent.name}/{path.name}"
            weight, lr = curve(run, "lambda") or curve(run, "w"), curve(run, "lr")
            share = sum(lr[i] * weight[i] for i in lr) / sum(lr.values()) / max(weight.values())
            assert shares.setdefault(row, share) == pytest.approx(share, abs=0.001)
    assert {*SLOW, *FAST} == shares.keys()
    low, high = {f"{shares[row]:.2f}" for row in SLOW}, sorted(f"{shares[row]:.2f}" for row in FAST)
    text = " ".join(PAGES["findings.md"].split())
    assert low == {"0.15"} and "it is 0.15 of its maximum on average" in text
    assert f"{high[0]} to {high[-1]} in DTML+, AD-MT, SS-Net and BCP" in text


def test_the_live_voxels_of_the_curves_are_those_of_the_run():
    table = PAGES["curves.md"].split("| iterations | ")[1].splitlines()
    spans = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\D(\d+)", table[0])]
    columns = {"live voxels": ("live_gradient/sdm", 100, "{:.2f} %"), "L_mask": ("loss/mask", 1, "{:.2f}"),
               "Dice of M_d in training": ("dice/train_sdm", 1, "{:.2f}"),
               "Dice of M_s in training": ("dice/train_seg", 1, "{:.2f}")}  # fmt: skip
    for line in table[2:6]:
        name, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        column, factor, form = columns.pop(name)
        values = curve("half/dtml-16-seed1337", column)
        means = [statistics.mean(v for i, v in values.items() if start <= i < end) for start, end in spans]
        assert figures == [form.format(factor * mean) for mean in means]
    assert not columns


def test_the_claims_are_what_the_records_give():
    lines = re.findall(r"^\| \[[^]]+\]\(#([\w-]+)\) \|[^|]*\| ([^|]*) \| ([\w ]+) \|$", PAGES["findings.md"], re.M)
    result = {}
    for section, here, word in lines:
        result.setdefault(section, []).append((here, word))
    compared = [compare(*(read_runs(f"{ROOT}/results/half/{name}-16-seed1337", "dice", "all") for name in pair))
                for pair in ((other, "dtml") for other in OTHERS)]  # fmt: skip
    assert all(c.low < 0 < c.high for c in compared)
    least, most = (f"{100 * end(c.difference for c in compared):+.2f}" for end in (min, max))
    ((here, word),) = result.pop("the-other-methods")
    assert here.startswith(f"{least} to {most} (every interval contains 0; 1 and 1 runs".replace("-", "\N{MINUS SIGN}"))
    assert word == "not shown" and result.keys() == CLAIMS.keys()
    for section, pairs in CLAIMS.items():
        runs = [[read_runs(f"{ROOT}/results/{where}", "dice", "all") for where in pair] for pair in pairs]
        assert result[section] == [(shown(compare(*pair, most=1)), verdict(*pair)) for pair in runs]
    slugs = [
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall("^#+ (.*)", PAGES["findings.md"], re.M)
    ]
    assert {section for section, *_ in lines} <= set(slugs)
