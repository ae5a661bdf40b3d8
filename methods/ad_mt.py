"""AD-MT: Zhao et al., Alternate Diverse Teaching for Semi-supervised Medical Image Segmentation, ECCV 2024.

A student f learns from two teachers f_1 and f_2, both moving averages of it. One teacher is updated at a time: turns of
1 to 19 iterations, a function of a seed that the checkpoint keeps, alternate. Both label each unlabeled crop u, with
q_i = f_i(u) over C+1 classes and its entropy H_i = - sum_c q_i,c log2 q_i,c at each voxel:

    q   =  (exp(-H_1) q_1 + exp(-H_2) q_2) / (exp(-H_1) + exp(-H_2))         the surer teacher counts more
    y'  =  the class with the largest q, and c = that q                      pseudo-label and its confidence
           where the teachers disagree, the student's class of u if it is another and its probability is larger

The student learns y' from another view of u, which depends on whose turn it is:

    min over f   L_seg(X, Y)  +  w(t) mean CE(f(S(u)), y') over the voxels with c >= 0.8
    S(u)  =  random contrast, noise and blur                                 in the turn of f_1
             u with a box from the next crop, y' and c alike (CutMix)        in the turn of f_2; sides of the box
                                                                             sqrt(1 - b), b from Beta(4, 4)
    f_i   <-  a f_i + (1 - a) f         a = min(1 - 1/n, 0.99) at its n-th update
    w(t)  =  a Gaussian ramp to 2 after 2/5 of the iterations

No gradient reaches y' and c. The first teacher is the default output. For one class p is a sigmoid and q = (1 - p, p).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.ema import Averages, ema_decay
from losses.mixing import paste_next, random_box
from losses.perturbation import strong_view
from losses.ramps import ramp_up
from losses.terms import (
    ce_loss,
    hard_dice,
    probabilities,
    seg_loss,
    weight_inside,
    weighted_sum,
    with_background,
)
from methods.base import (
    TUNED_SEPARATE,
    UNLABELED,
    Batch,
    Losses,
    Method,
    batch_norm_option,
    by_name,
    labeled_part,
    seg_outputs,
)
from utils.devices import to_device
from utils.options import Condition, option

COUNTS: Condition = {"pseudo_weight": bool, **UNLABELED}


class ADMT(Method):
    """A V-Net that learns from labels and from two moving averages of it, which are updated in turn."""

    multiclass = True
    PRESETS = {"paper": {}, "authors": {"augment": "mirror"}, "tuned": TUNED_SEPARATE}

    @dataclass
    class Options(Method.Options):
        batch_norm: str = batch_norm_option()
        ema_decay: float = option(0.99, "decay of the teachers' moving averages", minimum=0, maximum=1)
        period: int = option(19, "most iterations of a teacher's turn", minimum=1)
        pseudo_weight: float = option(2.0, "largest weight of the pseudo-labels", minimum=0, only_if=UNLABELED)
        ramp_end: float = option(0.4, "share of the iterations after which w is largest", minimum=0, maximum=1,
                                 only_if=COUNTS)  # fmt: skip
        threshold: float = option(0.8, "least confidence of a pseudo-label", minimum=0, maximum=1, only_if=COUNTS)
        strong: float = option(0.5, "strength of the contrast, noise and blur in the first teacher's turns", minimum=0,
                           only_if=UNLABELED)  # fmt: skip

    options: Options
    outputs = ("teacher_1", "teacher_2", "seg")

    def __init__(self, options: Options, *, iterations: int):
        super().__init__(options, iterations=iterations)
        heads = {"seg": self.seg_channels}
        self.student = self.backbone(heads=heads)
        self.ema = Averages(teacher_1=self.student, teacher_2=self.student)
        self.set_extra_state(torch.randint(2**62, (1,), device="cpu"))

    def get_extra_state(self) -> Tensor:
        """The seed of the turns (1,), for the checkpoint. A longer training begins with the same turns."""
        return self.turns_seed

    def set_extra_state(self, state: Tensor) -> None:
        self.turns_seed = state
        self.turns = draw_turns(self.iterations, self.options.period, int(state))

    def forward(self, batch: Batch, iteration: int) -> Losses:
        o, label, L = self.options, batch["label"], len(batch["label"])
        labeled, unlabeled = batch["image"].tensor_split([L])
        first = int(self.turns[iteration]) == 0
        boxes = None if first else mixing_boxes(unlabeled)
        view = strong_view(unlabeled, o.strong) if boxes is None else paste_next(unlabeled, boxes)
        logits = self.passes(self.student, torch.cat([labeled, unlabeled, view]), L)["seg"]
        x, plain, strong = logits.tensor_split([L, L + len(unlabeled)])
        terms, monitors = {"seg": seg_loss(x, label, o.classes)}, {}
        if len(unlabeled):
            pseudo, confidence, conflict = self.pseudo_label(unlabeled, plain.detach())
            if boxes is not None:
                pseudo, confidence = (paste_next(y, boxes) for y in (pseudo, confidence))
            sure = (confidence >= o.threshold)[:, None].to(logits.dtype)
            terms["pseudo"] = ce_loss(strong, pseudo, o.classes, weight_inside(sure))
            monitors = {"pseudo/foreground": (pseudo > 0).float().mean(), "pseudo/sure": sure.mean(),
                        "pseudo/conflict": conflict}  # fmt: skip
        else:
            zero = logits.new_zeros(())
            terms["pseudo"] = zero
            monitors = dict.fromkeys(("pseudo/foreground", "pseudo/sure", "pseudo/conflict"), zero)
        p = probabilities(logits.detach(), o.classes)
        monitors["dice/train_seg"] = hard_dice(labeled_part(p, batch), label)
        weight = o.pseudo_weight * ramp_up(iteration, o.ramp_end * self.iterations) if len(unlabeled) else 0.0
        return Losses(weighted_sum(terms, {"pseudo": weight}), terms, {"w": weight}, monitors)

    @torch.no_grad()
    def pseudo_label(self, image: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pseudo-label of both teachers and, in conflicts, of the student.

        Args:
            image: unlabeled crops (N,K,W,H,D).
            logits: those of the student for them.

        Returns:
            y' (N,W,H,D) of 0..C, c (N,W,H,D) in [0,1], and the share of voxels where the teachers disagree.
        """
        classes = self.options.classes
        q_1, q_2 = (with_background(probabilities(f(image)["seg"], classes)) for f in self.ema.values())
        q = ensemble(q_1, q_2)
        confidence, label = q.max(dim=1)
        own_confidence, own_label = with_background(probabilities(logits, classes)).max(dim=1)
        conflict = q_1.max(dim=1).indices != q_2.max(dim=1).indices
        surer = conflict & (own_label != label) & (own_confidence > confidence)
        label, confidence = torch.where(surer, own_label, label), torch.where(surer, own_confidence, confidence)
        return label.to(torch.uint8), confidence, conflict.float().mean()

    def after_step(self, batch: Batch, iteration: int) -> None:
        turn = self.turns[iteration]
        updates = int((self.turns[:iteration] == turn).sum())
        decay = ema_decay(updates, self.options.ema_decay)
        self.ema.follow(decay, **{("teacher_1", "teacher_2")[int(turn)]: self.student})

    def predict(self, image: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return seg_outputs({"seg": self.student, **self.ema}, image, outputs, self.options.classes)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        teacher, p = self.predict(image, ("teacher_1", "seg")).chunk(2, dim=1)
        return by_name(teacher=teacher, p=p)


def draw_turns(iterations: int, longest: int, seed: int) -> Tensor:
    """Draws whose turn each iteration is: (iterations,) uint8 of 0 and 1, turns of 1 to `longest` iterations."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (iterations,), generator=generator, device="cpu")
    numbers = torch.arange(iterations, device="cpu") % 2
    return numbers.repeat_interleave(lengths)[:iterations].to(torch.uint8)


def mixing_boxes(image: Tensor) -> Tensor:
    """A box for each item of (N,K,W,H,D), its sides sqrt(1 - b) of the crop's with b from Beta(4, 4): (N,W,H,D)."""
    shares = (1 - torch.distributions.Beta(4.0, 4.0).sample((len(image),))).sqrt().tolist()
    boxes = [random_box(image.shape[2:], share) for share in shares]
    mask = torch.stack(boxes) if boxes else torch.zeros(0, *image.shape[2:], dtype=torch.bool)
    return to_device(mask, image.device)


def ensemble(q_1: Tensor, q_2: Tensor) -> Tensor:
    """The mean of two distributions (N,C+1,W,H,D) over the classes, each weighted by exp(-entropy in bits)."""
    H_1, H_2 = (-(q * q.clamp(min=1e-10).log2()).sum(dim=1, keepdim=True) for q in (q_1, q_2))
    w = (H_2 - H_1).sigmoid()  # exp(-H_1) / (exp(-H_1) + exp(-H_2))
    return w * q_1 + (1 - w) * q_2
