"""What a command line comes to: replays of options files, old names, the data set by any path, labeled scans."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_set, method_words, write_case

import train_dtml
from dataloaders.cases import PHANTOM_FOLDER
from dataloaders.lists import LA_SPLITS
from dataloaders.training import is_phantom, usual_labeled
from methods import METHODS, restore
from tools import command_line
from utils.checkpoint import load_checkpoint
from utils.early_options import REMOVED, RENAMED, renamed
from utils.errors import UserError, run
from utils.options import DERIVED, option, refuse_unused

FILES = sorted((ROOT / "results").glob("*/*/options.txt"))


def settled(*args: str) -> dict[str, Any]:
    """Option -> value of all that a command line comes to."""
    o, method_options, *_ = command_line.read_options(list(args))
    return {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the data set `set`, 4 of its 8 training cases labeled."""
    make_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*args: str) -> Path:
    """Trains for 12 iterations unless the words say otherwise; the run folder is runs/NAME."""
    train_dtml.main([*TINY, "--device", "cpu", "--iterations", "12", *args])
    return Path("runs") / args[args.index("--name") + 1]


# -- replays --


def test_old_options_files_are_the_runs_of_their_manifests():
    """All that can change the result; None and what it stands for are the same, and options of later have defaults.
    Refused if an option that is gone did something."""
    methods = set()
    for file in FILES:
        then = renamed(json.loads(file.with_name("manifest.json").read_text())["options"])
        if any(then.get(name, idle) != idle for name, idle in REMOVED.get(then["method"], {}).items()):
            with pytest.raises(UserError, match="no longer has"):
                command_line.read_options([f"@{file}"])
            continue
        o, method_options, *_ = command_line.read_options([f"@{file}"])
        fields = [(part, f) for part in (o, method_options) for f in dataclasses.fields(part)]
        now = {f.name: getattr(part, f.name) for part, f in fields if not f.metadata["harmless"]}
        for options in (now, then):
            usual = options["batch_size"] if options["unlabeled"] == 0 else max(options["batch_size"] // 2, 1)
            options["labeled_batch"] = options.get("labeled_batch") or usual
        shared = now.keys() & then.keys()
        if then["softmax"] is False and now.get("classes", 1) > 1:
            shared -= {"softmax"}  # until it was the default of several classes
        assert {name: now[name] for name in shared} == {name: then[name] for name in shared}, file
        assert len(shared) > 15
        of_later = {name: value for name, value in now.items() if name not in then}
        usual = settled("--method", o.method, "--labeled", "16", "--data", o.data, "--profile", o.profile)
        assert of_later == {name: usual[name] for name in of_later}, file
        methods.add(o.method)
    assert len(FILES) > 75 and len(methods) >= 10


OLD = ROOT / "results" / "half" / "dtml-16-seed1337" / "options.txt"
OLD_SHORT = ROOT / "results" / "short" / "beyond-k-seed1337" / "options.txt"


@pytest.mark.parametrize(
    ("file", "args", "expected"),
    [
        (OLD, "--iterations 1200", {"iterations": 1200, "lr_steps": [500, 1000], "patch_size": [64, 64, 32]}),
        (OLD, "--iterations 1200 --lr-steps 7", {"lr_steps": [7]}),
        (OLD, "--profile full", {"iterations": 6000, "lr_steps": [2500, 5000], "filters": 16, "downsample": 1}),
        (OLD_SHORT, "--preset authors", {"lambda_max": 1.0, "ramp": "steps", "k": 50.0, "unlabeled": 48}),
        (OLD_SHORT, "--preset tuned", {"lr_schedule": "cosine", "lr_steps": [], "batch_size": 6, "intensity": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_flags_after_an_old_options_file_mean_what_they_mean_without_it(file, args, expected):
    """--k and --unlabeled of the second file were chosen, and so they stay."""
    options = settled(f"@{file}", *args.split())
    assert {name: options[name] for name in expected} == expected


@pytest.fixture
def begun(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings end before their first iteration, when options.txt and the manifest are written."""
    monkeypatch.setattr(train_dtml, "train", lambda *_: {})
    monkeypatch.setattr(train_dtml, "summarize", lambda *_: None)


@pytest.mark.parametrize(
    ("args", "more", "expected"),
    [
        ("", "--iterations 24", [10, 20]),
        ("--lr-steps 3 5", "--iterations 24", [3, 5]),
        ("--lr-steps 5 10", "--iterations 24", [5, 10]),  # chosen, though the same would follow
        ("--lr-schedule cosine", "--lr-schedule steps", [5, 10]),
        ("", "--lr-schedule cosine", []),
    ],
)
def test_a_replay_scales_what_followed_and_keeps_what_was_chosen(args, more, expected, begun):
    folder = train("--data", "set", "--name", "first", *args.split())
    assert settled(f"@{folder}/options.txt", "--name", "second", *more.split())["lr_steps"] == expected


def test_an_options_file_holds_what_was_chosen_and_lists_the_rest_as_comments(begun):
    folder = train("--data", "set", "--name", "first", "--k", "20")
    lines = (folder / "options.txt").read_text().splitlines()
    flags = {line.split()[0] for line in lines if not line.startswith("#")}
    assert flags == {
        "--method", "--data", "--labeled", "--patch-size", "--filters", "--threads", "--picture-every", "--device",
        "--iterations", "--name", "--k",
    }  # fmt: skip
    assert "# --lr-steps 5 10" in lines and "# --lambda-max 0.1" in lines and "# --preset paper" in lines
    everything = json.loads((folder / "manifest.json").read_text())["options"]
    listed = {line.split()[int(line.startswith("#"))].removeprefix("--").removeprefix("no-") for line in lines}
    assert listed >= {name.replace("_", "-") for name, value in everything.items() if value is not None}
    assert settled(f"@{folder}/options.txt") == {
        **everything,
        "channels": 1,
        "resume": "",
        "from_diagnostic": "",
        "fresh": False,
    }


# -- names of yesterday --


def test_old_options_of_a_checkpoint_are_filled_in_under_their_names_of_today(inside):
    args = [*method_words("dk-uxnet"), "--data", "set", "--noise-variance", "5", "--logit-scale", "0.1"]
    folder = train(*args, "--consistency-terms", "segc", "--iterations", "2", "--name", "run", "--save-every", "1")
    new = load_checkpoint(folder)
    for path in (folder / "last.pt", folder / "previous.pt"):
        state = torch.load(path, weights_only=True)
        for old, name in RENAMED["dk-uxnet"].items():
            state["options"][old] = state["options"].pop(name)
        torch.save(state, path)
    assert load_checkpoint(folder)["options"] == new["options"]
    options = vars(restore(load_checkpoint(folder)).options)
    assert (options["noise_variance"], options["logit_scale"], options["consistency_terms"]) == (5.0, 0.1, "segc")
    shutil.copy(folder / "previous.pt", folder / "last.pt")
    train_dtml.main(["--resume", str(folder), "--noise-variance", "5"])
    again = load_checkpoint(folder)
    assert again["iteration"] == 2 and all(
        torch.equal(weight, new["method"][name]) for name, weight in again["method"].items()
    )


def test_an_option_that_a_run_began_without_had_its_default(inside):
    folder = train("--data", "set", "--iterations", "2", "--name", "run", "--save-every", "1")
    finished = load_checkpoint(folder)["method"]
    state = torch.load(folder / "previous.pt", weights_only=True)
    del state["options"]["batch_norm"], state["options"]["paste"]
    torch.save(state, folder / "last.pt")
    with pytest.raises(UserError, match="--batch-norm: joint before, separate now"):
        train_dtml.main(["--resume", str(folder), "--batch-norm", "separate"])
    train_dtml.main(["--resume", str(folder), "--batch-norm", "joint", "--paste", "0"])
    again = load_checkpoint(folder)
    assert again["options"]["batch_norm"] == "joint" and again["options"]["paste"] == 0
    assert all(torch.equal(weight, finished[name]) for name, weight in again["method"].items())


@pytest.mark.parametrize(
    ("method", "rest", "batch_norm"),
    [
        ("dtml", "# --k 50\n", "joint"),
        ("dtml", "# --batch-norm separate\n", "separate"),
        ("dtml", "# --batch-norm joint\n", "joint"),
        ("dtml", None, "separate"),  # a file of flags that no run wrote
        ("dtml-plus", "# --k 50\n", "joint"),
        ("supervised", "", None),
    ],
)
def test_runs_from_before_their_preset_set_batch_norm_had_one_pass(method, rest, batch_norm, tmp_path):
    file = tmp_path / "options.txt"
    file.write_text(f"--method {method}\n--preset tuned\n--labeled 8\n" + ("" if rest is None else DERIVED + rest))
    assert settled(f"@{file}", "--data", "set").get("batch_norm") == batch_norm
    assert settled(f"@{file}", "--data", "set", *(["--batch-norm", "separate"] if batch_norm else [])).get(
        "batch_norm"
    ) == (batch_norm and "separate")


def test_a_flag_of_yesterday_names_that_of_today():
    for method, names in RENAMED.items():
        assert set(names.values()) <= {f.name for f in dataclasses.fields(METHODS[method].Options)}
        for old, new in names.items():
            with pytest.raises(
                UserError, match=f"unknown argument --{old}: it is called --{new.replace('_', '-')} now"
            ):
                command_line.read_options(["--method", method, f"--{old}", "1"])


def test_an_option_of_several_methods_has_one_meaning():
    """The same kind of value in the same range; what the choices are called may be more."""
    kinds: dict[str, set[Any]] = {}
    for kind in METHODS.values():
        for f in dataclasses.fields(kind.Options):
            about = f.metadata
            choices = tuple(about["choices"]) if about["choices"] else None
            kinds.setdefault(f.name, set()).add((str(f.type), about["maximum"], about["nargs"], choices))
    assert {name: result for name, result in kinds.items() if len(result) > 1} == {}


# -- which data set --


@pytest.mark.parametrize("path", ["data/../data/phantom/", "{here}/data/phantom", "link"])
def test_the_phantom_set_is_known_by_any_path(path, inside):
    (inside / "data").mkdir()
    (inside / "link").symlink_to(inside / "data" / "phantom")
    result = settled("--data", path.format(here=inside))
    assert (result["profile"], result["labeled"], result["iterations"]) == ("phantom", 8, 300)
    assert is_phantom(Path(path.format(here=inside))) and not is_phantom(inside / "set")
    assert Path("data/phantom") == PHANTOM_FOLDER


# -- how many are labeled --


def la_like(folder: Path, names: list[str]) -> Path:
    """A folder whose lists name these training cases."""
    folder.mkdir(parents=True)
    (folder / "train.list").write_text("\n".join(names) + "\n")
    (folder / "test.list").write_text((LA_SPLITS / "test.list").read_text())
    return folder


def test_sixteen_of_la_are_labeled_by_default(inside, tmp_path):
    (inside / "plain").mkdir()  # without lists the published ones count
    names = (LA_SPLITS / "train.list").read_text().split()
    for folder in (inside / "plain", la_like(inside / "own", names), la_like(inside / "fewer", names[5:])):
        assert usual_labeled(folder) == settled("--data", str(folder))["labeled"] == 16
        assert settled("--data", str(folder), "--profile", "short")["labeled"] == 16
        assert command_line.read_options(["--data", str(folder)])[2] == Path("runs", folder.name, "dtml-16-seed1337")


def test_all_that_have_a_label_are_labeled_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "mine", labeled=3)
    for profile in ("full", "half", "phantom"):
        assert settled("--data", "mine", "--profile", profile)["labeled"] == 3
        assert settled("--data", "mine", "--profile", profile, "--labeled", "2")["labeled"] == 2


def test_only_whether_there_is_a_label_is_looked_at(inside, monkeypatch):
    read = []
    get = h5py.Group.__getitem__
    monkeypatch.setattr(h5py.Group, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    assert settled("--data", "set")["labeled"] == 4 and read == []


def test_labels_that_do_not_come_first_are_not_left_out_unnoticed(inside):
    for case, texts in (
        (2, ("case02, number 3 of set/train.list, has no label", "1 of those after it have one", "--labeled 2")),
        (0, ("case00, number 1 of set/train.list", "2 of those after it", "Put the labeled cases first")),
    ):
        with h5py.File(f"set/case0{case}/mri_norm2.h5", "a") as f:
            del f["label"]
        with pytest.raises(UserError) as refused:
            settled("--data", "set")
        assert all(text in str(refused.value) for text in texts)


def test_a_user_s_mistake_is_told_without_a_traceback_and_ends_with_2(inside, capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: train("--data", "set", "--name", "run", "--labeled", "16"))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in err and not Path("runs").exists()
    assert "--labeled 16 must lie between 1 and 8" in err and "that have a label" in err


# -- how many classes --


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_classes_above_what_the_labels_hold_are_refused(cache, tmp_path, monkeypatch):
    """The second time too, when a cache knows that the files are sound; an unlabeled case's label, which holds more, is
    not opened."""
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "set", labeled=8)
    rng = np.random.default_rng(0)
    for i in range(8):
        image = rng.standard_normal((24, 22, 18)).astype(np.float32)
        label = np.full((24, 22, 18), min(i, 2) if i < 4 else 3, np.uint8)
        label[:4] = 0
        write_case(Path(f"set/case0{i}/mri_norm2.h5"), image, label)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"--classes 3, but the largest value in the labels .* is 2\. Give --classes 2,"
        ):
            train("--data", "set", "--name", "run", "--cache", cache, "--classes", "3")
        assert not Path("runs").exists()
    train("--data", "set", "--name", "run", "--cache", cache, "--classes", "2", "--iterations", "1")


# -- what cannot be given together --


def test_flags_that_do_nothing_with_resume_are_refused(inside):
    """Others: faults/test_bad_input.py."""
    train("--data", "set", "--name", "run", "--iterations", "1")
    files = sorted(Path("runs").rglob("*"))
    for words in ("--runs elsewhere", "--name other"):
        with pytest.raises(UserError, match=f"{words.split()[0]} does nothing with --resume runs/run"):
            train_dtml.main(["--resume", "runs/run", *words.split()])
    assert sorted(Path("runs").rglob("*")) == files


@pytest.mark.parametrize(
    ("only_if", "values", "text"),
    [
        ({"a": bool}, {"a": 0.0}, "--x does nothing with --a 0.0. Leave one of them out."),
        ({"a": bool}, {"a": 0.1}, ""),
        ({"a": (1, 2)}, {"a": 3}, "with --a 3. Leave"),
        ({"a": bool}, {"a": False}, "with --no-a. Leave"),
        ({"a": bool, "b": bool}, {"a": 1, "b": 0}, "with --b 0. Leave"),
        ([{"a": bool}, {"b": bool}], {"a": 1, "b": 0}, ""),
        ([{"a": bool}, {"b": bool}], {"a": 0, "b": 0}, "with --a 0 and --b 0. Leave"),
        ({"x": bool}, {"x": 0}, ""),  # of itself a condition says nothing
        ({"fact": bool}, {"fact": False}, "--x does nothing here: there is none. Leave it out."),
    ],
)
def test_an_option_counts_if_all_of_one_condition_holds(only_if, values, text):
    made = dataclasses.make_dataclass("Made", [("x", int, option(1, "x", only_if=only_if))])
    args = {"chosen": {"x": 2}, "classes": [made], "value_of": values.get, "why": {"fact": "there is none"}}
    if text:
        with pytest.raises(UserError) as refused:
            refuse_unused(**args, usual=lambda name: 1)
        assert text in str(refused.value)
    else:
        refuse_unused(**args, usual=lambda name: 1)
    refuse_unused(**args, usual=lambda name: 2)  # what it would be without the flag is no mistake
