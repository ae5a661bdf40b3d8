"""The signed distance map of crops: the released routine, scipy on boxes, and ours.

    python -m benchmarks.sdm --threads 2

The released routine computes both distance transforms on the whole crop, and the boundary separately.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries

from benchmarks.timing import scans, side_by_side, table
from losses.sdm import signed_distance_map
from utils.errors import run
from utils.masks import box_of
from utils.options import option, read_flags


@dataclasses.dataclass
class Options:
    """Options of the benchmark."""

    data: str = option("", "folder of the data set (default data/la, else phantoms)")
    patch_size: list[int] = option([112, 112, 80], "voxels of a crop along x, y, z", nargs=3, minimum=1)
    scans: int = option(8, "number of test scans, with a crop of each", minimum=1)
    rounds: int = option(7, "timed repeats", minimum=1)
    threads: int = option(2, "CPU threads", minimum=1)


def released(mask: NDArray) -> NDArray:
    """The released routine: both transforms on the whole crop (W,H,D), and the boundary."""
    inside = mask > 0
    d_in, d_out = distance_transform_edt(inside), distance_transform_edt(~inside)
    sdm = d_out / d_out.max() - d_in / d_in.max()
    sdm[find_boundaries(inside, mode="inner")] = 0
    return sdm


def on_box(mask: NDArray) -> NDArray:
    """Our algorithm with scipy's distance transform; mask (W,H,D)."""
    inside = mask > 0
    d_out, box = distance_transform_edt(~inside), box_of(inside, margin=1)
    d_in = distance_transform_edt(inside[box])
    sdm = d_out / d_out.max()
    sdm[box] -= np.where(d_in == 1, 0, d_in / d_in.max())
    return sdm


FORMS = {"released": released, "scipy, inside on the object's box": on_box, "ours": signed_distance_map}


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m benchmarks.sdm", argv)
    torch.set_num_threads(o.threads)
    crops = []
    for _, _, label in scans(o.data, o.scans):
        middle = [int(i.mean()) for i in np.nonzero(label)]
        start = [
            min(max(m - p // 2, 0), max(s - p, 0)) for m, p, s in zip(middle, o.patch_size, label.shape, strict=True)
        ]
        crops.append(np.ascontiguousarray(label[*(slice(a, a + p) for a, p in zip(start, o.patch_size, strict=True))]))
    forms = {name: lambda form=form: [form(crop) for crop in crops] for name, form in FORMS.items()}
    timings = side_by_side(forms, rounds=o.rounds)
    largest = {n: max(float(np.abs(f(crop) - released(crop)).max()) for crop in crops) for n, f in FORMS.items()}
    size = "x".join(map(str, o.patch_size))
    print(f"{len(crops)} crops of {size}, threads: {o.threads}, {o.rounds} rounds.\n")
    head = ["form", "ms a crop", "times as fast", "peak MiB", "largest difference"]
    rows = [[n, 1000 * t.seconds / len(crops), t.ratio, t.peak_mib, largest[n]] for n, t in timings.items()]
    print(table(head, rows))


if __name__ == "__main__":
    run(main)
