"""DK-UXNet: Wu, Li & Zhang, Semi-supervised Medical Image Segmentation via Query Distribution Consistency, 2023.

A 3D UX-Net with a k-means decoder. For a strong (noisy) and a weak view of each crop it predicts segmentation logits S
and the query distribution G: the share of each group of queries (background, organ) in every voxel.

    sum over views   L_seg(S, Y) + w_qd L_qd(G, Y) + w_deep mean_l L_qd(G^l, Y^l)         [labeled]
    + lambda(t) (L_segc + L_qdc)      L_segc = l(S_strong, S_weak), L_qdc = l(G_strong, G_weak)      [all]

L_seg = cross-entropy + Dice, L_qd = mean_v - sum_g Y_g ln G_g, and l is NT-Xent over the crops of a batch. G^l is the
distribution by the assignment of k-means layer l, Y^l the label pooled to the size of its map.

Our interpretation: the paper's equations could not be read, and its released code has no semi-supervised loop. The
consistency follows another repository of its author. Preset `released` follows these sources with three exceptions: no
label of an unlabeled scan is read, a batch holds both labeled and unlabeled crops, and the number of iterations
differs. Preset `repaired` fixes what kept the network from learning. docs/dk-uxnet.md lists what each fix changes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.ramps import RAMPS, ramp_up
from losses.terms import dice_ce_loss, foreground_logits, hard_dice, nt_xent, one_hot, query_loss, weighted_sum
from methods.base import TUNED, Batch, Losses, Method, labeled_part
from networks.backbones import BACKBONES
from networks.kmax import Clusters, QueryNet, group_sums
from utils.errors import UserError
from utils.options import Condition, option

ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
RELEASED = {
    "lr": 1e-4, "lr_steps": [], "augment": "none", "groups": [16, 4, 108], "bn_momentum": 0.01, "crops": "independent",
    "logit_scale": 0.1, "noise_variance": 5.0, "qd_weight": 1 / 30, "deep_weight": 0.0, "contrast": "sum",
    "lambda_max": 2.0, "ramp": "epochs",
}  # fmt: skip
LEVELS = (16, 8, 4, 2)
CROPS, CONTRASTS, TERMS = ("shared", "independent"), ("mean", "sum", "mse"), ("both", "segc", "qdc", "none")
KMAX: Condition = {"kmax": bool}
AGREES: Condition = {"lambda_max": bool, "consistency_terms": TERMS[:-1]}


class DKUXNet(Method):
    """A query-based network that is trained to agree on two views of a crop."""

    PRESETS = {"repaired": ADAMW, "released": ADAMW | RELEASED, "tuned": TUNED}

    @dataclass
    class Options(Method.Options):
        backbone: str = option("uxnet", "network that computes the queries' feature maps", choices=list(BACKBONES))
        filters: int = option(48, "channels of the backbone's first scale", minimum=1)
        dropout: float = option(0.0, "share of the channels dropped in training, after the deepest map and, with "
                                "--no-kmax, before the head; none in the published network",
                                minimum=0, maximum=0.9)  # fmt: skip
        kmax: bool = option(True, "k-means decoder; without it a convolution gives S; no G, L_qd, L_qdc")
        groups: list[int] = option([16, 16], "queries per group, background first", nargs="+", minimum=1, only_if=KMAX)
        query_channels: int = option(256, "channels of a query, a multiple of 16", minimum=16, only_if=KMAX)
        levels: list[int] = option([8, 8, 4, 4], "strides of the layers", nargs="+", choices=LEVELS, only_if=KMAX)
        bn_momentum: float = option(0.1, "of the decoder; 0.01 is too slow", minimum=0, maximum=1, only_if=KMAX)
        logit_scale: float = option(1.0, "initial spread of the assignments' logits; with 0.1 G stays uniform for long",
                                    minimum=0, only_if=KMAX)  # fmt: skip
        share_weights: bool = option(True, "one network for both views; without, one for each view")
        crops: str = option("shared", "crops of the two views; independent crops need not overlap", choices=CROPS)
        noise_variance: float = option(1.0, "largest variance of the strong view's noise", minimum=0)
        qd_weight: float = option(0.1, "w_qd, weight of L_qd", minimum=0, only_if=KMAX)
        deep_weight: float = option(0.1, "w_deep; 0: the layers' assignments are not trained", minimum=0, only_if=KMAX)
        consistency_terms: str = option("both", "terms of the consistency to use", choices=TERMS, only_if=AGREES)
        contrast: str = option("mean", "l: NT-Xent of mean or summed similarities, or mean square", choices=CONTRASTS,
                               only_if=AGREES)  # fmt: skip
        temperature: float = option(0.5, "tau, temperature of the similarity", minimum=1e-6,
                                    only_if={**AGREES, "contrast": ("mean", "sum")})  # fmt: skip
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0, only_if=AGREES)
        ramp: str = option("gaussian", "how lambda rises; epochs: after 200, 800, 1600", choices=RAMPS, only_if=AGREES)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        if len(o.groups) < 2 or o.query_channels % 16:
            raise UserError("--groups must be two or more numbers, --query-channels a multiple of 16.")
        if not o.kmax and o.consistency_terms == "qdc":
            raise UserError("--no-kmax leaves nothing of --consistency-terms qdc, which compares G. Take segc or none.")
        self.networks = nn.ModuleList(
            QueryNet(self.backbone, filters=o.filters, kmax=o.kmax, queries=sum(o.groups), levels=o.levels,
                     query_channels=o.query_channels, momentum=o.bn_momentum, scale=o.logit_scale,
                     train_levels=o.deep_weight > 0, dropout=o.dropout)
            for _ in range(1 if o.share_weights else 2)
        )  # fmt: skip
        self.needs_other_crop = o.crops == "independent"
        self.outputs = ("seg", *["cluster"] * o.kmax, *["strong"] * (not o.share_weights))

    def G(self, P: Tensor) -> Tensor:
        """P (N,queries,...) -> G (N,groups,...): the shares of the queries, summed over each group."""
        return group_sums(P, self.options.groups)

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, weak = self.options, batch["image"]
        strong = batch["other_image"] if self.needs_other_crop else weak
        sd = (o.noise_variance * torch.rand(len(strong), 1, 1, 1, 1, device=strong.device)).sqrt()
        strong = strong + sd * torch.randn_like(strong)
        if o.share_weights:
            views = self.networks[0](torch.cat([strong, weak])).split(len(strong))
        else:
            views = self.networks[1](strong), self.networks[0](weak)
        labels = batch["other_label" if self.needs_other_crop else "label"], batch["label"]
        parts = [self.supervised(x, y) for x, y in zip(views, labels, strict=True)]
        terms = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        agreement = self.agreement(*views)
        terms |= agreement
        lambda_ = o.lambda_max * ramp_up(iteration, self.iterations, o.ramp) if agreement else 0.0
        factors = {"qd": o.qd_weight, "deep": o.deep_weight, "segc": lambda_, "qdc": lambda_}
        p = labeled_part(foreground_logits(views[1].logits.detach()).sigmoid(), batch)
        monitors = {"dice/train_seg": hard_dice(p, batch["label"])}
        return Losses(weighted_sum(terms, factors), terms, {"lambda": lambda_}, monitors)

    def supervised(self, view: Clusters, label: Tensor) -> dict[str, Tensor]:
        """Loss terms of the labeled crops of a view: seg is L_seg, qd is L_qd, deep is the mean L_qd of the layers.

        Without a k-means decoder there is neither qd nor deep; with w_deep = 0 there is no deep.
        """
        n, groups = len(label), len(self.options.groups)
        terms = {"seg": dice_ce_loss(view.logits[:n], label)}
        if view.assignment is not None:
            Y = one_hot(label, groups).to(view.logits.dtype)
            terms["qd"] = query_loss(self.G(view.assignment[:n]), Y)
            if self.options.deep_weight:
                levels = [(M[:n].softmax(dim=1), F.interpolate(Y, size=M.shape[2:], mode="area")) for M in view.levels]
                terms["deep"] = torch.stack([query_loss(self.G(P), share) for P, share in levels]).mean()
        return terms

    def agreement(self, strong: Clusters, weak: Clusters) -> dict[str, Tensor]:
        """The terms segc and qdc between the two views, as far as --consistency-terms names them.

        Raises:
            UserError: for NT-Xent of a single crop.
        """
        o, pairs = self.options, {}
        if o.consistency_terms in ("both", "segc"):
            pairs["segc"] = [x.logits if o.contrast == "sum" else x.logits.softmax(dim=1) for x in (strong, weak)]
        if o.consistency_terms in ("both", "qdc") and strong.assignment is not None and weak.assignment is not None:
            pairs["qdc"] = [self.G(x) for x in (strong.assignment, weak.assignment)]
        if o.contrast == "mse":
            return {name: F.mse_loss(a, b) for name, (a, b) in pairs.items()}
        if pairs and len(strong.logits) < 2:
            raise UserError("the contrast needs two crops or more: raise --batch-size, or --contrast mse.")
        return {name: nt_xent(a, b, temperature=o.temperature, over=o.contrast) for name, (a, b) in pairs.items()}

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        weak = self.networks[0](image)
        predictions = {"seg": foreground_logits(weak.logits).sigmoid()}
        if "cluster" in outputs:
            predictions["cluster"] = 1 - self.G(weak.assignment)[:, :1]
        if "strong" in outputs:
            predictions["strong"] = foreground_logits(self.networks[1](image).logits).sigmoid()
        return torch.cat([predictions[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        weak = self.networks[0](image)
        maps = {"p": foreground_logits(weak.logits).sigmoid().squeeze(1)}
        if weak.assignment is not None:
            maps["cluster"] = 1 - self.G(weak.assignment)[:, 0]
            maps["query"] = weak.assignment.argmax(dim=1) / weak.assignment.shape[1]
        return maps
