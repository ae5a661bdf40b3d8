"""Signed distance maps, negative inside: the target of L_dis, of DTC and of SASSNet (DTML's equation (1))."""

import edt
import numpy as np
import torch
from numpy.typing import NDArray

from utils.masks import box_of


def signed_distance_map(mask: NDArray) -> NDArray[np.float32]:
    """mask (any shape, of 0 and 1) -> float32 map of the same shape in [-1,1].

    Outside d_out / max d_out, inside -d_in / max d_in, each Euclidean in voxels to the nearest voxel of the other
    side, and 0 on the inner boundary (object voxels with a face neighbour outside). An empty mask gives +1
    everywhere and a full one -1; the released codes give 0 and not-a-number there. On as many threads as torch.
    """
    threads = torch.get_num_threads()
    inside = np.asarray(mask) > 0
    if not inside.any():
        return np.ones(inside.shape, np.float32)
    if inside.all():
        return np.full(inside.shape, -1, np.float32)
    d_out = edt.edt(~inside, parallel=threads)
    box = box_of(inside, margin=1)  # every nearest background voxel lies within one voxel of the object's box
    d_in = edt.edt(inside[box], parallel=threads)
    sdm = d_out / d_out.max()
    sdm[box] -= np.where(d_in == 1, 0, d_in / d_in.max())  # at distance 1 lies exactly the inner boundary
    return sdm
