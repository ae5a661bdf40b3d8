"""--help lists every option of every script and method, with its default."""

import dataclasses
from collections.abc import Callable

import pytest

import predict
import settings
import test_la
import train_dtml
from methods import METHODS
from tools import convert
from utils.options import default_of


def help_of(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Flag -> its words in the --help text."""
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    texts: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.partition("options:")[2].splitlines():
        if line.startswith("  -"):
            flag = line.split()[0].rstrip(",")
            texts[flag] = line
        elif line.startswith("   ") and flag:
            texts[flag] += " " + line
    return {flag: " ".join(text.split()) for flag, text in texts.items()}


OTHERS = {"test": test_la, "predict": predict, "convert": convert}


@pytest.mark.parametrize("script", [*METHODS, *OTHERS])
def test_help_lists_every_option_with_its_default(script, capsys):
    if script in OTHERS:
        classes, shown = [OTHERS[script].Options], help_of(OTHERS[script].main, [], capsys)
        shown.pop("-o", None)  # of predict.py, the same as --out
    else:
        classes = [settings.Options, METHODS[script].Options]
        shown = help_of(train_dtml.main, ["--method", script], capsys)
    fields = [f for cls in classes for f in dataclasses.fields(cls) if f.metadata["flag"]]
    assert set(shown) == {"-h", *("--" + f.name.replace("_", "-") for f in fields)}
    for f in fields:
        text, default = shown["--" + f.name.replace("_", "-")], default_of(f)
        assert f.metadata["help"] in text
        if isinstance(default, bool):
            default = "yes" if default else "no"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        elif isinstance(default, float):
            default = f"{default:g}"
        assert default in (None, "") or text.endswith(f"(default {default})")
