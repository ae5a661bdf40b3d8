"""Signed distance maps, negative inside: the target of L_dis, DTC and SASSNet (DTML's equation (1))."""

import edt
import numpy as np
import torch
from numpy.typing import NDArray

from utils.masks import box_of


def signed_distance_map(mask: NDArray) -> NDArray[np.float32]:
    """mask of 0 and 1, any shape -> signed distance map, float32 in [-1,1], of the same shape.

    The map is d_out / max d_out outside, -d_in / max d_in inside, and 0 on the inner boundary (object voxels with a
    face neighbour outside). d_out and d_in are Euclidean distances in voxels to the nearest voxel of the other side.
    An empty mask gives +1 everywhere and a full one -1; the released codes give 0 and NaN there. Uses as many threads
    as torch.
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
    sdm[box] -= np.where(d_in == 1, 0, d_in / d_in.max())  # distance 1 is exactly the inner boundary
    return sdm
