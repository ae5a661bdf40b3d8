"""What a command line comes to: replays of new and of old options files, names of today and of yesterday, the data set
by any path, and how many of its scans are labeled."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, la_folder, make_set, method_words, write_case

import settings
import train_dtml
from dataloaders.cases import LA_SPLITS, PHANTOM_FOLDER
from dataloaders.training import is_phantom, usual_labeled
from losses.perturbation import noisy
from methods import METHODS, restore
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, run
from utils.options import REMOVED, RENAMED, option, refuse_idle, renamed

FILES = sorted((ROOT / "results").glob("*/*/options.txt"))


def settled(*words: str) -> dict[str, Any]:
    """Option -> value of all that a command line comes to."""
    o, method_options, *_ = settings.read_options(list(words))
    return {**dataclasses.asdict(o), **dataclasses.asdict(method_options)}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the data set `set`, 4 of its 8 training cases labeled."""
    make_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str) -> Path:
    """Trains for 12 iterations unless the words say otherwise; the run folder is runs/NAME."""
    train_dtml.main([*TINY, "--device", "cpu", "--iterations", "12", *words])
    return Path("runs") / words[words.index("--name") + 1]


# -- replays --


def test_old_options_files_are_the_runs_of_their_manifests():
    """All that can change the result; None and what it stands for are the same, and options of later have defaults.
    Refused if an option that is gone did something."""
    methods = set()
    for file in FILES:
        then = renamed(json.loads(file.with_name("manifest.json").read_text())["options"])
        if any(then.get(name, idle) != idle for name, idle in REMOVED.get(then["method"], {}).items()):
            with pytest.raises(UserError, match="no longer has"):
                settings.read_options([f"@{file}"])
            continue
        o, method_options, *_ = settings.read_options([f"@{file}"])
        fields = [(part, f) for part in (o, method_options) for f in dataclasses.fields(part)]
        now = {f.name: getattr(part, f.name) for part, f in fields if not f.metadata["harmless"]}
        for options in (now, then):
            usual = options["batch_size"] if options["unlabeled"] == 0 else max(options["batch_size"] // 2, 1)
            options["labeled_batch"] = options.get("labeled_batch") or usual
        shared = now.keys() & then.keys()
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
    ("file", "words", "expected"),
    [
        (OLD, "--iterations 1200", {"iterations": 1200, "lr_steps": [500, 1000], "patch_size": [64, 64, 32]}),
        (OLD, "--iterations 1200 --lr-steps 7", {"lr_steps": [7]}),
        (OLD, "--profile full", {"iterations": 6000, "lr_steps": [2500, 5000], "filters": 16, "downsample": 1}),
        (OLD, "--lr-schedule cosine", {"lr_steps": []}),
        (
            OLD_SHORT,
            "--preset authors",
            {"lambda_max": 1.0, "ramp": "steps", "consistency_times": 2, "augment": "mirror"},
        ),
        (OLD_SHORT, "--preset authors", {"k": 50.0, "unlabeled": 48}),  # these were chosen
        (OLD_SHORT, "--preset tuned", {"lr_schedule": "cosine", "lr_steps": [], "batch_size": 6, "intensity": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_given_beside_an_old_options_file_means_what_it_means_without_it(file, words, expected):
    found = settled(f"@{file}", *words.split())
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("before", "preset"), [("paper", "tuned"), ("tuned", "authors")])
def test_a_replay_with_another_preset_is_that_preset(before, preset, inside):
    folder = train("--data", "set", "--name", "first", "--preset", before, "--batch-size", "6", "--labeled-batch", "4")
    again = settled(f"@{folder}/options.txt", "--name", "second", "--preset", preset)
    words = ["--iterations", "12", "--batch-size", "6", "--labeled-batch", "4", "--device", "cpu"]
    assert again == settled("--data", "set", *TINY, *words, "--name", "second", "--preset", preset)


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ("", "--iterations 24", [10, 20]),
        ("--lr-steps 3 5", "--iterations 24", [3, 5]),
        ("--lr-steps 5 10", "--iterations 24", [5, 10]),  # chosen, though the same would follow
        ("--lr-schedule cosine", "--lr-schedule steps", [5, 10]),
        ("", "--lr-schedule cosine", []),
    ],
)
def test_a_replay_scales_what_followed_and_keeps_what_was_chosen(words, more, expected, inside):
    folder = train("--data", "set", "--name", "first", *words.split())
    assert settled(f"@{folder}/options.txt", "--name", "second", *more.split())["lr_steps"] == expected


def test_an_options_file_holds_what_was_chosen_and_tells_the_rest(inside):
    folder = train("--data", "set", "--name", "first", "--k", "20")
    lines = (folder / "options.txt").read_text().splitlines()
    flags = {line.split()[0] for line in lines if not line.startswith("#")}
    assert flags == {
        "--method", "--data", "--labeled", "--patch-size", "--filters", "--threads", "--picture-every", "--device",
        "--iterations", "--name", "--k",
    }  # fmt: skip
    assert "# --lr-steps 5 10" in lines and "# --lambda-max 0.1" in lines and "# --preset paper" in lines
    everything = json.loads((folder / "manifest.json").read_text())["options"]
    told = {line.split()[int(line.startswith("#"))].removeprefix("--").removeprefix("no-") for line in lines}
    assert told >= {name.replace("_", "-") for name, value in everything.items() if value is not None}
    assert settled(f"@{folder}/options.txt") == {**everything, "resume": "", "from_diagnostic": "", "fresh": False}


def test_a_resumed_run_keeps_what_was_chosen(inside):
    words = ["--data", "set", "--name", "run", "--save-every", "6", "--lr-steps", "5", "10"]
    folder = train(*words)
    before = (folder / "options.txt").read_text()
    shutil.copy(folder / "previous.pt", folder / "last.pt")
    train_dtml.main(["--resume", str(folder)])
    assert (folder / "options.txt").read_text() == before
    assert torch.load(folder / "last.pt", weights_only=True)["iteration"] == 12


# -- names of yesterday --


def test_renamed_options_are_options_of_today_and_no_longer_those_of_yesterday():
    for method, names in RENAMED.items():
        today = {f.name for f in dataclasses.fields(METHODS[method].Options)}
        assert set(names.values()) <= today and not set(names) & today


def test_old_options_of_a_checkpoint_are_filled_in_under_their_names_of_today(inside):
    words = [*method_words("dk-uxnet"), "--data", "set", "--noise-variance", "5", "--logit-scale", "0.1"]
    folder = train(*words, "--consistency-terms", "segc", "--iterations", "2", "--name", "run", "--save-every", "1")
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


@pytest.mark.parametrize(("old", "new"), RENAMED["dk-uxnet"].items())
def test_a_flag_of_yesterday_names_that_of_today(old, new):
    with pytest.raises(UserError, match=f"unknown argument --{old}: it is called --{new.replace('_', '-')} now"):
        settings.read_options(["--method", "dk-uxnet", f"--{old}", "1"])


def test_an_option_of_several_methods_has_one_meaning():
    """The same kind of value in the same range; what the choices are called may be more."""
    kinds: dict[str, set[Any]] = {}
    for kind in METHODS.values():
        for f in dataclasses.fields(kind.Options):
            about = f.metadata
            choices = tuple(about["choices"]) if about["choices"] else None
            kinds.setdefault(f.name, set()).add((str(f.type), about["maximum"], about["nargs"], choices))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("method", [m for m, kind in METHODS.items() if hasattr(kind.Options(), "noise")])
def test_noise_is_a_standard_deviation_wherever_there_is_the_flag(method, monkeypatch):
    """Of what the teacher sees beyond the image: normal, clipped at twice the deviation, which leaves 0.9595 of it."""
    kind = METHODS[method]
    torch.manual_seed(0)
    trained = kind(kind.Options(filters=2, noise=0.4), iterations=1)
    seen: list[torch.Tensor] = []
    hook = trained.teacher.encoder[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.zeros(4, 1, 32, 32, 32)
    with torch.no_grad():
        trained.consistency(torch.zeros(4, 1, 32, 32, 32), image, 0)
    hook.remove()
    clipped = noisy(torch.zeros(10**6), 1.0).std().item()
    assert len(seen) > 0 and all(x.std().item() == pytest.approx(0.4 * clipped, rel=0.02) for x in seen)


def test_noise_variance_of_the_strong_view_is_uniform_up_to_the_flag(monkeypatch):
    kind = METHODS["dk-uxnet"]
    torch.manual_seed(0)
    trained = kind(kind.Options(filters=2, query_channels=16, groups=[2, 2], noise_variance=3.0), iterations=1)
    seen: list[torch.Tensor] = []
    trained.networks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = {"image": torch.zeros(64, 1, 16, 16, 16), "label": torch.zeros(64, 16, 16, 16, dtype=torch.uint8)}
    with torch.no_grad():
        trained(batch, 0)
    variances = seen[0][:64].flatten(1).var(dim=1)
    assert variances.max() < 3.2 and variances.mean().item() == pytest.approx(1.5, abs=0.3)


@pytest.mark.parametrize("method", ["dtml-plus", "mean-teacher"])
def test_ema_decay_is_the_same_average_everywhere(method, inside):
    """alpha = min(1 - 1/(t+1), d) of the weights after each step, followed from the checkpoints of every iteration."""
    words = [*method_words(method), "--data", "set", "--ema-decay", "0.6", "--save-every", "1", "--iterations", "4"]
    pairs = {"dtml-plus": ("ema.M_s.", "M_s.")}.get(method, ("teacher.", "student."))
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        save = train_dtml.save_checkpoint
        patch.setattr(
            train_dtml, "save_checkpoint",
            lambda folder, state: kept.append({k: v.clone() for k, v in state["method"].items() if hasattr(v, "clone")})
            or save(folder, state),
        )  # fmt: skip
        train(*words, "--name", "run")
    name = next(n for n in kept[0] if n.startswith(pairs[1]) and n.endswith("weight"))
    own, average = [k[name].double() for k in kept], [k[pairs[0] + name.removeprefix(pairs[1])] for k in kept]
    expected = own[0]
    for t in range(4):
        alpha = min(1 - 1 / (t + 1), 0.6)
        expected = alpha * expected + (1 - alpha) * own[t]
        torch.testing.assert_close(average[t].double(), expected, rtol=1e-5, atol=1e-6)


# -- which data set --


def test_an_absolute_path_is_the_relative_one(inside):
    relative, absolute = ["--data", "set", "--labeled", "4"], ["--data", str(inside / "set"), "--labeled", "4"]
    for more in ([], ["--profile", "half"], ["--preset", "authors"]):
        one, other = (settings.read_options([*words, *more]) for words in (relative, absolute))
        assert one[2] == other[2]
        assert dataclasses.replace(one[0], data="") == dataclasses.replace(other[0], data="") and one[1] == other[1]
    folder = train("--data", "set", "--name", "run", "--save-every", "6")
    before = torch.load(folder / "last.pt", weights_only=True)
    for data in (inside / "set", Path("set"), inside / "set" / ".." / "set"):
        shutil.copy(folder / "previous.pt", folder / "last.pt")
        train("--data", str(data), "--name", "run", "--save-every", "6", "--resume", "auto")
        after = torch.load(folder / "last.pt", weights_only=True)
        assert after["iteration"] == 12 and all(torch.equal(v, after["method"][k]) for k, v in before["method"].items())


@pytest.mark.parametrize("path", ["data/../data/phantom/", "{here}/data/phantom", "link"])
def test_the_phantom_set_is_known_by_any_path(path, inside):
    (inside / "data").mkdir()
    (inside / "link").symlink_to(inside / "data" / "phantom")
    found = settled("--data", path.format(here=inside))
    assert (found["profile"], found["labeled"], found["iterations"]) == ("phantom", 8, 300)
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
        assert settings.read_options(["--data", str(folder)])[2] == Path("runs", folder.name, "dtml-16-seed1337")


@pytest.mark.skipif(la_folder() is None, reason="the LA volumes are not there")
def test_sixteen_of_the_real_la_are_labeled_by_default():
    assert usual_labeled(la_folder()) == 16


@pytest.mark.parametrize(("labeled", "profile"), [(1, "full"), (3, "half"), (8, "phantom")])
def test_all_that_have_a_label_are_labeled_by_default(profile, labeled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "mine", labeled=labeled)
    assert settled("--data", "mine", "--profile", profile)["labeled"] == labeled
    assert settled("--data", "mine", "--profile", profile, "--labeled", "2")["labeled"] == 2


def test_only_whether_there_is_a_label_is_looked_at(inside, monkeypatch):
    read = []
    get = h5py.Group.__getitem__
    monkeypatch.setattr(h5py.Group, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    assert settled("--data", "set")["labeled"] == 4 and read == []


@pytest.mark.parametrize(
    ("kept", "texts"),
    [
        (
            [0, 1, 3],
            ("case02, number 3 of set/train.list, has no label", "1 of those after it have one", "--labeled 2"),
        ),
        ([1, 2], ("case00, number 1 of set/train.list", "2 of those after it", "Put the labeled cases first")),
        ([], ("case00, number 1 of set/train.list", "none of those after it")),
    ],
)
def test_labels_that_do_not_come_first_are_not_left_out_unnoticed(kept, texts, inside):
    drop_labels([i for i in range(4) if i not in kept])
    with pytest.raises(UserError) as refused:
        settled("--data", "set")
    assert all(text in str(refused.value) for text in texts)


def drop_labels(cases: list[int]) -> None:
    """Takes the label out of the files of these cases."""
    for i in cases:
        with h5py.File(f"set/case0{i}/mri_norm2.h5", "a") as f:
            del f["label"]


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ("--labeled 6", ("case04", "case05", "number 5 of train.list", "one of --labeled 6", "give --labeled 4")),
        ("--labeled 5 --unlabeled 0", ("case04", "give --labeled 4", "put the labeled cases first")),
        ("--labeled 16", ("--labeled 16 must lie between 1 and 8", "that have a label")),
        ("--labeled 1", ("2 labeled crops", "give --labeled-batch 1")),
        ("--method supervised --labeled 2", ("4 labeled crops", "give --batch-size 2")),
    ],
)
def test_too_few_labels_are_told_with_what_to_do(words, texts, inside, capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: train("--data", "set", "--name", "run", *words.split()))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and all(text in err for text in texts) and "Traceback" not in err
    assert "case03" not in err and not Path("runs").exists()


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
    for words, largest in (("--classes 3", 2), ("--classes 7", 2), ("--classes 3 --labeled 2 --labeled-batch 2", 1)):
        if largest == 1 and cache != "ram":
            continue
        for _ in range(2):
            with pytest.raises(UserError) as refused:
                train("--data", "set", "--name", "run", "--cache", cache, *words.split())
            assert (
                f"{words[:11]}, but the largest value in the labels of the labeled cases is {largest}. Give --classes "
                in (str(refused.value))
            )
            assert f"Give --classes {largest}," in str(refused.value) and not Path("runs").exists()
    train("--data", "set", "--name", "run", "--cache", cache, "--classes", "2", "--iterations", "1")


# -- what cannot be given together --


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ("--resume auto --fresh", ("--fresh does nothing with --resume auto",)),
        ("--resume runs/run --fresh", ("--fresh does nothing with --resume runs/run",)),
        ("--resume runs/run --runs elsewhere", ("--runs does nothing with --resume runs/run",)),
        ("--resume runs/run --name other", ("--name does nothing with --resume runs/run",)),
        ("--cache-folder there", ("--cache-folder does nothing with --cache auto",)),
        ("--lr-steps 3 --lr-gamma 1", ("--lr-steps does nothing with --lr-gamma 1",)),
        ("--lr-steps --lr-gamma 0.5", ("--lr-gamma does nothing with --lr-steps",)),
        ("--lr-steps 3 12", ("--lr-steps 12 never comes in --iterations 12",)),
        ("--method supervised --unlabeled 2", ("--unlabeled does nothing here", "labeled scans only")),
        (
            "--method dtc --beta 0 --sdm-of scan",
            ("--sdm-of does nothing here", "no loss of this run needs distance maps"),
        ),
        ("--sdm-loss both --dis-weight 0 --sdm-of scan", ("--sdm-of does nothing here",)),
        (
            "--lambda-max 0 --ramp-end 0.5",
            ("--ramp-end", "--lambda-max 0"),
        ),
    ],
)
def test_flags_that_do_nothing_together_end_with_code_2(words, texts, inside, capsys):
    if "runs/run" in words:
        train("--data", "set", "--name", "run", "--iterations", "1")
    capsys.readouterr()
    files = sorted(Path("runs").rglob("*"))
    with pytest.raises(SystemExit) as ended:
        given = [] if "runs/run" in words else [*TINY, "--data", "set", "--name", "other", "--iterations", "12"]
        run(lambda: train_dtml.main([*given, *words.split()]))
    err = capsys.readouterr().err
    assert (ended.value.code == 2 and all(text in err for text in texts) and "Leave" in err) or "Give steps" in err
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
    words = {"chosen": {"x": 2}, "classes": [made], "value_of": values.get, "why": {"fact": "there is none"}}
    if text:
        with pytest.raises(UserError) as refused:
            refuse_idle(**words, usual=lambda name: 1)
        assert text in str(refused.value)
    else:
        refuse_idle(**words, usual=lambda name: 1)
    refuse_idle(**words, usual=lambda name: 2)  # what it would be without the flag is no mistake
