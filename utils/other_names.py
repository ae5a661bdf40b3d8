"""What flags of other projects are called here."""

from collections.abc import Container

EPOCHS = "--iterations, a number of batches. An epoch is labeled scans / labeled crops in a batch of them"
ELSEWHERE: dict[tuple[str, ...], tuple[str, ...]] = {  # names -> what to give here, the first that the command has
    ("epochs", "epoch", "max-epochs", "num-epochs", "n-epochs"): (EPOCHS,),
    ("max-iterations", "max-iteration", "num-iterations"): ("--iterations",),
    ("max-iters", "iters", "steps", "max-steps"): ("--iterations",),
    ("gpu", "gpus", "gpu-id", "gpu-ids", "cuda", "use-cuda"): ("--device, as --device cuda:0",),
    ("base-lr", "lr-rate", "learning-rate", "initial-lr", "init-lr"): ("--lr",),
    ("root-path", "data-path", "data-dir", "data-root", "dataset", "dataset-path", "list-path"): ("--data",),
    ("labelnum", "label-num", "labeled-num", "labelled", "labelled-num", "num-labeled"): ("--labeled",),
    ("labeled-bs", "label-bs", "labelled-bs"): ("--labeled-batch",),
    ("bs", "batch"): ("--batch-size",),
    ("num-classes", "n-classes", "nclass"): ("--classes, without the background",),
    ("exp", "exp-name", "experiment", "snapshot-path", "save-path"): ("--name, the run folder below --runs", "--out"),
    ("output-dir", "out-dir", "output-folder", "output-path"): ("--out", "--runs"),
    ("num-workers", "n-workers", "nproc"): ("--workers",),
    ("amp", "fp16", "half", "mixed-precision"): ("--precision bf16",),
    ("pretrained", "load", "finetune", "load-weights"): ("--init RUN", "--checkpoint"),
    ("model", "net", "network", "arch"): ("--checkpoint", "--method"),
    ("weights", "model-path", "ckpt", "checkpoint-path", "model-dir", "model-folder"): ("--checkpoint", "--init RUN"),
    ("crop-size", "roi-size", "image-size", "img-size", "patch"): ("--patch-size",),
    ("optim", "opt"): ("--optimizer",),
    ("wd", "l2"): ("--weight-decay",),
    ("random-seed", "manual-seed"): ("--seed",),
    ("val-every", "val-interval", "eval-every", "eval-interval"): ("--validate-every",),
    ("tta", "do-mirroring"): ("--flips 8",),
}


def called_here(name: str, options: Container[str]) -> str:
    """What a flag of other projects is called in a command of this one, which has these options, and how it differs; ''
    if it is not known. Names have no dashes in front.
    """
    names = name.replace("_", "-").lower()
    for others, here in ELSEWHERE.items():
        if names in others:
            known = [text for text in here if text.split(",")[0].split()[0].removeprefix("--") in options]
            return known[0] if known else ""
    return ""
