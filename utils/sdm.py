"""Signed distance maps, negative inside: the target of L_dis, of DTC and of SASSNet (DTML's equation (1))."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt


def signed_distance_map(mask: NDArray) -> NDArray[np.float32]:
    """mask (any shape, of 0 and 1) -> float32 map of the same shape in [-1,1].

    Outside d_out / max d_out, inside -d_in / max d_in, each Euclidean in voxels to the nearest voxel of the other
    side, and 0 on the inner boundary (object voxels with a face neighbour outside). An empty mask gives +1
    everywhere and a full one -1; the released codes give 0 and not-a-number there.
    """
    inside = np.asarray(mask) > 0
    if not inside.any():
        return np.ones(inside.shape, np.float32)
    if inside.all():
        return np.full(inside.shape, -1, np.float32)
    d_out = distance_transform_edt(~inside)
    box = tuple(slice(max(i.min() - 1, 0), i.max() + 2) for i in np.nonzero(inside))
    d_in = distance_transform_edt(inside[box])  # every nearest background voxel lies within one voxel of the box
    sdm = d_out / d_out.max()
    sdm[box] -= np.where(d_in == 1, 0, d_in / d_in.max())  # at distance 1 lies exactly the inner boundary
    return sdm.astype(np.float32)
