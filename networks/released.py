"""The V-Net of the released repositories: the released names of its layers and ours.

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
"""Prefix of the released names -> prefix of our names."""
ONE_HEAD = {"out_conv.": "heads.seg.0."}
TWO_HEADS = {"out_conv.": "heads.sdm.0.", "out_conv2.": "heads.seg.0."}
SHOWN = 4  # names listed per problem in an error message


def vnet_weights(path: Path, heads: dict[str, str]) -> dict[str, Tensor]:
    """Converts a file of bare weights to the state_dict of our V-Net.

    The file may come from DataParallel (names that begin with `module.`) and have any number of filters.

    Args:
        heads: ONE_HEAD or TWO_HEADS, the heads in the file.

    Raises:
        UserError: if the file cannot be loaded, or if weights are missing, unexpected, of another shape or not finite;
            the message lists them by the names in the file.
    """
    saved = load_weights(path)
    if all(name.startswith("module.") for name in saved):
        saved = {name.removeprefix("module."): weight for name, weight in saved.items()}
    weights, missing, unfit = {}, [], []
    for theirs, name, shape in _expected(saved, heads):
        if theirs in saved:
            weight = weights[name] = saved.pop(theirs)
            if weight.shape != shape:
                unfit.append(f"{theirs} {tuple(weight.shape)} in place of {tuple(shape)}")
            elif not torch.isfinite(weight).all():
                unfit.append(f"{theirs} not finite")
        elif name.endswith("num_batches_tracked"):  # absent before torch 0.4.1, and unused here
            weights[name] = torch.zeros(shape, dtype=torch.long)
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
    return weights


def _expected(saved: dict[str, Tensor], heads: dict[str, str]) -> list[tuple[str, str, torch.Size]]:
    """Released name, our name and shape of every weight of a V-Net with the filters and channels of the saved one."""

    def size(name: str, usual: int) -> int:
        return max(saved[name].numel(), 1) if name in saved else usual

    channels = min(size("out_conv.bias", 2), 2) if heads is ONE_HEAD else 1
    shape = {ours.split(".")[1]: channels for ours in heads.values()}
    with torch.device("meta"):  # shapes only, no memory
        ours = VNet(heads=shape, filters=size("block_one.conv.0.bias", 16)).state_dict()
    prefixes = {mine: theirs for theirs, mine in (NAMES | heads).items()}
    expected = []
    for name, weight in ours.items():
        mine = next(prefix for prefix in prefixes if name.startswith(prefix))
        expected.append((prefixes[mine] + name.removeprefix(mine), name, weight.shape))
    return expected
