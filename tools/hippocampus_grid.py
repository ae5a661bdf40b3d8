"""The grid of tools/reproduce.py for the hippocampus set: runs of LA with 8 labels, and what was tried there alone."""

from methods import METHODS
from tools.grid import BF16, JOINT, LA_RUNS, METHODS_TABLE, PAPER, RECENT, TUNED, Row, Tables, method_rows

SEVERAL = [name for name in (*PAPER, *RECENT) if METHODS[name].multiclass]
PASTED = "--paste 0.67"  # chosen on held-out scans

HIPPOCAMPUS_RUNS = {  # with LA's settings, but for those of the profile
    "supervised-softmax-8": LA_RUNS["supervised-normalized-8"],
    "plus-softmax-8": LA_RUNS["plus-8"],
    "plus-alone-softmax-8": LA_RUNS["plus-alone-8"],
    **{key: LA_RUNS[key] for key in ("dtml-tuned-8", "bcp-alone-8", "cps-alone-8")},
    **{key: LA_RUNS[key] for key in (f"{name}-tuned-8" if name in PAPER else f"{name}-8" for name in SEVERAL)},
    "supervised-softmax-bf16-8": LA_RUNS["supervised-normalized-bf16-8"],
    "supervised-softmax-208": f"--method supervised {TUNED} --labeled 208",
    "plus-alone-softmax-208": f"--method dtml-plus --labeled 208 --unlabeled 0 --batch-size 4 {BF16}",
    "supervised-pasted-8": f"{LA_RUNS['supervised-normalized-8']} {PASTED}",
    "plus-alone-pasted-8": f"{LA_RUNS['plus-alone-8']} {PASTED}",
    "plus-pasted-8": f"{LA_RUNS['plus-8']} {PASTED}",
    "mean-teacher-joint-8": f"{LA_RUNS['mean-teacher-tuned-8']} {JOINT}",
    **{f"{name}-joint-8": f"{LA_RUNS[f'{name}-8']} {JOINT}" for name in ("unimatch", "ad-mt")},
    # before a softmax was the default of several classes
    **{key: f"{LA_RUNS[key]} --no-softmax" for key in ("supervised-normalized-8", "plus-8", "plus-alone-8")},
    "supervised-normalized-208": f"--method supervised {TUNED} --labeled 208 --no-softmax",
}

HIPPOCAMPUS_TABLES: Tables = {
    METHODS_TABLE: ("All methods with the preset `tuned`, mean of both classes", [
        *method_rows(8, 209, others=SEVERAL, softmax="softmax-"),
        Row("V-Net", "208 / 0", "supervised-softmax-208"),
        Row("DTML+, labeled scans alone", "208 / 0", "plus-alone-softmax-208", output="ema_mean"),
    ]),
    "joint": ("Batch norm over labeled and unlabeled crops together: `--batch-norm joint`, mean of both classes", [
        Row("V-Net", "8 / 0", "supervised-softmax-8"),
        Row("Mean Teacher, `--batch-norm joint`", "8 / 201", "mean-teacher-joint-8"),
        Row("Mean Teacher", "8 / 201", "mean-teacher-tuned-8"),
        Row("UniMatch, `--batch-norm joint`", "8 / 201", "unimatch-joint-8"),
        Row("UniMatch", "8 / 201", "unimatch-8"),
        Row("AD-MT, `--batch-norm joint`", "8 / 201", "ad-mt-joint-8", output="teacher_1"),
        Row("AD-MT", "8 / 201", "ad-mt-8", output="teacher_1"),
    ]),
    "pasted": ("Labeled crops pasted into each other: BCP, and `--paste 0.67`, mean of both classes", [
        Row("V-Net", "8 / 0", "supervised-softmax-8"),
        Row("V-Net, pasted crops", "8 / 0", "supervised-pasted-8"),
        Row("BCP, labeled scans alone", "8 / 0", "bcp-alone-8"),
        Row("BCP", "8 / 201", "bcp-8"),
        Row("DTML+, labeled scans alone", "8 / 0", "plus-alone-softmax-8", output="ema_mean"),
        Row("DTML+, labeled scans alone, pasted crops", "8 / 0", "plus-alone-pasted-8", output="ema_mean"),
        Row("DTML+, pasted crops", "8 / 201", "plus-pasted-8", output="ema_mean"),
    ]),
    "precision": ("`--precision bf16`, mean of both classes", [
        Row("V-Net", "8 / 0", "supervised-softmax-8"),
        Row("V-Net, bf16", "8 / 0", "supervised-softmax-bf16-8"),
    ]),
    "sigmoids": ("A sigmoid for each class: `--no-softmax`, mean of both classes", [
        Row("V-Net, sigmoids", "8 / 0", "supervised-normalized-8"),
        Row("DTML+, labeled scans alone, sigmoids", "8 / 0", "plus-alone-8", output="ema_mean"),
        Row("DTML+, sigmoids: M_s", "8 / 201", "plus-8"),
        Row("DTML+, sigmoids", "8 / 201", "plus-8", output="ema_mean"),
        Row("V-Net, sigmoids", "208 / 0", "supervised-normalized-208"),
    ]),
}  # fmt: skip
