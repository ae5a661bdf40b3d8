"""Checkpoints that know their number, and runs of eight iterations that save some."""

import torch
from conftest import TINY

import train_dtml
from utils import checkpoint


def state(n, size=100, **more):
    """A state that knows its number: every element is n."""
    known = {**dict.fromkeys(checkpoint.CONTENTS, 0), "options": {"method": "dtml"}, "checksums": {}}
    return {**known, "n": n, "x": torch.full((size,), float(n)), **more}


def train(data, folder, *flags):
    where = ["--runs", str(folder.parent), "--name", folder.name]
    train_dtml.main(["--data", str(data), *TINY, "--batch-size", "2", "--iterations", "8", *where, *flags])
