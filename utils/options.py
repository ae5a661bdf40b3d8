"""Command lines from dataclasses: one flag per field, its default and its help in one place."""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError
from utils.other_names import called_here
from utils.text import did_you_mean, read_text, refuse_bytes

PLACES = ("checkpoint", "source", "test", "data")  # flags that name what a script works on, the likeliest first
Condition = Mapping[str, tuple[Any, ...] | Callable[[Any], Any]]
"""Name of another option -> the values of it, or the test of its value, with which an option does something."""


def option(
    default: Any,
    help: str,
    *,
    group: str = "run",
    type: Any = None,
    choices: Sequence[Any] | None = None,
    nargs: int | str | None = None,
    minimum: float | None = None,
    maximum: float = math.inf,
    harmless: bool = False,
    only_if: Condition | Sequence[Condition] = (),
    flag: bool = True,
    word: str = "",
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        harmless: a resumed run may change it, because it changes no result beyond rounding.
        type: of the value, needed where the default is None or an empty list.
        only_if: the option has an effect only if this condition, or one of a list of them, holds completely. If none
            does, `refuse_unused` refuses the flag.
        flag: False of a field that the data decide; no flag sets it.
        word: what --help calls a word that is given without a flag; such words stand in the order of the fields.
    """
    about = {"help": help, "group": group, "type": type, "choices": choices, "nargs": nargs, "flag": flag}
    about |= {"word": word, "minimum": minimum, "maximum": maximum, "harmless": harmless}
    about["only_if"] = [only_if] if isinstance(only_if, Mapping) else list(only_if)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def default_of(f: dataclasses.Field) -> Any:
    """The default value of a field made by `option`."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def with_defaults(options: Mapping[str, Any], classes: Iterable[type]) -> dict[str, Any]:
    """Saved options of a run, those that it lacks at their default: an option added later does nothing there."""
    return {f.name: default_of(f) for cls in classes for f in dataclasses.fields(cls)} | dict(options)


class Parser(argparse.ArgumentParser):
    """Hyphenated flags (underscores accepted), no abbreviations, @FILE replays flags, typos name the nearest flag."""

    def __init__(self, *, renamed: Mapping[str, str] = {}, owners: Mapping[str, Sequence[str]] = {}, **kwargs: Any):
        self.renamed, self.owners = renamed, owners  # early name -> name of today; name -> methods that have it
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            argument_default=argparse.SUPPRESS,
            **kwargs,
        )

    def expand(
        self, argv: Sequence[str] | None = None, read: Callable[[list[str], str], list[str]] = lambda flags, text: flags
    ) -> list[str]:
        """The arguments of a command line (default: the program's). Each @FILE is replaced by the flags in it, after
        `read` has changed them by the text of the file."""
        arguments: list[str] = []
        for argument in sys.argv[1:] if argv is None else argv:
            if not argument.startswith("@"):
                arguments.append(argument)
                continue
            try:
                text = read_text(Path(argument[1:]))
                stored = shlex.split(text, comments=True)
            except (OSError, ValueError) as e:
                why = getattr(e, "strerror", None) or e
                raise UserError(
                    f"cannot read the options file {argument[1:]}: {why}. Give an options.txt of a run."
                ) from e
            arguments += read([self._hyphenate(argument) for argument in stored], text)
        for argument in arguments:
            refuse_bytes(argument)
        return [self._hyphenate(argument) for argument in arguments]

    @staticmethod
    def _hyphenate(word: str) -> str:
        flag, equals, value = word.partition("=")
        return flag.replace("_", "-") + equals + value if word.startswith("--") else word

    def parse(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Option name -> value, only of the options on the command line."""
        # Positional words may stand anywhere among the flags.
        options, unknown = self.parse_known_intermixed_args(self.expand(argv))
        if unknown:
            flag = next((w for w in unknown if w.startswith("-")), unknown[0]).partition("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            if name in self.renamed:
                self.error(f"unknown argument {flag}: it is called {flag_of(self.renamed[name])} now.")
            owners = self.owners.get(name) or self.owners.get(name.removeprefix("no_"))
            if owners:
                self.error(f"unknown argument {flag}. It is an option of --method {', '.join(owners)}.")
            names = [name.lstrip("-") for name in self._option_string_actions]  # the dashes would make all look alike
            here = called_here(flag.lstrip("-"), names)
            if here:
                self.error(f"unknown argument {flag}. Here it is {here}.")
            places = [place for place in PLACES if place in names] if Path(flag).exists() else []
            if places:
                self.error(f"unknown argument {flag}. Did you mean --{places[0]} {flag}?")
            near = difflib.get_close_matches(flag.lstrip("-"), names, n=1, cutoff=0.75)
            self.error(f"unknown argument {flag}." + (f" Did you mean --{near[0]}?" if near else " See --help."))
        return vars(options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"{value!r} must be one of {', '.join(choices)}.{near}")

    def error(self, message: str) -> NoReturn:
        raise UserError(message if message.endswith((".", "?")) else f"{message}. See --help.")

    def add_dataclass(self, cls: type, title: str | None = None) -> None:
        """Adds a flag for every field of the dataclass made by `option`, grouped by its `group`, or under `title`."""
        groups: dict[str, Any] = {}
        for f in (f for f in dataclasses.fields(cls) if f.metadata["flag"]):
            about, default = f.metadata, default_of(f)
            name = "" if about["word"] else title or about["group"]
            if name not in groups:
                groups[name] = self.add_argument_group(name) if name else self
            text = about["help"].replace("%", "%%")
            if default not in (None, "", []):
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                shown = f"{shown:g}" if isinstance(shown, float) else shown
                text += f" (default {'yes' if shown is True else 'no' if shown is False else shown})"
            flag = f.name if about["word"] else flag_of(f.name)
            if isinstance(default, bool) or about["type"] is bool:
                groups[name].add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
                continue
            kind = about["type"] or type(default[0] if isinstance(default, list) else default)
            extra: dict[str, Any] = {"type": _within(kind, about["minimum"], about["maximum"]), "help": text}
            if about["choices"]:
                extra["choices"] = list(about["choices"])
            else:
                extra["metavar"] = about["word"] or {int: "N", float: "X"}.get(kind, f.name.upper())
            if about["nargs"]:
                extra["nargs"] = about["nargs"]
            groups[name].add_argument(flag, **extra)


def _within(kind: Any, minimum: float | None, maximum: float) -> Any:
    """The type of a flag, refusing what is outside its bounds or not finite."""
    if minimum is None:
        return kind

    def parse(word: str) -> Any:
        value = kind(word)
        if not minimum <= value <= maximum or value == math.inf:
            limit = "at least {:g} and finite" if maximum == math.inf else "between {:g} and {:g}"
            raise argparse.ArgumentTypeError(f"{word} must be {limit.format(minimum, maximum)}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its errors
    return parse


def fill(cls: type, *layers: dict[str, Any]) -> Any:
    """An instance of the dataclass from its defaults and the layers, later ones winning; other keys are left alone."""
    names = {f.name for f in dataclasses.fields(cls)}
    merged = {k: v for layer in layers for k, v in layer.items() if k in names}
    return cls(**merged)


def read_flags(cls: type, description: str | None, prog: str, argv: Sequence[str] | None) -> Any:
    """The options of a command from its command line; None: that of the program."""
    parser = Parser(description=description, prog=prog)
    parser.add_dataclass(cls)
    return fill(cls, parser.parse(argv))


def flag_of(name: str, value: Any = None) -> str:
    """--name, or --no-name of a bool that is False."""
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def as_flags(values: dict[str, Any]) -> str:
    """Lines of flags that @FILE replays; None is a default that depends on others and is left out."""
    lines = []
    for name, value in values.items():
        if value is not None:
            flag, words = flag_of(name, value), value if isinstance(value, (list, tuple)) else [value]
            lines.append(flag if isinstance(value, bool) else f"{flag} {shlex.join(map(str, words))}")
    return "\n".join(lines) + "\n"


DERIVED = "# Derived from the above. They are derived again when this file is replayed.\n"


def options_file(chosen: dict[str, Any], everything: dict[str, Any]) -> str:
    """The text of an options.txt: the chosen options as flags to replay, all others as comments."""
    rest = {name: value for name, value in everything.items() if chosen.get(name) is None}
    comments = "".join(f"# {line}\n" for line in as_flags(rest).splitlines())
    return as_flags(chosen) + DERIVED + comments


def unmet_conditions(f: dataclasses.Field, value_of: Callable[[str], Any]) -> list[str]:
    """The names whose values leave an option without effect, one for each condition; [] if it has an effect."""

    def holds(name: str, wanted: tuple[Any, ...] | Callable[[Any], Any]) -> bool:
        return bool(value_of(name) in wanted if isinstance(wanted, tuple) else wanted(value_of(name)))

    unmet = [
        [name for name, wanted in condition.items() if name != f.name and not holds(name, wanted)]
        for condition in f.metadata["only_if"]
    ]
    return list(dict.fromkeys(names[0] for names in unmet)) if all(unmet) else []


def refuse_unused(
    chosen: dict[str, Any],
    classes: Iterable[type],
    value_of: Callable[[str], Any],
    usual: Callable[[str], Any],
    why: Mapping[str, str],
) -> None:
    """Refuses a flag that has no effect with the others.

    Args:
        chosen: option -> value of the command line.
        classes: the dataclasses of the options, whose `only_if` says when each has an effect.
        value_of: the value that a name of `only_if` has in this run.
        usual: the value that an option would have without its flag, which is never refused.
        why: a name of `only_if` that is not an option -> the message if it does not hold.

    Raises:
        UserError: naming the flag and those with which it has no effect.
    """
    for f in (f for cls in classes for f in dataclasses.fields(cls) if f.name in chosen):
        names = unmet_conditions(f, value_of)
        if not names or chosen[f.name] == usual(f.name):
            continue
        flag = f"{flag_of(f.name, chosen[f.name])} does nothing"
        if names[0] in why:
            raise UserError(f"{flag} here: {why[names[0]]}. Leave it out.")
        shown = " and ".join(as_flags({name: value_of(name)}).strip() for name in names)
        raise UserError(f"{flag} with {shown}. Leave one of them out.")


def harmless_names(classes: Iterable[type]) -> set[str]:
    """Names of the options that cannot change a run's result."""
    return {f.name for cls in classes for f in dataclasses.fields(cls) if f.metadata["harmless"]}


def varied(now: Any, usual: Any, skip: Sequence[str] = ()) -> list[str]:
    """The options that differ between two instances of a dataclass and can change a result, for a run's name."""
    parts = []
    for f in dataclasses.fields(now):
        value = getattr(now, f.name)
        ignored = f.metadata["harmless"] or not f.metadata["flag"] or f.name in skip
        if ignored or value == getattr(usual, f.name):
            continue
        by = "" if value and isinstance(value, list) and isinstance(value[0], str) else "x"  # axes yz, sides 32x32x16
        shown = by.join(map(str, value)) if isinstance(value, list) else value
        parts.append(f"{f.name.replace('_', '')}{shown}".replace("/", "of"))
    return parts


def refuse_differences(chosen: dict[str, Any], saved: dict[str, Any], harmless: set[str], folder: Path) -> None:
    """Raises UserError for options of the command line that differ from the run's and could change its result."""
    differ = [name for name, value in chosen.items() if name not in harmless and value != saved.get(name)]
    if differ:
        lines = [f"  {flag_of(name)}: {saved.get(name)} before, {chosen[name]} now" for name in differ]
        more = "\n  --iterations can be raised once the run is finished." if "iterations" in differ else ""
        raise UserError(
            f"the run {folder} was started with other options. Resume it without these, or start another run with "
            "--fresh or --name:\n" + "\n".join(lines) + more
        )
