"""The grid of tools/reproduce.py: every run of Tables 1 to 3 of the DTML paper (Zhang & Zhang 2021), of DK-UXNet, and
of what goes beyond both. RUNS: key of a run -> its flags. TABLES: name -> title and rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

ALL_LABELED = (80, 208)  # labeled scans of LA's train.list, and of the hippocampus set's
SEMI_SUPERVISED = ("dtml", "mean-teacher", "ua-mt", "tcse", "dtc", "sassnet", "asdnet", "double-unc")
AUTHORS = {"dtml": "DTML", "ua-mt": "UA-MT", "dtc": "DTC", "sassnet": "SASSNet"}  # these have a preset `authors`
PAPER = {"mean-teacher": "Mean Teacher", "ua-mt": "UA-MT", "tcse": "TCSE", "double-unc": "DoubleUnc", "dtc": "DTC",
         "sassnet": "SASSNet", "asdnet": "ASDNet", "dk-uxnet": "DK-UXNet"}  # fmt: skip
RECENT = {
    "cps": "CPS",
    "mc-net-plus": "MC-Net+",
    "ss-net": "SS-Net",
    "unimatch": "UniMatch",
    "bcp": "BCP",
    "ad-mt": "AD-MT",
}
LABELED_ONLY = "--unlabeled 0 --consistency-terms none"  # of DK-UXNet: the same network on labeled scans only
ADAMW = "--optimizer adamw --lr 0.001 --weight-decay 0.01"  # DK-UXNet's
TUNED, AS_PUBLISHED = "--preset tuned", "--normalize none"
JOINT = "--batch-norm joint"  # as all methods were trained before there was another way
BF16 = "--precision bf16"
IN_FP32 = ("dtc", "sassnet")  # their one network has a distance head and stays in fp32
EARLY, SMALLER = "--ramp-end 0.2", "--downsample 2 --patch-size 32 32 16"
HELD_OUT = {"scans": "held-out", "stride": [16, 16, 8], "save": "none"}
BEYOND = {  # key: the one thing that is done in another way than in the paper, its flags
    "paper": ("as in the paper", ""),
    "cosine": ("cosine schedule of the learning rate", "--lr-schedule cosine"),
    "labeled": ("4 labeled and 2 unlabeled crops in a batch", "--batch-size 6 --labeled-batch 4"),
    "k": ("k = 50", "--k 50"),
    "grow": ("k grows from 15 to 1500", "--k-start 15"),
    "map": ("consistency on z: (1-z)/2 for m", "--consistency map"),
    "sure": ("consistency only where p is confident", "--consistency sure"),
    "mirror": ("the released codes' augmentation: always a flip", "--augment mirror"),
    "intensity": ("with intensity augmentation", "--intensity 0.3"),
    "mix": ("crops pasted into one another", "--mix 1"),
    "both": ("L_dis + L_mask", "--sdm-loss both"),
    "scan": ("L_dis + L_mask, distances of the whole scan", "--sdm-loss both --sdm-of scan"),
    "uxnet": ("UX-Net in place of V-Net", "--backbone uxnet"),
    "tuned": ("`tuned`: k, schedule, labeled crops and intensity", f"{TUNED} {AS_PUBLISHED} {JOINT}"),
    "ramp": ("`tuned`, ramp of lambda ends at 20 %", f"{TUNED} {AS_PUBLISHED} {JOINT} {EARLY}"),
    "ramp-1": ("the same, lambda rises to 1", f"{TUNED} {AS_PUBLISHED} {JOINT} {EARLY} --lambda-max 1"),
}
# Recorded with options that were removed. These rows show their records and cannot be run again.
RETIRED = {f"beyond-{key}" for key in ("grow", "map", "sure", "mix")}
LA_RUNS = {
    "supervised-16": "--method supervised --labeled 16",
    "supervised-80": "--method supervised --labeled 80",
    "supervised-sdm-16": "--method supervised --head sdm --labeled 16",
    "dtml-dis-16": "--method dtml --sdm-loss dis --labeled 16",
    "dtml-both-16": "--method dtml --sdm-loss both --labeled 16",
    "dtml-16-0": "--method dtml --labeled 16 --unlabeled 0",
    **{f"{name}-16": f"--method {name} --labeled 16" for name in SEMI_SUPERVISED},
    **{f"{name}-authors-16": f"--method {name} --preset authors --labeled 16" for name in AUTHORS},
    "supervised-8": "--method supervised --labeled 8",
    "dtml-8": "--method dtml --labeled 8",
    "tuned-16": f"--method dtml {TUNED} {AS_PUBLISHED} {JOINT} --labeled 16",
    # the same with its 4 labeled crops alone
    "tuned-16-0": f"--method dtml {TUNED} {AS_PUBLISHED} {JOINT} --labeled 16 --unlabeled 0 --batch-size 4",
    # the controls and the upper bound of tuned
    **{f"supervised-tuned-{n}": f"--method supervised {TUNED} {AS_PUBLISHED} --labeled {n}" for n in (8, 16, 80)},
    **{f"supervised-normalized-{n}": f"--method supervised {TUNED} --labeled {n}" for n in (4, 8, 16, 80)},
    **{f"supervised-normalized-bf16-{n}": f"--method supervised {TUNED} --labeled {n} {BF16}" for n in (8, 16)},
    **{f"tuned-normalized-{n}": f"--method dtml {TUNED} {JOINT} --labeled {n} {BF16}" for n in (4, 8, 16)},
    "dtml-tuned-8": f"--method dtml {TUNED} --labeled 8 {BF16}",
    # All settings of DTML+ were chosen on 16 held-out training scans, and the claim was fixed before any of these runs
    # saw a test scan: with 8 labels and 5 runs each, ema_mean of plus-8 is above that of plus-alone-8.
    **{f"plus-{n}": f"--method dtml-plus --labeled {n} {BF16}" for n in (4, 8, 16)},
    # the same networks and averages on the same labeled crops, without unlabeled scans; with 80 labels the upper bound
    **{f"plus-alone-{n}": f"--method dtml-plus --labeled {n} --unlabeled 0 --batch-size 4 {BF16}" for n in (4, 8, 16)},
    "plus-alone-80": f"--method dtml-plus --labeled 80 --batch-size 4 {BF16}",
    **{f"{name}-8": f"--method {name} {TUNED} --labeled 8 {BF16}" for name in RECENT},
    "bcp-alone-8": f"--method bcp {TUNED} --labeled 8 --unlabeled 0 {BF16}",  # labeled crops pasted into each other
    "cps-alone-8": f"--method cps {TUNED} --labeled 8 --unlabeled 0 {BF16}",  # two V-Nets that do not see each other
    **{f"{name}-tuned-8": f"--method {name} {TUNED} --labeled 8 {'' if name in IN_FP32 else BF16}" for name in PAPER},
    "supervised-sdm-tuned-16": f"--method supervised --head sdm --k 50 {TUNED} {AS_PUBLISHED} --labeled 16",
    "tuned-8": f"--method dtml {TUNED} {AS_PUBLISHED} {JOINT} --labeled 8",
    "dtml-uxnet-16": "--method dtml --backbone uxnet --labeled 16",
    "supervised-adamw-16": f"--method supervised {ADAMW} --labeled 16",
    "dtml-adamw-16": f"--method dtml {ADAMW} --labeled 16",
    **{f"dk-uxnet-{n}": f"--method dk-uxnet --labeled {n}" for n in (8, 16)},
    **{f"dk-uxnet-released-{n}": f"--method dk-uxnet --preset released --labeled {n}" for n in (8, 16)},
    **{f"dk-uxnet-alone-{n}": f"--method dk-uxnet --labeled {n} {LABELED_ONLY}" for n in (8, 16)},
    **{f"beyond-{key}": f"--method dtml --labeled 16 --unlabeled 48 {flags}" for key, (_, flags) in BEYOND.items()},
    "beyond-flips": "--method dtml --labeled 16 --unlabeled 48",
}
TESTS: dict[str, dict[str, Any]] = {  # key: options of test_la.py other than the usual ones
    **{f"beyond-{key}": HELD_OUT for key in BEYOND},
    "beyond-flips": {**HELD_OUT, "flips": 8, "output": ["seg", "sdm", "mean"]},
}
TRAINED_AS = {"beyond-flips": "beyond-paper"}  # key: that of the run whose weights it tests in another way
ABLATIONS = {  # key: label of the row, flags
    "all": ("DK-UXNet, `repaired`", ""),
    "alone": ("labeled scans alone", LABELED_ONLY),
    "no-segc": ("without L_segc", "--consistency-terms qdc"),
    "no-qdc": ("without L_qdc", "--consistency-terms segc"),
    "no-consistency": ("without both", "--consistency-terms none"),
    "no-qd": ("without L_qd", "--qd-weight 0"),
    "no-kmax": ("without the k-means decoder", "--no-kmax"),
    "vnet": ("without the UX-Net: V-Net", "--backbone vnet"),
    "two": ("a network for each view", "--no-share-weights"),
    "levels": ("levels of the figure: 16 8 4", "--levels 16 8 4"),
    "mse": ("mean squared error in place of contrast", "--contrast mse"),
    "deep": ("repair undone: assignment of the layers not trained", "--deep-weight 0"),
    "sum": ("repair undone: contrast of sums", "--contrast sum"),
    "crops": ("repair undone: independent crops", "--crops independent"),
    "momentum": ("repair undone: batch-norm momentum 0.01", "--bn-momentum 0.01"),
    "groups": ("repair undone: groups 16 4 108", "--groups 16 4 108"),
    "released": ("`released`", "--preset released"),
}
PHANTOM_RUNS = {
    "supervised-8": "--method supervised",
    "supervised-40": "--method supervised --labeled 40",
    "supervised-sdm-8": "--method supervised --head sdm",
    **{f"{name}-8": f"--method {name}" for name in SEMI_SUPERVISED},
    "dk-uxnet-8": "--method dk-uxnet",
    "dk-uxnet-alone-8": f"--method dk-uxnet {LABELED_ONLY}",
    **{f"ablation-{key}": f"--method dk-uxnet {SMALLER} {flags}" for key, (_, flags) in ABLATIONS.items()},
}


class Row(NamedTuple):
    """A row of a table: its label, its labeled / unlabeled scans, the key of its run, the DTML paper's four figures (if
    it gives them), and the output that is scored. `alone`, in the table at a glance, is the key of the run of the
    same method on the labeled scans alone."""

    label: str
    scans: str
    key: str
    paper: str = ""
    output: str = "seg"
    alone: str = ""

    @property
    def labeled(self) -> int:
        """Its number of labeled scans."""
        return int(self.scans.split(" / ")[0])


GLANCE = "glance"  # the README's table, printed only on request, as its rows stand in other tables too
METHODS_TABLE = "methods"  # all methods with the same training settings
BEYOND_TABLE = "beyond"  # printed where it has records, or on request
Tables = dict[str, tuple[str, list[Row]]]


def method_rows(n: int, scans: int, others: Sequence[str], softmax: str = "") -> list[Row]:
    """The rows of all methods, V-Net, DTML and DTML+ with its control among them, with n labeled of so many scans.

    `others` are further methods. `softmax` is part of the keys of runs that have a namesake with sigmoids."""
    both = f"{n} / {scans - n}"
    return [
        Row("V-Net", f"{n} / 0", f"supervised-{softmax or 'normalized-'}{n}"),
        *(Row(PAPER[name], both, f"{name}-tuned-{n}", output="seg") for name in others if name in PAPER),
        Row("DTML", both, f"dtml-tuned-{n}" if others else f"tuned-normalized-{n}"),
        *([Row("BCP, labeled scans alone", f"{n} / 0", f"bcp-alone-{n}")] * ("bcp" in others)),
        *([Row("Two V-Nets, labeled scans alone", f"{n} / 0", f"cps-alone-{n}", output="mean")] * ("cps" in others)),
        *(
            Row(RECENT[name], both, f"{name}-{n}", output="teacher_1" if name == "ad-mt" else "seg")
            for name in others
            if name in RECENT
        ),
        Row("DTML+, labeled scans alone", f"{n} / 0", f"plus-alone-{softmax}{n}", output="ema_mean"),
        Row("DTML+", both, f"plus-{softmax}{n}", output="ema_mean"),
    ]


def plus_rows(n: int) -> list[Row]:
    """DTML+, its control, DTML and the V-Net with n labeled of 80 scans, and which output is scored."""
    both = f"{n} / {80 - n}"
    return [
        Row("V-Net", f"{n} / 0", f"supervised-normalized-{n}"),
        Row("DTML+, labeled scans alone: mean of the averages", f"{n} / 0", f"plus-alone-{n}", output="ema_mean"),
        Row("DTML `tuned`: mean of both", both, f"tuned-normalized-{n}", output="mean"),
        Row("DTML+: M_s", both, f"plus-{n}"),
        Row("DTML+: mean of the averages", both, f"plus-{n}", output="ema_mean"),
    ]


def all_labeled_rows(n: int, output: str = "") -> list[Row]:
    """The upper bounds with all n scans labeled: the V-Net, and DTML+'s networks by an output that the label names."""
    return [
        Row("V-Net", f"{n} / 0", f"supervised-normalized-{n}"),
        Row(f"DTML+, labeled scans alone{output}", f"{n} / 0", f"plus-alone-{n}", output="ema_mean"),
    ]


LA_TABLES: Tables = {
    GLANCE: ("Results at a glance", [
        row
        for n in (4, 8, 16)
        for row in (
            Row("V-Net", f"{n} / 0", f"supervised-normalized-{n}"),
            Row("DTML", f"{n} / {80 - n}", f"tuned-normalized-{n}"),
            Row("DTML+, labeled scans alone", f"{n} / 0", f"plus-alone-{n}", output="ema_mean"),
            Row("DTML+", f"{n} / {80 - n}", f"plus-{n}", output="ema_mean", alone=f"plus-alone-{n}"),
        )
    ] + all_labeled_rows(80)),
    "1": ("Table 1: the supervised loss of M_d", [
        Row("L_dis", "16 / 64", "dtml-dis-16", "89.72 81.55 1.97 7.64"),
        Row("L_mask", "16 / 64", "dtml-16", "90.12 82.14 1.82 7.01"),
        Row("L_dis + L_mask", "16 / 64", "dtml-both-16", "89.89 81.82 1.93 6.61"),
    ]),
    "2": ("Table 2: single networks and mutual learning", [
        Row("M_s only", "16 / 0", "supervised-16", "86.03 76.06 3.51 14.26"),
        Row("M_d only", "16 / 0", "supervised-sdm-16", "88.69 79.91 3.12 11.62", "sdm"),
        Row("DTML", "16 / 0", "dtml-16-0", "89.17 80.68 2.13 7.82"),
        Row("DTML", "16 / 64", "dtml-16", "90.12 82.14 1.82 7.01"),
    ]),
    "3": ("Table 3: methods", [
        Row("V-Net", "16 / 0", "supervised-16", "86.03 76.06 3.51 14.26"),
        Row("V-Net", "80 / 0", "supervised-80", "91.14 83.82 1.52 5.75"),
        Row("Mean Teacher (not in the paper)", "16 / 64", "mean-teacher-16"),
        Row("ASDNet", "16 / 64", "asdnet-16", "87.90 78.85 2.08 9.24"),
        Row("TCSE", "16 / 64", "tcse-16", "88.15 79.20 2.44 9.57"),
        Row("UA-MT", "16 / 64", "ua-mt-16", "88.88 80.21 2.26 7.32"),
        Row("DTC (its authors publish Jaccard 80.98)", "16 / 64", "dtc-16", "89.42 80.89 2.10 7.32"),
        Row("SASSNet", "16 / 64", "sassnet-16", "89.54 81.24 2.20 8.24"),
        Row("DoubleUnc", "16 / 64", "double-unc-16", "89.65 81.35 2.03 7.04"),
        Row("DTML", "16 / 64", "dtml-16", "90.12 82.14 1.82 7.01"),
    ]),
    "authors": ("The presets `authors`: as in the released code", [
        Row("DTML, `paper`", "16 / 64", "dtml-16", "90.12 82.14 1.82 7.01"),
        *(Row(f"{label}, `authors`", "16 / 64", f"{name}-authors-16") for name, label in AUTHORS.items()),
    ]),
    "tuned": ("The preset `tuned`, on the test scans", [
        Row("V-Net", "16 / 0", "supervised-16", "86.03 76.06 3.51 14.26"),
        Row("V-Net, schedule and augmentation of `tuned`", "16 / 0", "supervised-tuned-16"),
        Row("M_d only, k, schedule and augmentation of `tuned`", "16 / 0", "supervised-sdm-tuned-16", output="sdm"),
        Row("DTML `tuned`, labeled scans alone: M_s", "16 / 0", "tuned-16-0"),
        Row("DTML `tuned`, labeled scans alone: mean of both", "16 / 0", "tuned-16-0", output="mean"),
        Row("DTML", "16 / 64", "dtml-16", "90.12 82.14 1.82 7.01"),
        Row("DTML, mean of both", "16 / 64", "dtml-16", output="mean"),
        Row("DTML `tuned`: M_s", "16 / 64", "tuned-16"),
        Row("DTML `tuned`: M_d", "16 / 64", "tuned-16", output="sdm"),
        Row("DTML `tuned`: mean of both", "16 / 64", "tuned-16", output="mean"),
        Row("V-Net", "80 / 0", "supervised-80", "91.14 83.82 1.52 5.75"),
        Row("V-Net, schedule and augmentation of `tuned`", "80 / 0", "supervised-tuned-80"),
        Row("V-Net, schedule and augmentation of `tuned`", "8 / 0", "supervised-tuned-8"),
        Row("DTML `tuned`: mean of both", "8 / 72", "tuned-8", output="mean"),
    ]),
    "normalized": ("`--normalize scan`, on the test scans", [
        *(Row("V-Net, schedule and augmentation of `tuned`", f"{n} / 0", f"supervised-tuned-{n}") for n in (8, 16, 80)),
        *(Row("the same, normalized", f"{n} / 0", f"supervised-normalized-{n}") for n in (8, 16, 80)),
    ]),
    "plus": ("DTML+ and what the unlabeled scans add, each scan normalized, on the test scans", [
        row for n in (4, 8, 16) for row in plus_rows(n)
    ] + all_labeled_rows(80, ": mean of the averages")),
    "precision": ("`--precision bf16`, each scan normalized, on the test scans", [
        row
        for n in (8, 16)
        for row in (
            Row("V-Net, fp32", f"{n} / 0", f"supervised-normalized-{n}"),
            Row("V-Net, bf16", f"{n} / 0", f"supervised-normalized-bf16-{n}"),
        )
    ]),
    METHODS_TABLE: ("All methods with the preset `tuned`", [
        row for n in (4, 8, 16) for row in method_rows(n, 80, others=(*PAPER, *RECENT) if n == 8 else ())
    ] + all_labeled_rows(80)),
    "dk-uxnet": ("DK-UXNet, whose paper's figures were not available", [
        Row("V-Net", "8 / 0", "supervised-8"),
        Row("DTML", "8 / 72", "dtml-8"),
        Row("DK-UXNet's network, labeled scans alone", "8 / 0", "dk-uxnet-alone-8"),
        Row("DK-UXNet, `repaired`", "8 / 72", "dk-uxnet-8"),
        Row("DK-UXNet, `released`", "8 / 72", "dk-uxnet-released-8"),
        Row("V-Net", "16 / 0", "supervised-16"),
        Row("DTML", "16 / 64", "dtml-16"),
        Row("V-Net, AdamW as DK-UXNet", "16 / 0", "supervised-adamw-16"),
        Row("DTML, AdamW as DK-UXNet", "16 / 64", "dtml-adamw-16"),
        Row("DTML on UX-Net", "16 / 64", "dtml-uxnet-16"),
        Row("DK-UXNet's network, labeled scans alone", "16 / 0", "dk-uxnet-alone-16"),
        Row("DK-UXNet, `repaired`", "16 / 64", "dk-uxnet-16"),
        Row("DK-UXNet, `released`", "16 / 64", "dk-uxnet-released-16"),
    ]),
    "beyond": ("One change to the paper's method, on 16 held-out scans of train.list", [
        Row("as in the paper", "16 / 48", "beyond-paper"),
        Row("tested with all eight flips and rotations", "16 / 48", "beyond-flips"),
        *(Row(label, "16 / 48", f"beyond-{key}") for key, (label, _) in BEYOND.items() if key != "paper"),
    ]),
}  # fmt: skip
COMPARED_WITH = {  # table: runs that its rows of as many labels are compared with, by M_s or the output after the colon
    "1": ["dtml-16"],
    "2": ["supervised-16"],
    "3": ["supervised-16", "dtml-16"],
    "authors": ["dtml-16"],
    "tuned": ["dtml-16", "supervised-tuned-16", "supervised-tuned-8"],
    "normalized": ["supervised-tuned-8", "supervised-tuned-16", "supervised-tuned-80"],
    "plus": [f"plus-alone-{n}:ema_mean" for n in (4, 8, 16)],
    "precision": ["supervised-normalized-8", "supervised-normalized-16", "supervised-softmax-8"],
    "joint": ["supervised-softmax-8"],
    "pasted": ["supervised-softmax-8", "bcp-alone-8", "plus-alone-pasted-8:ema_mean"],
    "sigmoids": ["supervised-normalized-8", "plus-alone-8:ema_mean"],
    METHODS_TABLE: ["supervised-normalized-8", "supervised-softmax-8", "plus-8:ema_mean", "plus-softmax-8:ema_mean"],
    "dk-uxnet": ["supervised-8", "supervised-16"],
}
PHANTOM_TABLES: Tables = {
    "methods": ("Methods on the phantom set", [
        Row("supervised, 8 labeled (lower bound)", "8 / 0", "supervised-8"),
        Row("supervised, all 40 labeled (upper bound)", "40 / 0", "supervised-40"),
        Row("supervised, M_d alone", "8 / 0", "supervised-sdm-8", output="sdm"),
        *(Row(name, "8 / 32", f"{name}-8") for name in SEMI_SUPERVISED),
        Row("dk-uxnet", "8 / 32", "dk-uxnet-8"),
        Row("dk-uxnet's network, labeled scans alone", "8 / 0", "dk-uxnet-alone-8"),
    ]),
    "dk-uxnet": ("Ablation of DK-UXNet's parts and repairs, at half resolution, crops of 32x32x16", [
        Row(label, "8 / 0" if key == "alone" else "8 / 32", f"ablation-{key}") for key, (label, _) in ABLATIONS.items()
    ]),
}  # fmt: skip
