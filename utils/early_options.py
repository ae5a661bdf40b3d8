"""Options of checkpoints and options files of any age, read under the names of today."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import UserError
from utils.options import flag_of

RENAMED = {  # method: an option's name in early checkpoints and options files -> its name today
    "dk-uxnet": {"noise": "noise_variance", "scale": "logit_scale", "consistency": "consistency_terms"},
    "ss-net": {"masks": "dropout_masks"},
}
ADDED = {"softmax": False}  # an option that early checkpoints and records lack -> what they were
BEFORE_PRESETS = {"batch_norm": "joint"}  # an option that presets set -> what it was in runs whose options lack it
RENAMED_PRESETS = {"dtml": {"best": "tuned"}}
REMOVED: dict[str, dict[str, Any]] = {  # method: an option that is gone -> its value with which it did nothing
    "dtml": {"k_start": 0.0, "consistency": "mask", "mix": 0.0, "ema_decay": 0.0},
}


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Saved options of any age, `method` among them, under the names of today."""
    method = str(options.get("method"))
    names, presets = RENAMED.get(method, {}), RENAMED_PRESETS.get(method, {})
    options = ADDED | {names.get(name, name): value for name, value in options.items()}
    if options.get("preset") in presets:
        options["preset"] = presets[options["preset"]]
    return options


def renamed_words(words: Sequence[str], method: str) -> list[str]:
    """The words of an options file of any age, of a run of this method, under the names of today.

    Raises:
        UserError: the run used an option that is gone.
    """
    names = {flag_of(old): flag_of(new) for old, new in RENAMED.get(method, {}).items()}
    presets = RENAMED_PRESETS.get(method, {})
    removed = {flag_of(name): name for name in REMOVED.get(method, {})}
    today: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in removed:
            refuse_removed(method, {removed[flag]: value if equals else next(rest, "")})
        elif today[-1:] == ["--preset"] and word in presets:
            today += [presets[word], *([] if "--normalize" in words else ["--normalize", "none"])]
        else:
            today.append(names.get(flag, flag) + equals + value)
    return today


def refuse_removed(method: str, options: Mapping[str, Any]) -> None:
    """Refuses options of a run that this code no longer has, if they did something.

    Raises:
        UserError: names the option and its value.
    """
    for name, idle in REMOVED.get(method, {}).items():
        value = options.get(name, idle)
        if str(value) not in (str(idle), str(idle).removesuffix(".0")):
            raise UserError(
                f"this run has {flag_of(name)} {value}, an option that {method} no longer has. Use the version that "
                "wrote it."
            )
