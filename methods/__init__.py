"""One file per method: what is minimised, what is predicted.

A new method is one file, one import and one line of METHODS.
"""

from typing import Any

import torch

from methods.ad_mt import ADMT
from methods.asdnet import ASDNet
from methods.base import Losses, Method
from methods.bcp import BCP
from methods.cps import CPS
from methods.dk_uxnet import DKUXNet
from methods.double_unc import DoubleUnc
from methods.dtc import DTC
from methods.dtml import DTML
from methods.dtml_plus import DTMLPlus
from methods.finite import Watch, check_finite
from methods.mc_net_plus import MCNetPlus
from methods.mean_teacher import MeanTeacher
from methods.sassnet import SASSNet
from methods.ss_net import SSNet
from methods.supervised import Supervised
from methods.tcse import TCSE
from methods.ua_mt import UAMT
from methods.unimatch import UniMatch
from utils.errors import UserError
from utils.options import fill

METHODS: dict[str, type[Method]] = {  # by the names of --method
    "dtml": DTML,
    "dtml-plus": DTMLPlus,
    "supervised": Supervised,
    "mean-teacher": MeanTeacher,
    "asdnet": ASDNet,
    "tcse": TCSE,
    "ua-mt": UAMT,
    "dtc": DTC,
    "sassnet": SASSNet,
    "double-unc": DoubleUnc,
    "dk-uxnet": DKUXNet,
    "cps": CPS,
    "bcp": BCP,
    "ad-mt": ADMT,
    "mc-net-plus": MCNetPlus,
    "ss-net": SSNet,
    "unimatch": UniMatch,
}


def restore(state: dict[str, Any]) -> Method:
    """Builds the method of a checkpoint, whose contents `load_checkpoint` has returned, on the CPU and loads its
    weights.

    Raises:
        UserError: if METHODS lacks the checkpoint's method, or the weights do not fit the method.
    """
    try:
        options = state["options"]
        kind = METHODS[options["method"]]
        arguments = {"options": fill(kind.Options, options), "iterations": options["iterations"]}
        with torch.device("meta"):  # compares the shapes before any memory is allocated for them
            expected = kind(**arguments).state_dict()
        for name, weight in expected.items():
            saved = state["method"][name]
            if isinstance(weight, torch.Tensor) and weight.shape != saved.shape:
                raise ValueError(f"{name} has the shape {tuple(saved.shape)}, not {tuple(weight.shape)}")
        method = kind(**arguments)
        method.load_state_dict(state["method"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(
            f"{state['file']} does not fit this code ({str(e).splitlines()[0]}). Another version wrote it."
        ) from e
    return method


__all__ = ["METHODS", "Losses", "Method", "Watch", "check_finite", "restore"]
