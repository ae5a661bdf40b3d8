"""Mutated files for the parsers that read what others wrote: read_case, read_list, load_checkpoint.

    python -m tests.faults.fuzz --executions 100000

A finding is any end but the error made for it, or an input that takes longer than ten seconds; it is kept in --out.
Exit code 1 on a finding.
"""

import argparse
import collections
import io
import random
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from dataloaders.cases import Case, CaseError, read_case, read_list
from dataloaders.geometry import read_geometry
from utils.checkpoint import CONTENTS, FORMAT, load_checkpoint
from utils.errors import UserError

SECONDS = 10


def h5(**options: object) -> bytes:
    """A case file of 5x4x3 voxels."""
    data, rng = io.BytesIO(), np.random.default_rng(0)
    with h5py.File(data, "w", libver=options.pop("libver", "earliest")) as f:  # type: ignore[arg-type]
        f.create_dataset("image", data=rng.standard_normal((5, 4, 3)).astype(np.float32), **options)
        f.create_dataset("label", data=rng.integers(0, 2, (5, 4, 3), np.uint8), **options)
        f.attrs["spacing"] = (1.0, 1.0, 2.0)
    return data.getvalue()


def checkpoint() -> bytes:
    """A checkpoint of four weights."""
    data = io.BytesIO()
    known = {**dict.fromkeys(CONTENTS, 0), "options": {"method": "dtml"}, "checksums": {}, "format": FORMAT}
    torch.save({**known, "method": {"weight": torch.arange(4.0)}}, data)
    return data.getvalue()


def case_target(path: Path) -> None:
    read_case(Case("a", path, True))
    read_geometry(Case("a", path, True))


def pickle_target(path: Path) -> None:
    """The file as the pickle of an archive whose checksums are right."""
    archive = path.with_suffix(".pt")
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as old, zipfile.ZipFile(archive, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, path.read_bytes() if entry.filename.endswith("data.pkl") else old.read(entry))
            new.infolist()[-1].external_attr = 0
    load_checkpoint(archive)


def pickled() -> bytes:
    """The pickle of that checkpoint."""
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


CASES = [h5(), h5(chunks=(2, 4, 3), compression="gzip"), h5(libver="latest", fletcher32=True, chunks=(5, 4, 1))]
# name: reads a file, errors made for it, files to begin from
TARGETS: dict[str, tuple[Callable[[Path], object], type[Exception], list[bytes]]] = {
    "read_case": (case_target, CaseError, CASES),
    "read_list": (read_list, UserError, [b"case00\ncase01\n", b"\xef\xbb\xbfa/b\r\n\r\nc d \r\n", b"../x\n/y\n"]),
    "load_checkpoint": (load_checkpoint, UserError, [checkpoint()]),
    "load_checkpoint (pickle)": (pickle_target, UserError, [pickled()]),
}
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, set to a number at an edge, moved, left out, repeated or cut off."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        kind, place = draw.randrange(6), draw.randrange(len(out) + 1)
        size = min(draw.choice((1, 2, 4, 8, 16, 64)), len(out) - place)
        if kind == 0 and size:
            out[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) % 256**width
            out[place : place + width] = number.to_bytes(width, "little")
        elif kind == 2:
            out[place : place + size] = draw.randbytes(size)
        elif kind == 3:
            del out[place : place + size]
        elif kind == 4:
            out[place:place] = out[place : place + size]
        elif draw.random() < 0.1:
            del out[place:]
    return bytes(out)


class Fuzzer:
    """Runs one target and counts how its inputs end."""

    def __init__(self, name: str, out: Path):
        self.name, self.out = name, out
        self.read, self.expected, self.seeds = TARGETS[name]
        self.ends: collections.Counter[str] = collections.Counter()
        self.findings: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        self.path = out / f"{name}.input"

    def one(self, data: bytes) -> None:
        """One execution."""
        self.path.write_bytes(data)
        began = time.monotonic()
        signal.alarm(SECONDS)  # raises, see `main`
        try:
            self.read(self.path)
            self.ends["read"] += 1
        except self.expected:
            self.ends["refused"] += 1
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(e.__traceback__)[-1]
            finding = f"{type(e).__name__} in {Path(where.filename).name}:{where.lineno}"
            self.findings[finding] += 1
            if self.findings[finding] == 1:
                (self.out / f"{self.name}-{len(self.findings)}.finding").write_bytes(data)
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, time.monotonic() - began)

    @property
    def executions(self) -> int:
        return sum(self.ends.values()) + sum(self.findings.values())

    def line(self, seconds: float) -> str:
        """A row of the table."""
        cells = [self.name, self.executions, self.ends["read"], self.ends["refused"], sum(self.findings.values())]
        return f"| {' | '.join(map(str, cells))} | {seconds:.0f} | {self.slowest:.2f} |"


class TooSlow(Exception):
    """An input is still being read after ten seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000, help="of each target")
    parser.add_argument("--target", choices=list(TARGETS), help="one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    o = parser.parse_args()

    def too_slow(number: int, frame: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    o.out.mkdir(parents=True, exist_ok=True)
    found = 0
    for name in [o.target] if o.target else TARGETS:
        fuzzer, began = Fuzzer(name, o.out), time.monotonic()
        draw = random.Random(o.seed)
        for seed in fuzzer.seeds:
            fuzzer.one(seed)
        while fuzzer.executions < o.executions:
            fuzzer.one(mutated(draw, draw.choice(fuzzer.seeds)))
        print(fuzzer.line(time.monotonic() - began), flush=True)
        for finding, count in fuzzer.findings.items():
            print(f"  {count} x {finding}", flush=True)
        found += len(fuzzer.findings)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
