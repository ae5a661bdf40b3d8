"""One file per method: what is minimised, what is predicted. A new method is one file and one line of this table."""

from importlib import import_module
from typing import Any

import torch

from methods.base import Losses, Method
from methods.finite import Watch, check_finite
from utils.errors import UserError
from utils.options import fill

TABLE = {  # name of --method: file and class
    "dtml": "dtml.DTML",
    "dtml-plus": "dtml_plus.DTMLPlus",
    "supervised": "supervised.Supervised",
    "mean-teacher": "mean_teacher.MeanTeacher",
    "asdnet": "asdnet.ASDNet",
    "tcse": "tcse.TCSE",
    "ua-mt": "ua_mt.UAMT",
    "dtc": "dtc.DTC",
    "sassnet": "sassnet.SASSNet",
    "double-unc": "double_unc.DoubleUnc",
    "dk-uxnet": "dk_uxnet.DKUXNet",
}


def _load(where: str) -> type[Method]:
    file, _, name = where.partition(".")
    return getattr(import_module(f"methods.{file}"), name)


METHODS: dict[str, type[Method]] = {name: _load(where) for name, where in TABLE.items()}


def restore(state: dict[str, Any]) -> Method:
    """The method of a checkpoint, with its weights.

    Raises:
        UserError: if the checkpoint names no method of the table, or its weights do not fit the method it names.
    """
    try:
        options = state["options"]
        kind = METHODS[options["method"]]
        words = {"options": fill(kind.Options, options), "iterations": options["iterations"]}
        with torch.device("meta"):  # shapes without memory: a hostile file may ask for networks of any size
            expected = kind(**words).state_dict()
        for name, weight in expected.items():
            found = state["method"][name]
            if isinstance(weight, torch.Tensor) and weight.shape != found.shape:
                raise ValueError(f"{name} has the shape {tuple(found.shape)}, not {tuple(weight.shape)}")
        method = kind(**words)
        method.load_state_dict(state["method"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(
            f"{state['file']} does not fit this code ({str(e).splitlines()[0]}). Another version wrote it."
        ) from e
    return method


__all__ = ["METHODS", "Losses", "Method", "Watch", "check_finite", "restore"]
