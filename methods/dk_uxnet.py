"""DK-UXNet: Wu, Li & Zhang, Semi-supervised Medical Image Segmentation via Query Distribution Consistency, 2023.

A 3D UX-Net whose k-means decoder gives, for a strong (noisy) and a weak view of each crop, segmentation logits S and
the query distribution G: the share of a voxel that each group of queries (background, organ) holds.

    sum over views   L_seg(S, Y) + w_qd L_qd(G, Y) + w_deep mean_l L_qd(G^l, Y^l)         [labeled]
    + lambda(t) (L_segc + L_qdc)      L_segc = l(S_strong, S_weak), L_qdc = l(G_strong, G_weak)      [all]

L_seg = cross-entropy + Dice, L_qd = mean_v - sum_g Y_g ln G_g, l is NT-Xent over the crops of a batch; G^l and Y^l are
those of a k-means layer's own assignment and of the label pooled to its map.

Our interpretation: the paper's equations could not be read and its released code has no semi-supervised loop, so the
consistency follows another repository of its author. Preset `released` is that evidence, except that no unlabeled
scan's label is read, that a batch holds both labeled and unlabeled crops, and the number of iterations; `repaired`
mends what kept it from learning. The README's table tells what each repair changes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.ramps import RAMPS, ramp_up
from losses.terms import dice_ce_loss, foreground_logits, hard_dice, nt_xent, one_hot, query_loss, weighted_sum
from methods.base import Batch, Losses, Method, labeled_part
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
    """Queries that must say the same of two views of a crop."""

    PRESETS = {"repaired": ADAMW, "released": ADAMW | RELEASED}

    @dataclass
    class Options(Method.Options):
        backbone: str = option("uxnet", "network below the queries", choices=list(BACKBONES))
        filters: int = option(48, "channels of the backbone's first scale", minimum=1)
        kmax: bool = option(True, "k-means decoder; without, a convolution gives S and there is no G, L_qd, L_qdc")
        groups: list[int] = option([16, 16], "queries of a group, background first", nargs="+", minimum=1, only_if=KMAX)
        query_channels: int = option(256, "channels of a query, a multiple of 16", minimum=16, only_if=KMAX)
        levels: list[int] = option([8, 8, 4, 4], "strides of the layers", nargs="+", choices=LEVELS, only_if=KMAX)
        bn_momentum: float = option(0.1, "of the decoder; 0.01 lags too long", minimum=0, maximum=1, only_if=KMAX)
        logit_scale: float = option(1.0, "first spread of the assignments' logits; from 0.1 G stays even long",
                                    minimum=0, only_if=KMAX)  # fmt: skip
        share_weights: bool = option(True, "one network sees both views, or one each")
        crops: str = option("shared", "of the two views; independent ones need not overlap", choices=CROPS)
        noise_variance: float = option(1.0, "largest variance of the strong view's noise", minimum=0)
        qd_weight: float = option(0.1, "w_qd, of L_qd", minimum=0, only_if=KMAX)
        deep_weight: float = option(0.1, "w_deep; 0 leaves the layers' assignment untrained", minimum=0, only_if=KMAX)
        consistency_terms: str = option("both", "those of the consistency that count", choices=TERMS, only_if=AGREES)
        contrast: str = option("mean", "l: NT-Xent of mean or summed similarities, or mean square", choices=CONTRASTS,
                               only_if=AGREES)  # fmt: skip
        temperature: float = option(0.5, "tau of the similarity", minimum=1e-6,
                                    only_if={**AGREES, "contrast": ("mean", "sum")})  # fmt: skip
        lambda_max: float = option(0.1, "largest weight of the consistency", minimum=0, only_if=AGREES)
        ramp: str = option("gaussian", "how lambda rises; epochs: at 200, 800 and 1600", choices=RAMPS, only_if=AGREES)

    options: Options

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        o = options
        if len(o.groups) < 2 or o.query_channels % 16:
            raise UserError("--groups must be two or more numbers, --query-channels a multiple of 16.")
        if not o.kmax and o.consistency_terms == "qdc":
            raise UserError("--no-kmax leaves nothing of --consistency-terms qdc, which compares G. Take segc or none.")
        self.networks = nn.ModuleList(
            QueryNet(BACKBONES[o.backbone], filters=o.filters, kmax=o.kmax, queries=sum(o.groups), levels=o.levels,
                     query_channels=o.query_channels, momentum=o.bn_momentum, scale=o.logit_scale,
                     train_levels=o.deep_weight > 0)
            for _ in range(1 if o.share_weights else 2)
        )  # fmt: skip

    @property
    def needs_other_crop(self) -> bool:
        return self.options.crops == "independent"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("seg", *["cluster"] * self.options.kmax, *["strong"] * (not self.options.share_weights))

    def G(self, P: Tensor) -> Tensor:
        """The groups' shares (N,groups,...) of the queries' P (N,queries,...)."""
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
        terms = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]} | self.agreement(*views)
        lambda_ = o.lambda_max * ramp_up(iteration, self.iterations, o.ramp)
        factors = {"qd": o.qd_weight, "deep": o.deep_weight, "segc": lambda_, "qdc": lambda_}
        p = labeled_part(foreground_logits(views[1].logits.detach()).sigmoid(), batch)
        monitors = {"dice/train_seg": hard_dice(p, batch["label"])}
        return Losses(weighted_sum(terms, factors), terms, {"lambda": lambda_}, monitors)

    def supervised(self, view: Clusters, label: Tensor) -> dict[str, Tensor]:
        """L_seg, L_qd and the mean L_qd of the layers' own assignments, of the first crops, which are labeled."""
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
        """L_segc and L_qdc of the two views, those that --consistency-terms names."""
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
        found = {"seg": foreground_logits(weak.logits).sigmoid()}
        if "cluster" in outputs:
            found["cluster"] = 1 - self.G(weak.assignment)[:, :1]
        if "strong" in outputs:
            found["strong"] = foreground_logits(self.networks[1](image).logits).sigmoid()
        return torch.cat([found[name] for name in outputs], dim=1)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        weak = self.networks[0](image)
        found = {"p": foreground_logits(weak.logits).sigmoid().squeeze(1)}
        if weak.assignment is not None:
            found["cluster"] = 1 - self.G(weak.assignment)[:, 0]
            found["query"] = weak.assignment.argmax(dim=1) / weak.assignment.shape[1]
        return found
