"""The V-Net of the released repositories: its names of the layers beside ours.

UA-MT saves a V-Net with one head, `out_conv`, of two softmax channels. In DTC, SASSNet and DTML the V-Net has two heads
of one channel: `out_conv` is the map z = tanh(.), `out_conv2` the segmentation.
"""

from pathlib import Path

import torch
from torch import Tensor

from networks.vnet import VNet
from utils.checkpoint import load_weights
from utils.errors import UserError

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLOCKS = [*(f"encoder.{i}" for i in range(4)), "bottom", *(f"decoder.{i}" for i in range(4))]
NAMES = {
    **{f"block_{n}.conv.": f"{ours}." for n, ours in zip(NUMBERS, BLOCKS, strict=True)},
    **{f"block_{n}_dw.conv.": f"down.{i}." for i, n in enumerate(NUMBERS[:4])},
    **{f"block_{n}_up.conv.": f"up.{i}." for i, n in enumerate(NUMBERS[4:8])},
}
"""Beginnings of the released names -> of ours."""
ONE_HEAD = {"out_conv.": "heads.seg.0."}
TWO_HEADS = {"out_conv.": "heads.sdm.0.", "out_conv2.": "heads.seg.0."}
SHOWN = 4  # names of a kind in a message


def vnet_weights(path: Path, heads: dict[str, str]) -> dict[str, Tensor]:
    """A file of bare weights -> the state_dict of our V-Net with all heads of the file, ONE_HEAD or TWO_HEADS.

    The file may come from DataParallel (names that begin with `module.`) and have any number of filters.

    Raises:
        UserError: the file cannot be loaded, or lacks weights, has others, or has them in another shape or not finite;
            the text lists what differs, by the names of the file.
    """
    saved = load_weights(path)
    if all(name.startswith("module.") for name in saved):
        saved = {name.removeprefix("module."): weight for name, weight in saved.items()}
    found, missing, unfit = {}, [], []
    for theirs, name, shape in _expected(saved, heads):
        if theirs in saved:
            weight = found[name] = saved.pop(theirs)
            if weight.shape != shape:
                unfit.append(f"{theirs} {tuple(weight.shape)} in place of {tuple(shape)}")
            elif not torch.isfinite(weight).all():
                unfit.append(f"{theirs} not finite")
        elif name.endswith("num_batches_tracked"):  # torch before 0.4.1 did not count them, and nothing here reads it
            found[name] = torch.zeros(shape, dtype=torch.long)
        else:
            missing.append(theirs)
    lines = [
        f"  {what}: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in (("missing", missing), ("unexpected", sorted(saved)), ("unfit", unfit))
        if names
    ]
    if lines:
        kind = "one head (out_conv)" if heads is ONE_HEAD else "two heads (out_conv, out_conv2)"
        raise UserError(
            f"{path} does not hold the released V-Net with {kind}. Give the --method that saved it: ua-mt and "
            "supervised have one head, dtc, sassnet and dtml two.\n" + "\n".join(lines)
        )
    return found


def _expected(saved: dict[str, Tensor], heads: dict[str, str]) -> list[tuple[str, str, torch.Size]]:
    """Released name, our name and shape of every weight of a V-Net as large as the saved one seems to be."""

    def size(name: str, usual: int) -> int:
        return max(saved[name].numel(), 1) if name in saved else usual

    channels = min(size("out_conv.bias", 2), 2) if heads is ONE_HEAD else 1
    shape = {ours.split(".")[1]: channels for ours in heads.values()}
    with torch.device("meta"):  # shapes without memory
        ours = VNet(heads=shape, filters=size("block_one.conv.0.bias", 16)).state_dict()
    begins = {mine: theirs for theirs, mine in (NAMES | heads).items()}
    expected = []
    for name, weight in ours.items():
        mine = next(begin for begin in begins if name.startswith(begin))
        expected.append((begins[mine] + name.removeprefix(mine), name, weight.shape))
    return expected
