"""Training that is killed at random moments by random signals, and resumed each time, ends as the undisturbed one.

    python -m tests.faults.soak --kills 100 --out soak

Twelve phantoms, DTML with two filters. Each part of a run is a process of its own (forked: a start of seconds would
leave little time to be killed in), with 0 or 2 data workers by chance; SIGTERM, SIGINT or SIGKILL strikes it after a
random time, from its first moment on, the main process alone or its whole group. Once a run is finished it is compared,
bit for bit, and another one begins, until there were enough kills. Prints a table; exit code 1 if anything differed.
"""

import argparse
import collections
import importlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import train_dtml
from dataloaders.phantom import make_phantom_set
from tests.conftest import flat
from utils.errors import run

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
FLAGS = [
    *("--data", "phantoms", "--patch-size", "16", "16", "16", "--filters", "2", "--labeled", "8", "--lr-steps", "50"),
    *("--iterations", "80", "--save-every", "5", "--log-every", "1", "--picture-every", "25", "--threads", "1"),
]


def flags(o: argparse.Namespace, folder: Path, *more: str) -> list[str]:
    """The command line of a part of a run."""
    method = ["--method", o.method] if o.method else []
    return [*FLAGS, *method, "--runs", str(folder.parent), "--name", folder.name, *more]


def start(args: list[str], log: Path) -> int:
    """Forks a training in a process group of its own -> its number."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        run(lambda: train_dtml.main(args))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    """Waits for the process -> its exit code, or the signal's number below 0."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def living(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    result = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(owner) == group and state != "Z":
            result.append(int(path.parent.name))
    return result


def orphans(group: int) -> int:
    """Processes of the group that are left 20 s after the main one has ended; they are then killed."""
    for _ in range(200):
        if not living(group):
            return 0
        time.sleep(0.1)
    for pid in living(group):
        os.kill(pid, signal.SIGKILL)
    return 1


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not share, bit for bit."""
    one, two = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    parts = ("method", "optimizer", "iteration", "checksums")
    result = [part for part in parts if flat(one[part]) != flat(two[part])]
    return result + ["curves"] * ((a / "scalars.csv").read_text() != (b / "scalars.csv").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=5, help="seconds that a part may last at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="", help="another method of train_dtml.py")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    draw = random.Random(o.seed)
    o.out = o.out.resolve()
    (o.out / "runs").mkdir(parents=True)
    os.chdir(o.out)
    importlib.import_module(
        "torch._dynamo"
    )  # which an optimiser's first step imports: seconds, once for all the processes to come
    make_phantom_set(Path("phantoms"), train=12, test=1)
    began = time.monotonic()
    log, whole = o.out / "log.txt", o.out / "runs" / "undisturbed"
    if end_of(start(flags(o, whole), log)):
        sys.exit(f"the undisturbed run failed, see {log}")
    seconds = time.monotonic() - began
    print(f"the undisturbed run took {seconds:.0f} s", flush=True)

    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    while counts["kills"] < o.kills:
        folder = o.out / "runs" / f"run{counts['runs']}"
        counts["runs"] += 1
        while True:
            counts["parts"] += 1
            pid = start(flags(o, folder, "--resume", "auto", "--workers", draw.choice("02")), log)
            number = draw.choice(list(SIGNALS))
            whom = os.killpg if draw.random() < 0.5 and number != signal.SIGKILL else os.kill
            time.sleep(draw.uniform(0, o.longest))
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                whom(pid, number)
            code = os.waitstatus_to_exitcode(status) if done else end_of(pid)
            counts["orphans"] += orphans(pid)
            saved = (folder / "last.pt").exists()
            if not done and code:
                counts["kills"] += 1
                counts[f"{number.name} to the {'group' if whom is os.killpg else 'process'}: exit {code}"] += 1
                # before the loop begins there is nothing to save, and the signal ends the process as it always does
                if code not in (SIGNALS[number], -number):
                    wrong.append(f"{folder.name}: exit code {code} after {number.name}")
            elif code:
                wrong.append(f"{folder.name}: exit code {code} by itself")
            counts["parts before the first checkpoint"] += not saved
            if code == 0:
                break
            if len(wrong) > 5:
                sys.exit("\n".join(wrong))
        different = differences(folder, whole)
        wrong += [f"{folder.name}: {', '.join(different)} differ"] if different else []
        print(f"{counts['kills']} kills, {counts['runs']} runs, {time.monotonic() - began:.0f} s; {wrong}", flush=True)
        if not different:
            shutil.rmtree(folder)
    wrong += ["processes were left over"] if counts["orphans"] else []
    print("\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(
        f"{(time.monotonic() - began) / 60:.1f} min",
        *(wrong or ["every run ended bit for bit as the undisturbed one"]),
        sep="\n",
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
