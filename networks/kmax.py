"""The k-means mask transformer of DK-UXNet: queries are the centres of clusters of voxels.

After kMaX-DeepLab (Yu et al., ECCV 2022) in three dimensions, with the flattened-query head and the released code's
details (Wu, Li & Zhang, arXiv 2311.12364). Shapes: B crops, C query channels, N queries, v voxels of a map.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.batch_norm import BatchNorm3d
from networks.uxnet import Depthwise
from utils.vectors import unit

HEADS = 8  # of the self-attention
SCALES = (16, 8, 4, 2, 1)  # strides of a backbone's maps, in their order
EPSILON = 1e-3  # of all batch norms


class Clusters(NamedTuple):
    """Output of the decoder. A network without queries has no assignment and no levels."""

    logits: Tensor
    """S (B,K,W,H,D) = sum_n C_nk P_n."""
    assignment: Tensor | None = None
    """P (B,N,W,H,D), the share of each query in every voxel; sums to 1 over the queries."""
    levels: tuple[Tensor, ...] = ()
    """M (B,N,w,h,d) of each k-means layer, the logits of its assignment."""

    def split(self, first: int) -> tuple["Clusters", "Clusters"]:
        """Splits the batch after `first` crops."""
        P, M = self.assignment, self.levels
        parts = (slice(first), slice(first, None))
        head, tail = (Clusters(self.logits[i], None if P is None else P[i], tuple(m[i] for m in M)) for i in parts)
        return head, tail


def truncated_(weight: Tensor, sd: float) -> None:
    """Fills `weight` in place from a normal distribution of standard deviation `sd`, truncated at 2 sd."""
    nn.init.trunc_normal_(weight, std=sd, a=-2 * sd, b=2 * sd)


def project(
    channels_in: int, channels_out: int, momentum: float, *, sd: float | None = None, gate: float = 1.0
) -> nn.Sequential:
    """1x1 convolution without bias, then batch norm: (B,in,v) -> (B,out,v). `sd` is the initial standard deviation of
    the weights (default sqrt(2 / channels_in)), `gate` the initial weight of the batch norm.
    """
    conv = nn.Conv1d(channels_in, channels_out, 1, bias=False)
    norm = nn.BatchNorm1d(channels_out, momentum=momentum, eps=EPSILON)
    truncated_(conv.weight, math.sqrt(2 / channels_in) if sd is None else sd)
    nn.init.constant_(norm.weight, gate)
    return nn.Sequential(conv, norm)


@torch.no_grad()
def hard_assignment(M: Tensor) -> Tensor:
    """M (B,N,v) -> one-hot A (B,N,v) of the query with the largest logit at each voxel, without gradient."""
    return torch.zeros_like(M).scatter_(1, M.argmax(dim=1, keepdim=True), 1.0)


def group_sums(P: Tensor, groups: Sequence[int]) -> Tensor:
    """P (B,N,...) -> G (B,len(groups),...): sums over the first groups[0] queries, the next groups[1], and so on."""
    return torch.stack([part.sum(dim=1) for part in P.split(list(groups), dim=1)], dim=1)


class AssignmentPredictor(nn.Module):
    """M = BN(F^T W), the logits of each query at each voxel.

    F has unit length at every voxel. It is computed from the map by a depthwise 5x5x5 convolution and two 1x1x1
    convolutions, to C and C/2 channels. W is a projection of the queries. The batch norm has one channel over all of
    (B,N,v). Its weight starts at `scale`, the initial standard deviation of the logits.
    """

    def __init__(self, channels: int, query_channels: int, momentum: float, scale: float):
        super().__init__()
        embedding = query_channels // 2
        self.depthwise = Depthwise(channels, 5, bias=False)
        nn.init.xavier_uniform_(self.depthwise.weight)
        self.norm = BatchNorm3d(channels, momentum=momentum, eps=EPSILON)
        self.wide = project(channels, query_channels, momentum)
        self.last = nn.Conv1d(query_channels, embedding, 1)
        truncated_(self.last.weight, 0.01)
        self.last_norm = nn.BatchNorm1d(embedding, momentum=momentum, eps=EPSILON)
        self.query = project(query_channels, embedding, momentum)
        self.scale = nn.BatchNorm1d(1, momentum=momentum, eps=EPSILON)
        nn.init.constant_(self.scale.weight, scale)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B,channels,w,h,d) and z (B,C,N) -> M (B,N,v)."""
        x = F.gelu(self.norm(self.depthwise(x))).flatten(2)
        x = unit(self.last_norm(self.last(F.gelu(self.wide(x)))))
        M = self.query(z).transpose(1, 2) @ x
        return self.scale(M.flatten(1).unsqueeze(1)).view_as(M)


class KMeansLayer(nn.Module):
    """One step of k-means cross-attention, self-attention of the queries, and a feed-forward network.

    A = onehot(argmax_n M),  Q <- Q + proj(BN(U A^T)): each query receives the sum of the values U of its voxels. The
    last batch norm of each of the three branches starts with weight 0, so the layer initially maps Q to gelu(gelu(Q)).
    """

    def __init__(self, channels: int, query_channels: int, momentum: float, scale: float):
        super().__init__()
        C, sd = query_channels, query_channels**-0.5
        self.pixel = project(channels, C, momentum)
        self.query = project(C, C, momentum)
        self.value = project(C, C, momentum, sd=sd)
        self.predictor = AssignmentPredictor(C, C, momentum, scale)
        self.update_norm = nn.BatchNorm1d(C, momentum=momentum, eps=EPSILON)
        self.update = project(C, C, momentum, gate=0.0)
        self.qkv = project(C, 2 * C, momentum, sd=sd)
        self.similarity_norm = nn.BatchNorm2d(HEADS, momentum=momentum, eps=EPSILON)
        self.attended_norm = nn.BatchNorm1d(C, momentum=momentum, eps=EPSILON)
        self.attended = project(C, C, momentum, gate=0.0)
        self.widen = project(C, 8 * C, momentum)
        self.narrow = project(8 * C, C, momentum, gate=0.0)

    def forward(self, X: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Map X (B,channels,w,h,d) and queries Q (B,C,N) -> the next Q and M (B,N,w,h,d)."""
        x, z = F.gelu(self.pixel(F.gelu(X.flatten(2)))), F.gelu(self.query(Q))
        M = self.predictor(x.unflatten(2, X.shape[2:]), z)
        sums = self.value(x) @ hard_assignment(M).transpose(1, 2)
        Q = Q + self.update(self.update_norm(sums))
        Q = F.gelu(Q + self.attended(F.gelu(self.attended_norm(self.attention(z)))))
        Q = F.gelu(Q + self.narrow(F.gelu(self.widen(Q))))
        return Q, M.unflatten(2, X.shape[2:])

    def attention(self, z: Tensor) -> Tensor:
        """Self-attention of the queries with eight heads: (B,C,N) -> (B,C,N)."""
        C = z.shape[1]
        q, k, v = (part.unflatten(1, (HEADS, -1)) for part in self.qkv(z).split([C // 2, C // 2, C], dim=1))
        weight = self.similarity_norm(q.transpose(2, 3) @ k).softmax(dim=3)
        return (v @ weight.transpose(2, 3)).flatten(1, 2)


class KMaXDecoder(nn.Module):
    """Updates the queries by one k-means layer per level, then assigns the voxels of the largest map to the queries.

    With 256 channels and 128 queries on a UX-Net of 48 filters, levels 8, 8, 4, 4, two classes: 9,055,706 parameters.

    Args:
        filters: filters of the backbone, whose map of stride s has s * filters channels.
        classes: K, channels of the logits.
        query_channels: C, a multiple of 16.
        levels: strides of the maps that the layers read, 2 to 16.
        scale: initial standard deviation of the logits of every assignment; 0.1 as published gives nearly uniform
            shares.
    """

    def __init__(
        self, *, filters: int, classes: int, queries: int, query_channels: int, levels: Sequence[int],
        momentum: float, scale: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        C = query_channels
        self.places = [SCALES.index(stride) for stride in levels]
        self.queries = nn.Parameter(torch.empty(C, queries))
        truncated_(self.queries, 1.0)
        self.layers = nn.ModuleList([KMeansLayer(stride * filters, C, momentum, scale) for stride in levels])
        self.mask = project(C, C, momentum)
        self.predictor = AssignmentPredictor(filters, C, momentum, scale)
        self.classify = nn.Sequential(nn.Linear(C * queries, C // 4), nn.ReLU(), nn.Linear(C // 4, queries * classes))

    def forward(self, maps: list[Tensor]) -> Clusters:
        """The maps of a backbone's `features` -> Clusters at full size."""
        Q = self.queries.expand(len(maps[0]), -1, -1)
        levels = []
        for place, layer in zip(self.places, self.layers, strict=True):
            Q, M = layer(maps[place], Q)
            levels.append(M)
        P = self.predictor(maps[-1], F.gelu(self.mask(Q))).softmax(dim=1)
        classes = self.classify(Q.flatten(1)).unflatten(1, (Q.shape[2], -1))
        shape = maps[-1].shape[2:]
        return Clusters((classes.transpose(1, 2) @ P).unflatten(2, shape), P.unflatten(2, shape), tuple(levels))


class QueryNet(nn.Module):
    """A backbone and the k-means decoder on its maps.

    61,937,114 parameters with a UX-Net of 48 filters, 128 queries of 256 channels and levels 8, 8, 4, 4. The forward
    pass of a crop of 112x112x80 voxels then takes 1,218 GFLOP.

    Args:
        kmax: False replaces the decoder by a head of the backbone: logits only, no queries, no assignment.
        dropout: that of the backbone; the published network has none.
        train_levels: False freezes the predictors of the layers' assignments, for losses without a gradient there.
        filters, queries, query_channels, levels, momentum, scale, classes: as in KMaXDecoder.
    """

    def __init__(
        self, backbone: Callable[..., Any], *, filters: int, kmax: bool, queries: int, query_channels: int,
        levels: Sequence[int], momentum: float, train_levels: bool, scale: float = 0.1, classes: int = 2,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone(heads={} if kmax else {"seg": classes}, filters=filters, dropout=dropout)
        self.kmax = None
        if kmax:
            self.kmax = KMaXDecoder(
                filters=filters, classes=classes, queries=queries, query_channels=query_channels, levels=levels,
                momentum=momentum, scale=scale,
            )  # fmt: skip
            for layer in self.kmax.layers:
                layer.predictor.requires_grad_(train_levels)

    def forward(self, image: Tensor) -> Clusters:
        """image (B,in_channels,W,H,D), sides multiples of 16 -> Clusters."""
        maps = self.backbone.features(image)
        return self.kmax(maps) if self.kmax is not None else Clusters(self.backbone.read(maps)["seg"])
