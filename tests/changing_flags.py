"""Flags that change the result, for every option of the training and of each method."""

from methods import METHODS

# Option -> flags that change the result, and where needed the flags beside which they do.
SHARED = {
    "method": [("--method supervised", "")],
    "preset": [("--preset authors", "")],
    "data": [("--data other", "")],
    "profile": [("--profile half", "")],
    "labeled": [("--labeled 3", "")],
    "unlabeled": [("--unlabeled 2", ""), ("--unlabeled 0", "")],
    "fold": [("--fold 0/2", "")],
    "downsample": [("--downsample 2", "")],
    "patch_size": [("--patch-size 16 32 16", ""), ("--patch-size 32 16 16", "--patch-size 16 32 16")],
    "augment": [
        ("--augment none", ""),
        ("--augment mirror", ""),
        ("--augment mirror", "--augment none"),
        ("--augment flip", "--augment none"),
    ],
    "flip_axes": [("--flip-axes z", "--augment flip")],
    "normalize": [("--normalize scan", ""), ("--normalize foreground", "")],
    "window": [("--window 0.5 2", "--normalize window --window 0.4 3")],
    "intensity": [("--intensity 0.3", ""), ("--intensity 0.3", "--intensity 0.1")],
    "random_scale": [("--random-scale 0.2", ""), ("--random-scale 0.2", "--random-scale 0.1")],
    "random_rotation": [("--random-rotation 20", ""), ("--random-rotation 20", "--random-rotation 10")],
    "random_bias": [("--random-bias 0.3", ""), ("--random-bias 0.3", "--random-bias 0.1")],
    "random_blur": [("--random-blur 1", ""), ("--random-blur 1", "--random-blur 0.7")],
    "random_resolution": [("--random-resolution 1", ""), ("--random-resolution 2", "--random-resolution 1")],
    "random_noise": [("--random-noise 0.2", ""), ("--random-noise 0.2", "--random-noise 0.1")],
    "object_share": [("--object-share 1", "")],
    "paste": [("--paste 0.5", ""), ("--paste 0.5", "--paste 0.7")],
    "sdm_of": [("--sdm-of scan", "--sdm-loss both")],
    "init": [("--init origin", "")],
    "iterations": [("--iterations 4", "")],
    "precision": [("--precision bf16", "")],
    "batch_size": [("--batch-size 3", "--labeled-batch 2")],
    "labeled_batch": [("--labeled-batch 1", "")],
    "optimizer": [("--optimizer adamw", "")],
    "lr": [("--lr 0.02", "")],
    "lr_schedule": [("--lr-schedule cosine", "")],
    "lr_steps": [("--lr-steps 2", ""), ("--lr-steps", "")],
    "lr_gamma": [("--lr-gamma 0.5", "")],
    "momentum": [("--momentum 0.5", "")],
    "weight_decay": [("--weight-decay 0.01", ""), ("--weight-decay 0.3", "--optimizer adamw")],
    "seed": [("--seed 2", "")],
}
TEACHER = "--filters 3, --softmax, --lambda-max 1, --ramp steps, --ramp-end 0.5, --ema-decay 0.3, --noise 0"
LEARNS = "--start 0 --full 0 --filters 8 --lr 0.3"  # enough for two networks that agree in part
BROKEN = "--classes 2 --filters 4 --ema-decay 0"  # with which a pseudo-label has several components, by many voxels
# Method: for each of its options flags that change the result, and where needed those beside which they do.
OWN_FLAGS = {
    "dtml": "--softmax, --filters 3, --k 20, --lambda-max 1, --consistency-times 2, --consistency-on unlabeled, "
    "--sdm-loss dis, --sdm-loss both, --sdm-loss both beside --sdm-loss dis --k 20, --dis-weight 2 beside --sdm-loss "
    "both, --ramp steps, --ramp literal, --ramp literal beside --ramp steps, --ramp-end 0.5, --ramp-end 0 beside "
    "--ramp-end 0.5",
    "dtml-plus": "--filters 3, --softmax, --k 20, --strong 1, --ema-decay 0.3 beside --start 0 --full 0, --ema-decay "
    "0.6 beside --ema-decay 0.3 --start 0, --pseudo-weight 1 beside --start 0 --full 0 --trust all, --start 0 "
    f"beside --trust all, --full 0.9 beside --start 0 --trust all, --trust all beside {LEARNS}, --trust voxel "
    f"beside {LEARNS}",
    "supervised": "--filters 3, --head sdm, --softmax, --softmax beside --no-softmax, --k 20 beside --head sdm",
    "mean-teacher": f"{TEACHER}, --consistency-on unlabeled, --ema-decay 0.6 beside --iterations 4, --noise 0.2",
    "ua-mt": f"{TEACHER}, --consistency-on all, --passes 7, --passes 1 beside --passes 2, --entropy-epsilon 0.5",
    "tcse": f"{TEACHER}, --consistency-on unlabeled, --scale 0.2, --scale 0.1 beside --scale 0.2",
    "double-unc": f"{TEACHER}, --consistency-on unlabeled, --passes 7, --no-learnable, --gamma 2, --feature-blocks "
    "bottom, --feature-blocks none, --feature-blocks none beside --no-learnable",
    "dtc": "--softmax, --filters 3, --beta 1, --k 20, --lambda-max 0.1, --ramp steps, --ramp-end 0.5",
    "sassnet": "--softmax, --filters 3, --beta 1, --adversarial-max 0.015, --ramp steps, --critic-lr 0.001, "
    "--critic-lr 0",
    "asdnet": "--filters 3, --softmax, --attention none, --attention released, --attention none beside --attention "
    "released, --lambda-adv 0.1, --lambda-semi 0.2, --threshold 0.46, --threshold 0.9 beside --threshold 0.46, "
    "--semi-start 0, --semi-start 0.5 beside --semi-start 0, --semi-start 1, --critic-lr 0.001, --critic-image",
    "dk-uxnet": "--backbone vnet, --dropout 0.2 beside --no-kmax, --filters 3, --no-kmax, --groups 2 3, "
    "--groups 2 3 2 beside --groups 2 3, --query-channels 48, --levels 16 8 4, --levels 8, --bn-momentum 0.01, "
    "--logit-scale 0.1, --no-share-weights, "
    "--crops independent, --noise-variance 0, --noise-variance 5, --qd-weight 0, --deep-weight 0, --deep-weight 1, "
    "--consistency-terms segc, --consistency-terms qdc, --consistency-terms none, --contrast sum, --contrast mse, "
    "--temperature 1, --lambda-max 1, --ramp steps, --ramp epochs",
    "cps": "--filters 3, --pseudo-weight 1, --pseudo-on unlabeled, --ramp-end 0.5, --ramp-end 1 beside --ramp-end 0.5",
    "bcp": "--filters 3, --start 0.5, --box 0.5, --pseudo-weight 1, --ema-decay 0.3, --no-largest-component beside "
    f"{BROKEN}",
    "ad-mt": "--filters 3, --ema-decay 0.3, --period 1, --threshold 0.5, --strong 1, --pseudo-weight 1 beside "
    "--threshold 0.5, --ramp-end 0.9 beside --threshold 0.5, --ramp-end 0 beside --threshold 0.5 --ramp-end 0.9",
    "mc-net-plus": "--filters 3, --softmax, --temperature 0.5, --target-gradient, --seg-weight 1, --lambda-max 0.1, "
    "--ramp literal, --ramp steps beside --ramp-end 0.9, --ramp-end 1",
    "ss-net": "--filters 3, --softmax, --distance agreement, --dropout-masks same, --magnitude 1, --xi 1, "
    "--separation 1, --prototypes 4, --rank lowest, --no-background, --no-prototype-attention, --lambda-max 0.1, "
    "--ramp literal, --ramp steps beside --ramp-end 0.9, --ramp-end 1",
    "unimatch": "--filters 3, --softmax, --threshold 0, --threshold 0.7 beside --threshold 0, --feature-dropout 0.2, "
    "--pseudo-loss dice beside --threshold 0, --feature-weight 1 beside --threshold 0, --strong-weight 1 beside "
    "--threshold 0, --strong 1 beside --threshold 0, --cutmix 1 beside --threshold 0, --cutmix 0 beside --threshold 0, "
    "--halve",
}


def pairs_of(method: str) -> dict[str, list[tuple[str, str]]]:
    """Option -> flags that change the result, and the flags beside which they do."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for entry in OWN_FLAGS[method].split(", "):
        changed, _, beside = entry.partition(" beside ")
        name = changed.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        pairs.setdefault(name, []).append((changed, beside))
    pairs.setdefault("backbone", [("--backbone uxnet", "")])
    pairs.setdefault("dropout", [("--dropout 0.2", "")])
    pairs["halvings"] = [("--halvings 4 4 2", "")]
    if hasattr(METHODS[method].Options, "batch_norm"):
        pairs["batch_norm"] = [("--batch-norm separate", "")]
    pairs["classes"] = [("--classes 2 --data two", "")] if METHODS[method].multiclass else []  # else: test_classes.py
    return pairs


OWN = {method: pairs_of(method) for method in OWN_FLAGS}
