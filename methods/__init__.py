"""One file per method: what is minimised, what is predicted. A new method is one file and one line of this table."""

from typing import Any

from methods.asdnet import ASDNet
from methods.base import Losses, Method, check_finite
from methods.double_unc import DoubleUnc
from methods.dtc import DTC
from methods.dtml import DTML
from methods.mean_teacher import MeanTeacher
from methods.sassnet import SASSNet
from methods.supervised import Supervised
from methods.tcse import TCSE
from methods.ua_mt import UAMT
from utils.errors import UserError
from utils.options import fill

METHODS: dict[str, type[Method]] = {
    "dtml": DTML,
    "supervised": Supervised,
    "mean-teacher": MeanTeacher,
    "ua-mt": UAMT,
    "tcse": TCSE,
    "dtc": DTC,
    "sassnet": SASSNet,
    "asdnet": ASDNet,
    "double-unc": DoubleUnc,
}


def restore(state: dict[str, Any]) -> Method:
    """The method of a checkpoint, with its weights.

    Raises:
        UserError: if the checkpoint names no method of the table, or its weights do not fit the method it names.
    """
    try:
        options = state["options"]
        kind = METHODS[options["method"]]
        method = kind(fill(kind.Options, options), iterations=options["iterations"])
        method.load_state_dict(state["method"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(
            f"{state['file']} does not fit this code ({str(e).splitlines()[0]}). Another version wrote it."
        ) from e
    return method


__all__ = ["METHODS", "Losses", "Method", "check_finite", "restore"]
