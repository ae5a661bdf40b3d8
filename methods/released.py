"""A trained method from a checkpoint, or from weights of the released repositories, which save bare state dicts.

A file of UA-MT holds the student; one of its supervised V-Net, of DTC or of SASSNet holds the network. DTML saves two
networks with two heads each: M_s uses the segmentation head and M_d the distance head. Either file may be given alone.
Networks that no file holds (a teacher, a critic, the second network) keep their initial weights. No returned output
depends on them.
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

RELEASED = {  # method: the heads in its files, and output -> network that a file holds
    "dtml": (TWO_HEADS, {"seg": "M_s", "sdm": "M_d"}),
    "ua-mt": (ONE_HEAD, {"seg": "student"}),
    "supervised": (ONE_HEAD, {"seg": "network"}),
    "dtc": (TWO_HEADS, {"seg": "network"}),
    "sassnet": (TWO_HEADS, {"seg": "network"}),
}
SETTINGS: dict[str, Any] = {
    "data": "data/la", "profile": "full", "patch_size": [112, 112, 80], "downsample": 1, "iterations": 0
}  # fmt: skip
"""Settings of the papers. A file of bare weights does not state the number of iterations, so it is 0."""


def load_trained(
    checkpoint: str, *, method: str = "", sdm_weights: str = ""
) -> tuple[dict[str, Any], Method, tuple[str, ...]]:
    """Loads a trained method.

    Args:
        checkpoint: run folder or checkpoint file of train_dtml.py; with `method` a file of bare weights (for dtml, of
            M_s).
        method: method of the bare weights, a key of RELEASED; '' for a checkpoint, which states its method.
        sdm_weights: bare weights of M_d, for dtml only; `checkpoint` may then be ''.

    Returns:
        The contents of the checkpoint, the method on the CPU, and the names of the outputs that it can predict.

    Raises:
        UserError: for files that cannot be loaded or do not fit, and for arguments that contradict each other.
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
    """Builds the contents of a checkpoint from bare weights, with two more entries: `outputs` and `released`.

    Args:
        method: a key of RELEASED.
        files: 'seg' -> file of the segmentation network; for dtml also, or only, 'sdm' -> file of M_d.

    Returns:
        A checkpoint's contents. `outputs` are the names that the weights can predict. `released` maps each file name to
        the digest of the file.

    Raises:
        UserError: for files that cannot be loaded, lack the method's network, or do not fit each other.
    """
    heads, networks = RELEASED[method]
    loaded = {output: vnet_weights(path, heads) for output, path in files.items()}
    sizes = {(len(w["encoder.0.0.bias"]), len(w["heads.seg.0.bias"])) for w in loaded.values()}
    if len(sizes) > 1:
        raise UserError(
            f"{' and '.join(map(str, files.values()))} are networks of different size. Give one training's."
        )
    filters, channels = sizes.pop()
    options = fill(METHODS[method].Options, {"filters": filters, "softmax": channels == 2})
    fresh = METHODS[method](options, iterations=0)
    weights: dict[str, Tensor] = {}
    for output, network in loaded.items():
        unused = {"seg": "heads.sdm.", "sdm": "heads.seg."}[output] if method == "dtml" else "no weight"
        kept = {name: w for name, w in network.items() if not name.startswith(unused)}
        weights |= {f"{networks[output]}.{name}": w for name, w in kept.items()}
    outputs = fresh.outputs if set(files) == set(networks) else tuple(files)
    return {
        "format": FORMAT, "options": {**SETTINGS, "method": method, **dataclasses.asdict(options)},
        "iteration": 0, "seconds": 0.0, "checksums": {}, "processes": 1, "optimizer": {},
        "method": fresh.state_dict() | weights,
        "spacing": [0.625] * 3,  # mm, of LA
        "file": " and ".join(map(str, files.values())),
        "outputs": tuple(name for name in outputs if name != "teacher"),
        "released": {path.name: digest(np.frombuffer(path.read_bytes(), np.uint8)) for path in files.values()},
    }  # fmt: skip
