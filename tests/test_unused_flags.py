"""Every option of every method, beside every other that may switch it off: it changes what is learned or predicted, or
it is refused, and then it does nothing. The cases come from the dataclasses: a new option without one fails."""

import dataclasses
import functools
import hashlib
import shlex
from typing import Any

import pytest
import torch
from changing_flags import OWN
from small_methods import make_batch, with_sdm

import settings
from methods import METHODS
from tools import command_line
from utils.errors import UserError
from utils.options import as_flags, default_of, fill, flag_of

SMALL = {"filters": 2, "query_channels": 16, "groups": [3, 2], "levels": [8, 4]}
ITERATIONS, LOOKED_AT = 7, (1, 4)


@functools.cache
def outcome(method: str, flags: str, steps: int = len(LOOKED_AT)) -> dict[str, bytes]:
    """Name -> digest of what a tiny run with these flags learns and, at its end, predicts; of a critic no weight
    counts, as no output comes from it, and a teacher only by its predictions."""
    kind = METHODS[method]
    torch.manual_seed(0)
    trained = kind(fill(kind.Options, SMALL, parsed(method, flags)), iterations=ITERATIONS).train()
    batch = with_sdm(make_batch(unlabeled=parsed(method, flags).get("unlabeled", 2)))
    batch |= {"other_image": batch["image"].flip(2), "other_label": batch["label"].flip(1)}
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    for iteration in LOOKED_AT[:steps]:
        torch.manual_seed(iteration)
        optimizer.zero_grad()
        trained(batch, iteration).total.backward()
        optimizer.step()
        trained.after_step(batch, iteration)
    result = weights(trained)
    if steps == len(LOOKED_AT):
        trained.eval()
        with torch.no_grad():
            result[" ".join(trained.outputs)] = trained.predict(batch["image"], trained.outputs)
    return {name: hashlib.sha256(x.numpy().tobytes()).digest() for name, x in result.items()}


def weights(built: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those that count."""
    return {name: x for name, x in built.state_dict().items() if not name.startswith(("adversary.", "teacher."))}


@functools.cache
def shapes(method: str, flags: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a run with these flags, which is not trained."""
    kind = METHODS[method]
    with torch.device("meta"):
        built = kind(fill(kind.Options, SMALL, parsed(method, flags)), iterations=ITERATIONS)
    return {name: tuple(x.shape) for name, x in weights(built).items()}


def differ(method: str, flags: str, others: str) -> bool:
    """Whether two runs end differently: without training where their weights have other names or shapes, and after a
    single step where they do so then."""
    if shapes(method, flags) != shapes(method, others):
        return True
    return any(outcome(method, flags, steps) != outcome(method, others, steps) for steps in (1, len(LOOKED_AT)))


parser_of = functools.cache(command_line.flags_of)


def parsed(method: str, flags: str) -> dict[str, Any]:
    """Option -> value of some flags."""
    return parser_of(method).parse(shlex.split(flags))


def switches(method: str) -> list[str]:
    """The flags that may switch another option off: every other choice, every bool turned round, every number that can
    be 0, at 0, and every share at 1."""
    result = []
    for f in dataclasses.fields(METHODS[method].Options):
        about, default = f.metadata, default_of(f)
        if f.name in ("backbone", "ramp", "channels") or isinstance(default, list):  # none of which is ever off
            continue
        values = list(about["choices"] or [])
        values += [not default] if isinstance(default, bool) else []
        values += [0.0] if about["minimum"] == 0 else []
        values += [1.0] if (about["minimum"], about["maximum"]) == (0, 1) else []
        result += [as_flags({f.name: value}).strip() for value in values if value != default]
    return result


def refusal(method: str, flags: str) -> str:
    """What a command line is refused with; '' if it is not."""
    try:
        command_line.resolve(parsed(method, flags), METHODS[method])
    except UserError as e:
        return str(e)
    return ""


TOGETHER = [  # several that switch an option off together, or leave it one thing to do
    ("dtml", "--lambda-max 0 --consistency-on unlabeled", "ramp_end"),
    *(("asdnet", f"--lambda-adv 0 --attention none {off}", name)
      for off in ("--lambda-semi 0", "--semi-start 1", "--threshold 1", "--semi-start 0 --threshold 0.46")
      for name in ("critic_lr", "critic_image")),
    ("double-unc", "--learnable --gamma 0", "feature_blocks"),
    ("dk-uxnet", "--contrast mse --lambda-max 1", "temperature"),
]  # fmt: skip


def cases() -> list[tuple[str, str, str]]:
    """Method, a switch, and the name of another option that it may switch off: every one where the option's conditions
    name the switch; where they do not every third pair, of a switch that is a weight at 0 or a part left out."""
    chosen = []
    for method, own in OWN.items():
        conditions = {f.name: str(f.metadata["only_if"]) for f in dataclasses.fields(METHODS[method].Options)}
        for i, switch in enumerate(switches(method)):
            ((switched, value),) = parsed(method, switch).items()
            for j, name in enumerate(own):
                related = f"'{switched}'" in conditions[name]
                covering = value in (0, "none") and (i + j) % 3 == 0
                if (related or covering) and name not in {"classes", "backbone", "filters", "dropout", switched}:
                    chosen.append((method, switch, name))
    return chosen + TOGETHER


@pytest.mark.parametrize(("method", "name"), [(m, name) for m, own in OWN.items() for name in own if name != "classes"])
def test_every_option_of_a_method_changes_what_it_learns(method, name):
    for changed, beside in OWN[method][name]:
        assert differ(method, beside, f"{beside} {changed}"), changed


@pytest.mark.parametrize(("method", "switch", "name"), cases())
def test_option_acts_or_is_refused_and_idle(method, switch, name):
    """Of its flags in OWN one must act if one is not refused; a flag that is refused must have done nothing."""
    acts = []
    for changed, beside in OWN[method][name]:
        beside = f"{switch} {beside}"
        if parsed(method, switch).keys() & parsed(method, f"{changed} {beside[len(switch) :]}").keys():
            continue
        if refusal(method, beside):
            continue
        text = refusal(method, f"{beside} {changed}")
        if not text:
            try:
                acts.append(differ(method, beside, f"{beside} {changed}"))
            except UserError:  # the method refuses the two by itself
                continue
            if acts[-1]:
                return
            continue
        assert " does nothing with " in text
        everything = parsed(method, f"{beside} {changed}")
        (idle,) = (n for n, value in everything.items() if text.startswith(f"{flag_of(n, value)} does nothing "))
        without = as_flags({n: value for n, value in everything.items() if n != idle})
        same = outcome(method, " ".join(without.split())) == outcome(method, f"{beside} {changed}")
        assert same, f"the error says {text!r}, but the weights change: see the option's only_if"
    assert acts == [] or any(acts), f"--{name} does nothing with {switch} and is not refused"


@pytest.mark.parametrize("method", ["dtml-plus", "cps", "bcp", "ad-mt", "unimatch"])
def test_what_is_for_unlabeled_scans_is_refused_without_any_and_idle(method):
    alone = "--unlabeled 0"
    refused = set()
    for name, ((changed, _), *_) in OWN[method].items():
        if name not in {"classes", "backbone", "filters", "halvings", "batch_norm"}:
            text, acts = (
                refusal(method, f"{alone} {changed}"),
                outcome(method, alone) != outcome(method, f"{alone} {changed}"),
            )
            assert acts == (not text), f"{changed}: {text or 'not refused'}"
            refused |= {name} if text else set()
    assert bool(refused) == (method != "cps")  # whose networks teach each other on labeled crops as well
    if method == "cps":
        text = refusal(method, f"{alone} --pseudo-on unlabeled --pseudo-weight 1")
        assert text.startswith("--pseudo-weight does nothing with --pseudo-on unlabeled and --unlabeled 0")


def conditions() -> list[tuple[str, dataclasses.Field]]:
    """Method and option of each option that has conditions; those of the script once, for the first method."""
    classes = [(method, kind.Options) for method, kind in METHODS.items()]
    return [
        (method, f)
        for method, cls in [("dtml", settings.Options), *classes]
        for f in dataclasses.fields(cls)
        if f.metadata["only_if"]
    ]


def test_conditions_name_options_or_what_a_method_says():
    for method, f in conditions():
        kind = METHODS[method]
        o, method_options = command_line.combine({"data": "set", "method": method}, kind)
        for name in {name for condition in f.metadata["only_if"] for name in condition}:
            command_line.values_of(o, method_options, kind)(name)
            assert name in command_line.WHY or hasattr(o, name) or hasattr(method_options, name)
