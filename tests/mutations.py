"""Faults put into a copy of the code, one at a time, and the tests that must then fail.

    python -m tests.mutations                     all of them, as a Markdown table
    python -m tests.mutations --only map-sign     one

The tests that catch one are run again without it, all in one go. An old text that is no longer in its file makes the
row say so: give the mutation the text that stands there now.
"""

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# Libraries that the forked processes then have: none of the code itself.
import h5py  # noqa: F401
import medpy.metric  # noqa: F401
import nibabel  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import SimpleITK  # noqa: F401
import skimage.measure  # noqa: F401
import torch
import torch.utils.tensorboard

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 900.0
NOT_CAUGHT = "**not caught**"


class Mutation(NamedTuple):
    """A fault: in `file` the text `old` becomes `new`; pytest with `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: str


LOSSES, DATA = "tests/test_losses.py", "tests/test_data.py"
METHODS, TEACHERS = "tests/test_methods.py", "tests/test_teachers.py"
CHECKPOINT, REFUSED = "tests/faults/test_checkpoint_faults.py", "tests/faults/test_refused_checkpoints.py"
RESUME, REPRODUCE = "tests/faults/test_stop_and_resume.py", "tests/test_reproduce.py"
BATCH_NORM = "tests/test_batch_norm.py"

MUTATIONS = [
    # losses
    Mutation("map-sign", "losses/terms.py", "torch.sigmoid(-k *", "torch.sigmoid(k *",
             "m is the background, as the printed equation (2)", LOSSES),
    Mutation("dice-squares", "losses/terms.py", "(p_c * p_c + y)", "(p_c + y)",
             "Dice without the squares of V-Net", LOSSES),
    Mutation("half-of-seg", "losses/terms.py", "0.5 * (ce_loss(", "(ce_loss(", "L_seg is twice as large", LOSSES),
    Mutation("consistency-square", "losses/terms.py", "(m - p).square().mean()", "(m - p).abs().mean()",
             "equation (4) is an absolute difference", LOSSES),
    Mutation("masked-mean", "losses/terms.py", "(weight * x).sum() / weight.sum().clamp(min=1)",
             "(weight * x).mean()", "the masked consistency is divided by all voxels", TEACHERS),
    Mutation("ramp-square", "losses/ramps.py", "math.exp(-5 * left**2)", "math.exp(-5 * left)",
             "the Gaussian ramp is the one printed in the paper", LOSSES),
    Mutation("lr-step", "losses/ramps.py", "iteration >= step", "iteration > step",
             "the learning rate drops an iteration late", LOSSES),
    Mutation("sdm-sign", "losses/sdm.py", "sdm[box] -= np.where(", "sdm[box] += np.where(",
             "distances are positive inside too", LOSSES),
    Mutation("sdm-of-crop", "losses/sdm.py", "margin=1)", "margin=0)",
             "distances to a background beyond the object's box", LOSSES),
    # methods
    Mutation("ema-direction", "losses/ema.py", "averaged], 1 - decay)", "averaged], decay)",
             "the teacher is nearly the student", TEACHERS),
    Mutation("ema-warm-up", "losses/ema.py", "min(1 - 1 / (iteration + 1), limit)", "limit",
             "the teacher's first weights stay for long", TEACHERS),
    Mutation("teacher-gradient", "losses/ema.py", "copy.deepcopy(student).requires_grad_(False)",
             "copy.deepcopy(student)", "the optimiser moves the teacher", METHODS),
    Mutation("ema-buffers", "losses/ema.py", "zip(teacher.state_dict().values(), student.state_dict().values(), ",
             "zip(teacher.parameters(), student.parameters(), ", "a teacher has the first batch-norm statistics",
             TEACHERS),
    Mutation("cross-labels", "methods/cps.py", "ce_loss(logits[i][part], pseudo[1 - i][part]",
             "ce_loss(logits[i][part], pseudo[i][part]", "each network of CPS learns its own label",
             "tests/test_cps.py"),
    Mutation("warm-up-of-bcp", "methods/bcp.py", "if self.started(iteration) else 0.0", "",
             "the teacher lags behind the student of the warm-up", "tests/test_bcp.py"),
    Mutation("confidence", "methods/unimatch.py", "(confidence(p)[L:] >= o.threshold)",
             "(confidence(p)[L:] <= o.threshold)", "UniMatch learns what is uncertain", "tests/test_unimatch.py"),
    Mutation("turns-of-teachers", "methods/ad_mt.py", "self.turns[:iteration] == turn", "self.turns == turn",
             "the warm-up of a teacher counts later turns", "tests/test_ad_mt.py"),
    Mutation("k-means", "networks/kmax.py", "self.value(x) @ hard_assignment(M)", "self.value(x) @ M.softmax(dim=1)",
             "queries receive shares of all voxels", "tests/test_dk_uxnet.py"),
    Mutation("certain-voxels", "methods/ua_mt.py", "(uncertainty < self.threshold(",
             "(uncertainty > self.threshold(", "UA-MT learns where its teacher is uncertain", TEACHERS),
    Mutation("gradient-of-m", "methods/dtml.py", "consistency_loss(m[first:],", "consistency_loss(m[first:].detach(),",
             "M_d does not learn from M_s", LOSSES),
    Mutation("critic-gradient", "methods/adversary.py", "critic.requires_grad_(False), lr", "critic, lr",
             "the method's optimiser moves the critic", METHODS),
    Mutation("critic-target", "methods/sassnet.py", "torch.ones(len(verdict)", "torch.zeros(len(verdict)",
             "the V-Net helps the critic", "tests/test_golden.py -k sassnet"),
    Mutation("turn-back", "losses/perturbation.py", "torch.rot90(item, -k,", "torch.rot90(item, k,",
             "TCSE compares a turned prediction with another one", TEACHERS),
    Mutation("not-finite-gradient", "methods/finite.py",
             "losses.total.detach() + torch.nn.utils.get_total_norm(gradients.values())", "losses.total.detach()",
             "a gradient that is not finite reaches the weights", "tests/faults/test_not_finite.py"),
    # data
    Mutation("unlabeled-label", "dataloaders/training.py", "find_cases(folder, unlabeled_names, labeled=False",
             "find_cases(folder, unlabeled_names, labeled=True", "labels of unlabeled scans are opened",
             "tests/test_leaks.py"),
    Mutation("unlabeled-stream", "dataloaders/two_stream.py", "(self.labeled + second)", "second",
             "the unlabeled stream draws labeled scans", DATA),
    Mutation("replacement", "dataloaders/two_stream.py", "generator.permutation(self.labeled)[",
             "generator.integers(self.labeled, size=self.labeled)[", "an epoch leaves labeled scans out",
             "tests/test_leaks.py -k epoch"),
    Mutation("last-offset", "dataloaders/augmentation.py", "max(side - s, 0) + 1)", "max(side - s, 1))",
             "no crop reaches the last voxels", DATA),
    Mutation("turns", "dataloaders/augmentation.py", "((), (0,), (0, 1), (1,))", "((), (1,), (0, 1), (0,))",
             "quarter turns go the other way round", DATA),
    Mutation("label-between", "dataloaders/two_stream.py", 'warp(label.float(), box, "nearest")',
             'warp(label.float(), box, "bilinear")', "a rotated label has classes in between",
             "tests/test_augmentation.py"),
    Mutation("rotation-in-voxels", "dataloaders/augmentation.py",
             "np.diag(1 / np.array(spacing)) @ turned.T @ np.diag(spacing)", "turned.T",
             "a rotation shears what has voxels of unequal sides", "tests/test_augmentation.py"),
    Mutation("mean-of-scan", "dataloaders/normalization.py", "scaled -= np.float32(self.mean)", "scaled -= 0",
             "--normalize leaves the mean of a scan", "tests/test_normalization.py"),
    Mutation("half-of-a-cell", "utils/resample.py", ">= 0.5", "> 0.5",
             "thin objects vanish at half resolution", "tests/test_sliding_window.py"),
    Mutation("stale-cache", "dataloaders/disk_cache.py", 'if entry["source"] != source or (', "if (",
             "a changed scan is trained on as it was", DATA),
    Mutation("turned-twin", "dataloaders/fingerprints.py", "for axes in itertools.permutations(range(3))",
             "for axes in [(0, 1, 2)]", "a turned copy of a scan is another scan", "tests/test_fingerprints.py"),
    Mutation("trained-scans", "dataloaders/unseen.py", "        if matches:\n", "        if False:\n",
             "a scan of the training is tested on", "tests/test_held_out.py"),
    # sliding window
    Mutation("last-window", "evaluation/sliding_window.py", "math.ceil((side - patch) / stride)",
             "math.floor((side - patch) / stride)", "voxels at the far border have no window",
             "tests/test_sliding_window.py"),
    Mutation("window-weights", "evaluation/sliding_window.py", "(n - 1) / 2) / (n / 8)", "n / 2) / (n / 8)",
             "the weights of a window are not symmetric", "tests/test_sliding_window.py"),
    Mutation("flips-back", "evaluation/sliding_window.py", ".flip(axes).rot90(-turns, (2, 3))",
             ".rot90(-turns, (2, 3)).flip(axes)", "predictions of turned windows are averaged in another place",
             "tests/test_beyond.py -k flips"),
    Mutation("stride-of-half", "evaluation/sliding_window.py", "max(step // downsample, 1)", "max(step, 1)",
             "at half resolution windows are twice as far apart", "tests/test_sliding_window.py tests/test_test_la.py"),
    Mutation("held-out", "tools/tested_scans.py", "= others_of(train, seen, patients_of(folder))", "= train",
             "scans of the training are scored as held out", "tests/test_held_out.py"),
    # channels, windows, folds and series
    Mutation("slice-order", "dataloaders/dicom.py", "reader.SetFileNames(list(files))",
             "reader.SetFileNames(sorted(files, reverse=True))", "a series lies upside down",
             "tests/test_predict_folders.py -k 'series or twin'"),
    Mutation("dropout-of-heads", "networks/heads.py", "weights if kept is None else weights * kept",
             "weights + 0 * kept", "nothing is dropped before the heads", "tests/test_networks.py"),
    Mutation("voxels-of-a-doubled-map", "networks/convolution.py", "g.permute(0, 1, 3, 5, 2, 4, 6, 7)",
             "g.permute(0, 1, 3, 5, 4, 2, 6, 7)", "the gradient of a transposed convolution swaps x and y",
             "tests/test_networks.py -k transposed"),
    Mutation("window-width", "dataloaders/normalization.py", "(level - width / 2, level + width / 2)",
             "(level - width, level + width)", "a window is twice as wide", "tests/test_normalization.py"),
    Mutation("own-intensities", "dataloaders/normalization.py", "raw_of(case) if how.kind in OF_RAW else None", "None",
             "a window is of the scaled intensities", "tests/test_normalization.py"),
    Mutation("channel-order", "tools/given_scans.py", "in_order(key[1], numbered[key], ",
             "in_order(key[1], dict(zip(numbered[key], reversed(numbered[key].values()))), ",
             "channels reach the network in another order", "tests/test_channels.py -k named"),
    Mutation("fold-of-training", "dataloaders/folds.py", "!= chosen], left_out", "!= folds], left_out",
             "a fold is trained on", "tests/test_folds.py"),
    Mutation("patients-of-fold", "dataloaders/folds.py", "{name: patients.get(name, name) for", "{name: name for",
             "patients are torn between folds", "tests/test_folds.py"),
    Mutation("patients-seen", "dataloaders/patients.py", "patients.get(name, name) not in known]", "name not in known]",
             "unlabeled scans of a fold's patients are trained on", "tests/test_folds.py"),
    Mutation("patients-split", "tools/split.py", "if place.get(patient[name]) == \"test\"}", "if False}",
             "later scans of a tested patient are not tested", "tests/test_folds.py"),
    Mutation("object-share", "dataloaders/two_stream.py", "chance.random() >= self.object_share or", "",
             "every labeled crop is placed on the object", "tests/test_object_share.py"),
    Mutation("classes-alike", "dataloaders/two_stream.py", "objects[chance.integers(len(objects))]", "objects[0]",
             "crops are placed on the first class alone", "tests/test_object_share.py"),
    Mutation("further-schedule", "tools/command_line.py", '"iterations": flags["iterations"], "lr_steps"', '"lr_steps"',
             "a finished run does not go on", "tests/test_start.py"),
    Mutation("one-pass", "methods/base.py", 'batch_norm == "separate"', 'batch_norm == "joint"',
             "--batch-norm makes the passes of the other choice", BATCH_NORM),
    Mutation("parts-in-order", "methods/base.py", "torch.cat(list(parts))", "torch.cat(list(parts)[::-1])",
             "the outputs of unlabeled crops stand before those of labeled ones", BATCH_NORM),
    Mutation("same-recipe", "methods/base.py", '"labeled_batch": 4,', "", "methods differ in their labeled crops",
             "tests/test_command_line.py"),
    Mutation("best-of-latex", "tools/formats.py", "value == max(figures.values())", "value == min(figures.values())",
             "the worst figure is bold", "tests/test_formats.py"),
    # metrics and statistics
    Mutation("asd-direction", "evaluation/metrics.py", "float(a_to_b.mean())", "float(b_to_a.mean())",
             "ASD is from the label to the prediction", "tests/test_metrics.py"),
    Mutation("percentile", "evaluation/metrics.py", ")), 95)", ")), 100)", "95HD is the Hausdorff distance",
             "tests/test_metrics.py"),
    Mutation("penalty", "evaluation/metrics.py", "float(np.linalg.norm(lengths))", "0.0",
             "an empty prediction has the best distance", "tests/test_metrics.py"),
    Mutation("pairing", "evaluation/statistics.py", "[[run[case] for case in shared]",
             "[sorted(run[case] for case in shared)", "scans are no longer paired", "tests/test_statistics.py"),
    Mutation("holm", "evaluation/statistics.py", "(len(order) - rank) * p[i]", "p[i]",
             "p-values are not corrected", "tests/test_statistics.py"),
    Mutation("run-bootstrap", "evaluation/statistics.py", "            if k > 1:\n", "            if k > 99:\n",
             "intervals do not contain the variation of runs", "tests/test_interval.py"),
    Mutation("two-sided-p", "evaluation/statistics.py", "np.abs(b.mean(axis) - a.mean(axis))",
             "b.mean(axis) - a.mean(axis)", "p counts one direction alone", "tests/test_statistics.py"),
    Mutation("spacing-of-score", "evaluation/scores.py", "(a, b, spacing, tolerance, more)",
             "(a, b, spacing and (1, 1, 1), tolerance, more)",
             "distances in mm are those in voxels", "tests/test_test_la.py tests/test_metrics.py"),
    Mutation("largest", "utils/masks.py", ".argmax() + 1", ".argmin() + 1", "the smallest component is kept",
             "tests/test_metrics.py tests/test_predict.py tests/test_test_la.py"),
    Mutation("at-the-tolerance", "evaluation/metrics.py", "tolerance * (1 + ROUNDING)", "tolerance * (1 - ROUNDING)",
             "NSD leaves out what is exactly so near", "tests/test_metrics.py"),
    # checkpoints and resuming
    Mutation("atomic-rename", "utils/checkpoint.py", "os.replace(partial, path)", "shutil.copy(partial, path)",
             "a reader or a power cut finds half a checkpoint", f"{CHECKPOINT} -k 'test_01 or test_02'"),
    Mutation("checksum", "utils/checkpoint.py", "archive.testzip() or", "None or",
             "flipped bits are loaded without a word", f"{CHECKPOINT} -k test_06"),
    Mutation("pickle", "utils/checkpoint.py", "weights_only=True", "weights_only=False",
             "loading a checkpoint runs code from it", "tests/faults/test_hostile_checkpoints.py"),
    Mutation("optimiser-state", "tools/training.py", 'fit_optimizer(optimizer, state["optimizer"])', "pass",
             "a resumed run has no momentum", f"{RESUME} -k test_11"),
    Mutation("seed-of-iteration", "train_dtml.py", "seed_iteration(o.seed, iteration, RANK)",
             "seed_iteration(o.seed, iteration - t.start, RANK)", "a resumed run draws other dropout masks",
             f"{RESUME} -k test_11"),
    Mutation("stale-lock", "utils/run_lock.py", 'owner["born"] != _birth(owner["pid"])', "False",
             "a lock of a process that is gone is kept by another one", "tests/faults/test_lock.py"),
    Mutation("mean-of-ranks", "utils/distributed.py", "(flat / RANKS)", "flat",
             "a critic on two GPUs learns twice as fast", "tests/test_distributed.py"),
    Mutation("shared-biases", "tools/share.py", "weight.dim() < 2 or ", "", "batch norms are rounded too",
             "tests/test_share.py"),
    Mutation("released-heads", "methods/released.py", '{"seg": "heads.sdm.", "sdm": "heads.seg."}',
             '{"seg": "heads.seg.", "sdm": "heads.sdm."}', "the heads that the released DTML uses are dropped",
             "tests/test_released.py"),
    Mutation("best-checkpoint", "train_dtml.py", 'dice > (t.best["dice"] if t.best else -1)',
             'dice < (t.best["dice"] if t.best else 2)', "best.pt is the worst in validation",
             "tests/test_validation.py"),
    # conversion and prediction
    Mutation("origin", "dataloaders/orientation.py", "shape[axis] - 1 if", "shape[axis] if",
             "a turned scan lies a voxel aside", "tests/test_orientation.py"),
    Mutation("spacing", "dataloaders/images.py", "np.rint(shape * old / new)", "np.rint(shape * new / old)",
             "a scan is resampled the wrong way", "tests/test_images.py tests/test_convert.py"),
    Mutation("label-values", "tools/case_of_scan.py", "[np.isin(label, group)] = number",
             "[np.isin(label, group)] = np.max(group)",
             "classes keep the values of the files", "tests/test_convert.py"),
    Mutation("turn-of-prediction", "tools/segment.py", '"label": back(label)', '"label": label',
             "the segmentation lies across the scan", "tests/test_predict.py tests/test_orientation.py"),
    Mutation("millilitres", "tools/volumes.py", 'math.prod(geometry["spacing"]) / 1000',
             'math.prod(geometry["spacing"])', "volumes are in mm^3", "tests/test_predict.py"),
    # records and options
    Mutation("last-iteration", "tools/runs.py", "!= last else []", "is None else []",
             "a record of half a training counts", f"{REPRODUCE} -k 'record'"),
    Mutation("other-options", "tools/runs.py", "if now[name] != then[name]]", "if now[name] is Ellipsis]",
             "a record of other options counts", f"{REPRODUCE} -k 'record'"),
    Mutation("recorded-seeds", "tools/runs.py", "set(o.seeds or [*usual, *recorded[key]])", "set(o.seeds or usual)",
             "records of further seeds are left out of the tables", REPRODUCE),
    Mutation("idle-flag", "utils/options.py", "chosen[f.name] == usual(f.name)", "True",
             "a flag that does nothing is taken", "tests/test_unused_flags.py"),
    Mutation("resume-options", "utils/options.py", "name not in harmless and value != saved.get(name)",
             "name not in harmless and name not in saved", "a run goes on with other options",
             f"{REFUSED} -k test_13"),
]  # fmt: skip


def copied(folder: Path) -> Path:
    """A copy of the files of the repository that git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def in_child(copy: Path, tests: str, output: Path) -> None:
    """Runs pytest in a copy, in a forked process, which has the libraries already and none of the code."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True  # a mutation may have the size and the time of the original
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", *shlex.split(tests)])
    os._exit(code)


def failures(copy: Path, tests: str) -> list[str]:
    """The names of the tests that fail.

    Raises:
        RuntimeError: no test ran.
    """
    output = copy / "output.txt"
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(copy, tests, output))
    child.start()
    child.join(LIMIT_S)
    if child.is_alive():
        child.kill()
        return ["the time limit"]
    text = output.read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    if child.exitcode and not failed:
        raise RuntimeError(text[-1000:])
    return failed


def outcome(copy: Path, mutation: Mutation) -> str:
    """The test that catches it, or why none does."""
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return f"not applied: its text stands {text.count(mutation.old)} times"
    try:
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        return next(iter(failures(copy, f"-x {mutation.tests}")), NOT_CAUGHT)
    finally:
        path.write_text(text, encoding="utf-8")


def shown(test: str) -> str:
    """A cell of the table."""
    file, _, name = test.partition("::")
    return f"`{name}` of {file.removeprefix('tests/')}" if name else test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [mutation for mutation in MUTATIONS if not options.only or mutation.name in options.only]
    print("| mutation | file | what it breaks | caught by |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy, caught_by = copied(Path(folder)), []
        for mutation in chosen:
            caught_by.append(outcome(copy, mutation))
            print(f"| {mutation.name} | {mutation.file} | {mutation.breaks} | {shown(caught_by[-1])} |", flush=True)
        tests = sorted({test for test in caught_by if "::" in test})
        if tests and (wrong := failures(copy, shlex.join(tests))):
            print("These fail without a mutation too, and so catch nothing: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
