"""BCP: Bai et al., Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation, CVPR 2023.

A student f learns from mixes of two crops. A mix a|b is b inside a box M and a around it. One box is drawn for each
batch, with 2/3 of each side of a crop. X are labeled crops with labels Y, u are unlabeled ones.

    warm-up, t < T_0     min over f   L_seg of f(X|X'), against Y|Y'
    then                 min over f   L(X|u) + L(u'|X')           labeled crops around the box, and inside of it

    L   =  L_seg in the labeled region, against Y  +  alpha L_seg in the unlabeled region, against y'
    y'  =  largest component of each class of f'(u)               pseudo-label
    f'  <-  f before T_0, then 0.99 f' + 0.01 f                   teacher, the moving average of the student

T_0 is --start times the iterations, and alpha is --pseudo-weight.
L_seg in a region is 1/2 (cross-entropy + Dice) of its voxels alone; the cross-entropy is their mean. Half of the crops
are mixed in each direction. No gradient reaches the teacher. Without unlabeled crops the warm-up never ends: this is
the control on labeled scans alone. With several classes p is a softmax over C+1 channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ema import Averages
from losses.mixing import paste, random_box
from losses.terms import hard_dice, probabilities, seg_loss, weight_inside, weighted_sum
from methods.base import TUNED, UNLABELED, Batch, Losses, Method, by_name, seg_outputs
from utils.devices import to_device
from utils.masks import label_maps, largest_components
from utils.options import Condition, option

STARTS: Condition = {"start": lambda share: share < 1}
MIXES: Condition = {**STARTS, **UNLABELED}
COUNTS: Condition = {"pseudo_weight": bool, **MIXES}


class BCP(Method):
    """A V-Net that learns from crops pasted into each other, the unlabeled ones labeled by its moving average."""

    multiclass = True
    PRESETS = {
        "paper": {"batch_size": 8, "labeled_batch": 4},
        "authors": {"batch_size": 8, "labeled_batch": 4, "augment": "mirror"},
        "tuned": {**TUNED, "batch_size": 8},
    }

    @dataclass
    class Options(Method.Options):
        start: float = option(0.12, "share of the iterations in which labeled crops alone are mixed", minimum=0,
                              maximum=1)  # fmt: skip
        box: float = option(2 / 3, "sides of the box, as a share of those of the crop", minimum=0.1, maximum=0.9)
        pseudo_weight: float = option(0.5, "alpha, weight of the unlabeled regions", minimum=0, only_if=MIXES)
        largest_component: bool = option(True, "pseudo-labels keep the largest component of each class alone",
                                         only_if=COUNTS)  # fmt: skip
        ema_decay: float = option(0.99, "decay of the teacher's moving average", minimum=0, maximum=1, only_if=STARTS)

    options: Options
    outputs = ("seg", "teacher")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        heads = {"seg": self.seg_channels}
        self.student = self.backbone(heads=heads)
        self.ema = Averages(student=self.student)

    def started(self, iteration: int) -> bool:
        """Whether the warm-up is over."""
        return iteration >= self.options.start * self.iterations

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, image, label = self.options, batch["image"], batch["label"]
        box = to_device(random_box(image.shape[2:], o.box), image.device)
        if self.started(iteration) and len(image) > len(label):
            pseudo = self.pseudo_label(image[len(label) :])
            outside, inside = mix_both_kinds(len(label), len(image) - len(label))
            label = torch.cat([label, pseudo])
        else:
            pseudo = label[:0]
            outside, inside = mix_labeled(len(label))
        outside, inside = (to_device(places, image.device) for places in (outside, inside))
        logits = self.student(paste(image[outside], image[inside], box))["seg"]
        target = paste(label[outside], label[inside], box)
        p = probabilities(logits.detach(), o.classes)
        if len(pseudo):
            known = torch.stack([~box, box]).repeat_interleave(len(logits) // 2, dim=0)  # the labeled regions
            terms = {
                "seg": self.region_loss(known, logits, target),
                "pseudo_seg": self.region_loss(~known, logits, target),
            }
            dice, foreground = hard_dice(p * known[:, None], target * known), (pseudo > 0).float().mean()
        else:
            terms = {"seg": seg_loss(logits, target, o.classes), "pseudo_seg": logits.new_zeros(())}
            dice, foreground = hard_dice(p, target), logits.new_zeros(())
        monitors = {"dice/train_seg": dice, "pseudo/foreground": foreground}
        weight = o.pseudo_weight if len(pseudo) else 0.0
        return Losses(weighted_sum(terms, {"pseudo_seg": weight}), terms, {"w": weight}, monitors)

    def region_loss(self, region: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """L_seg in a region (N,W,H,D), the sum of both directions, which are the two halves of the N mixes."""
        halves = zip(logits.chunk(2), label.chunk(2), region[:, None].to(logits.dtype).chunk(2), strict=True)
        return torch.stack([seg_loss(x, y, self.options.classes, weight_inside(r)) for x, y, r in halves]).sum()

    @torch.no_grad()
    def pseudo_label(self, image: Tensor) -> Tensor:
        """image (N,K,W,H,D) -> y' (N,W,H,D) uint8 of 0..C, the teacher's label."""
        o = self.options
        label = label_maps(probabilities(self.ema["student"](image)["seg"], o.classes))
        if not o.largest_component:
            return label
        kept = [torch.from_numpy(largest_components(y.cpu().numpy(), o.classes)) for y in label]
        return torch.stack(kept).to(label.device)

    def after_step(self, batch: Batch, iteration: int) -> None:
        decay = self.options.ema_decay if self.started(iteration) else 0.0
        self.ema.follow(decay, student=self.student)

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        networks = {"seg": self.student, "teacher": self.ema["student"]}
        return seg_outputs(networks, image, outputs, self.options.classes)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        p, teacher = self.predict(image, self.outputs).chunk(2, dim=1)
        return by_name(p=p, teacher=teacher)


def mix_labeled(labeled: int) -> tuple[Tensor, Tensor]:
    """The mixes of the warm-up: each crop of the first half around one of the second half, then the other way round.

    Returns:
        Indices of the crops around the box and of those inside, (N,) with N even.
    """
    half = (labeled + 1) // 2
    first, second = torch.arange(half), torch.arange(labeled - half, labeled)
    return torch.cat([first, second]), torch.cat([second, first])


def mix_both_kinds(labeled: int, unlabeled: int) -> tuple[Tensor, Tensor]:
    """The mixes of labeled and unlabeled crops: the first half inward (X|u), the second half outward (u|X).

    Of four crops of each, two go either way. Where there are fewer of one kind, they are used again.

    Returns:
        Indices of the crops around the box and of those inside, (N,) with N even; unlabeled crops come after labeled.
    """
    pairs = torch.arange(max(labeled, unlabeled))
    X, u = pairs % labeled, labeled + pairs % unlabeled
    half = (len(pairs) + 1) // 2
    return torch.cat([X[:half], u[-half:]]), torch.cat([u[:half], X[-half:]])
