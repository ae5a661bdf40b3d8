"""What a bug report needs: versions, hardware, the data set, and what would be slow here.

    python -m tools.doctor
    python -m tools.doctor --data FOLDER

Every case is read once and checked as training does. Names of users and of folders above this one are left out.
"""

import dataclasses
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dataloaders.cases import MOST_CLASSES, Case, check_all, find_cases, read_case, usual_folder
from dataloaders.findings import Facts, duplicates, facts_of, findings_of, memory_gib, with_spacing
from dataloaders.lists import lists_of
from dataloaders.training import usual_classes
from utils.devices import GIB, cores, nvidia_card, total_memory_gib, why_no_cuda
from utils.errors import UserError, run
from utils.options import option, read_flags
from utils.run_folder import PACKAGES, git, processor, version_of

FULL_STEP_GIB, FULL_STEP_S = 9.5, 20  # of one full-size iteration on a core, see docs/training.md


@dataclasses.dataclass
class Options:
    data: str = option("", "folder of the data set (default data/la, else data/phantom)")
    classes: int | None = option(
        None, "C, labels hold 0..C (default as many as the set's dataset.json names, else 1)", type=int, minimum=1,
        maximum=MOST_CLASSES,
    )  # fmt: skip
    every: int = option(1, "read every Nth case only, of a large set", minimum=1)


def hidden(path: Path | str) -> str:
    """The path below the home folder or below this one, or else its last part: no names of users or machines."""
    absolute = Path(os.path.abspath(path))
    for top, shown in ((Path.home(), "~/"), (Path.cwd(), "")):
        if absolute.is_relative_to(top) and top != top.parent:
            return shown + str(absolute.relative_to(top))
    return f".../{absolute.name}"


def versions() -> dict[str, Any]:
    """Name -> version of the code, of Python and of the packages; what is missing says so."""
    facts = {"code": git("rev-parse", "--short", "HEAD") or "no git repository"}
    if git("status", "--porcelain", "--untracked-files=no"):
        facts["code"] += ", with uncommitted changes"
    facts |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in (*PACKAGES, "SimpleITK", "nibabel", "edt", "submitit"):
        try:
            facts[name] = version_of(name)
        except metadata.PackageNotFoundError:
            facts[name] = "MISSING"
    return facts


def hardware() -> dict[str, Any]:
    """Name -> what there is to compute with."""
    count = f"{cores()} core{'s' * (cores() > 1)}"
    facts = {"processor": f"{processor()}, {count}, torch uses {torch.get_num_threads()}"}
    facts["memory"] = f"{total_memory_gib():.1f} GiB"
    facts["disk here"] = f"{shutil.disk_usage('.').free / GIB:.1f} GiB free"
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f} processes at work on average in the last minute"
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for i in gpus:
        free, total = torch.cuda.mem_get_info(i)
        facts[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not gpus:
        facts["GPU"] = f"none; torch is built for CUDA: {torch.version.cuda or 'no'}"
    return facts


def data_set(folder: Path, every: int, classes: int | None) -> tuple[dict[str, Any], float]:
    """Name -> what the set holds and what is wrong with it; GiB of its volumes in memory."""
    report: dict[str, Any] = {"folder": hidden(folder)}
    facts: list[Facts] = []
    test: list[str] = []
    began = time.monotonic()
    try:
        train, test = lists_of(folder)
        report["lists"] = f"{len(train)} to train on, {len(test)} to test on"
        unlabeled, problems = find_cases(folder, train[::every], labeled=False)
        labeled, more = find_cases(folder, test[::every], labeled=True, classes=classes or usual_classes(folder))

        def check(case: Case) -> None:
            facts.append(with_spacing(facts_of(case, *read_case(case))))

        check_all(unlabeled + labeled, check, problems + more)
    except UserError as e:
        report["PROBLEM"] = str(e).replace(str(folder), hidden(folder))
    if facts:
        sides = list(zip(*(x.shape for x in facts), strict=True))
        smallest, largest = (tuple(map(choose, sides)) for choose in (min, max))
        report["volumes"] = f"{len(facts)} read, sides from {smallest} to {largest}"
        report["time to read"] = f"{(time.monotonic() - began) / len(facts):.2f} s a case"
    trained = [x for x in facts if x.case.name not in test]
    for i, finding in enumerate(findings_of(facts, trained=trained) + duplicates(facts, test), 1):
        report[f"{finding.level} {i}"] = str(finding)
    report["more"] = "python -m tools.check FOLDER looks at every label and part"
    return report, memory_gib(facts) * every


def slow(memory: float) -> list[str]:
    """What would be slow or not fit here, and what to do; `memory` is that of the volumes, in GiB."""
    threads = torch.get_num_threads()
    remarks = []
    card = "" if torch.cuda.is_available() else nvidia_card()
    if card:
        remarks.append(f"GPU: there is a card, {card}, but torch does not reach it: {why_no_cuda()}")
    if not torch.cuda.is_available():
        hours = FULL_STEP_S * 6000 / 3600
        remarks.append(
            f"no GPU: 6000 iterations of DTML with crops of 112x112x80 take about {hours:.0f} hours of a core. Use "
            "--profile half, or smaller crops."
        )
        if total_memory_gib() < 1.3 * FULL_STEP_GIB:
            remarks.append(f"memory: a full-size iteration needs {FULL_STEP_GIB} GiB. Use --profile half.")
    if threads < cores() and not torch.cuda.is_available():
        remarks.append(f"threads: torch uses {threads} of {cores()} cores. Give --threads {cores()}.")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * cores():
        remarks.append("load: other programs are at work on this computer.")
    if memory > 0.7 * total_memory_gib():
        remarks.append(f"volumes: they take {memory:.1f} GiB in memory. Use --cache disk.")
    if shutil.disk_usage(".").free < 2 * GIB:
        remarks.append("disk: less than 2 GiB are free here. A full-size run keeps two checkpoints of about 150 MB.")
    if not torch.backends.mkl.is_available() and not torch.cuda.is_available():
        remarks.append("torch was built without MKL: its convolutions on this processor may be slow.")
    return remarks


def section(title: str, values: dict[str, Any]) -> str:
    """A heading and a line for each value."""
    return "\n".join([f"### {title}", "", *(f"- {name}: {value}" for name, value in values.items()), ""])


def main(argv: list[str] | None = None) -> None:
    o: Options = read_flags(Options, __doc__, "python -m tools.doctor", argv)
    folder = usual_folder(o.data)
    print(section("Versions", versions()))
    print(section("Hardware", hardware()))
    if o.data or folder.is_dir():
        about, memory = data_set(folder, o.every, o.classes)
    else:
        about, memory = {"folder": "none here; the first training makes the phantom set"}, 0.0
    print(section("Data", about))
    lines = slow(memory)
    print("\n".join(["### What would be slow", "", *(f"- {line}" for line in lines or ["nothing that is known"])]))


if __name__ == "__main__":
    run(main)
