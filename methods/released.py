"""A trained method from a checkpoint, or from weights of the released repositories, which save bare state dicts.

Those of UA-MT and of its supervised V-Net become the student or the network, those of DTC and SASSNet the network.
DTML saves two networks of two heads each, of which M_s uses the segmentation and M_d the map; either may be given
alone. What a file does not hold (a teacher, a critic, the other network) keeps the values of a fresh method, and no
output that is returned depends on it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from methods import METHODS, Method, restore
from networks.released import ONE_HEAD, TWO_HEADS, vnet_weights
from utils.checkpoint import FORMAT, load_checkpoint
from utils.errors import UserError
from utils.options import fill
from utils.run_folder import digest

RELEASED = {  # method: the heads of its files, and which network each file is
    "dtml": (TWO_HEADS, {"seg": "M_s", "sdm": "M_d"}),
    "ua-mt": (ONE_HEAD, {"seg": "student"}),
    "supervised": (ONE_HEAD, {"seg": "network"}),
    "dtc": (TWO_HEADS, {"seg": "network"}),
    "sassnet": (TWO_HEADS, {"seg": "network"}),
}
SETTINGS: dict[str, Any] = {
    "data": "data/la", "profile": "full", "patch_size": [112, 112, 80], "downsample": 1, "iterations": 0
}  # fmt: skip
"""Of the papers; for how many iterations a released network was trained its file does not tell."""


def load_trained(
    checkpoint: str, *, method: str = "", sdm_weights: str = ""
) -> tuple[dict[str, Any], Method, tuple[str, ...]]:
    """The state of a checkpoint, its method on the CPU, and the outputs that its weights give.

    Args:
        checkpoint: run folder or file of train_dtml.py; with `method` a file of bare weights, that of M_s for dtml.
        method: of the bare weights, a key of RELEASED; '' for a checkpoint, which knows its own.
        sdm_weights: bare weights of M_d, for dtml; `checkpoint` may then be ''.

    Raises:
        UserError: files that cannot be loaded or do not fit, and arguments that do not fit each other.
    """
    if sdm_weights and method != "dtml":
        raise UserError("--sdm-weights are those of M_d, the second network of DTML. Give --method dtml with them.")
    if not checkpoint and not sdm_weights:
        what = f"the file of {method}'s bare weights" if method else "a run folder or a .pt file of train_dtml.py"
        raise UserError(f"--checkpoint is missing. Give {what}.")
    if method:
        files = {output: Path(file) for output, file in (("seg", checkpoint), ("sdm", sdm_weights)) if file}
        state = released_state(method, files)
        return state, restore(state), state["outputs"]
    state = load_checkpoint(Path(checkpoint))
    trained = restore(state)
    return state, trained, trained.outputs


def released_state(method: str, files: dict[str, Path]) -> dict[str, Any]:
    """A checkpoint's contents, and `outputs` and `released` beside them, from bare weights.

    Args:
        method: a key of RELEASED.
        files: 'seg' the file of the segmenting network, for dtml also or only 'sdm', that of M_d.

    Raises:
        UserError: files that cannot be loaded, do not hold the method's network, or do not fit each other.
    """
    heads, networks = RELEASED[method]
    found = {output: vnet_weights(path, heads) for output, path in files.items()}
    sizes = {(len(w["encoder.0.0.bias"]), len(w["heads.seg.0.bias"])) for w in found.values()}
    if len(sizes) > 1:
        raise UserError(
            f"{' and '.join(map(str, files.values()))} are networks of different size. Give one training's."
        )
    filters, channels = sizes.pop()
    options = fill(METHODS[method].Options, {"filters": filters, "softmax": channels == 2})
    fresh = METHODS[method](options, iterations=0)
    weights: dict[str, Tensor] = {}
    for output, network in found.items():
        unused = {"seg": "heads.sdm.", "sdm": "heads.seg."}[output] if method == "dtml" else "none of them"
        kept = {name: w for name, w in network.items() if not name.startswith(unused)}
        weights |= {f"{networks[output]}.{name}": w for name, w in kept.items()}
    given = (*fresh.outputs,) if set(files) == set(networks) else tuple(files)
    return {
        "format": FORMAT, "options": {**SETTINGS, "method": method, **dataclasses.asdict(options)},
        "iteration": 0, "seconds": 0.0, "checksums": {}, "processes": 1, "optimizer": {},
        "method": fresh.state_dict() | weights,
        "spacing": [0.625] * 3,  # mm, of LA
        "file": " and ".join(map(str, files.values())),
        "outputs": tuple(name for name in given if name != "teacher"),
        "released": {path.name: digest(np.frombuffer(path.read_bytes(), np.uint8)) for path in files.values()},
    }  # fmt: skip
