"""Phantom atria: synthetic MR-like volumes in the layout of the LA set, for runs without real data.

    python -m dataloaders.phantom DEST
    python -m dataloaders.phantom DEST --seed 5 --train 80 --test 20 --classes 3

writes a set (an existing one is kept, and refused if a flag asks for another) and prints the Dice of a global intensity
threshold on its test cases. The blood of the atrium is as bright as that of the ventricle, the aorta and the vessels.
The atrium differs by a thin dark wall and a smoother texture, which do not change under flips and quarter turns, and by
its size and position. Class 1 is the atrium, class 2 the blood of the ventricle, class 3 the muscle around it.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage
from skimage import measure

from utils import masks
from utils.errors import UserError, run
from utils.options import Parser, fill, flag_of, option

Shape = tuple[int, int, int]
MOST_CLASSES = 3
SPACING = (1.0, 1.0, 1.0)


@dataclasses.dataclass
class Options:
    """Of the set."""

    seed: int = option(2021, "seed of all volumes", minimum=0)
    train: int = option(40, "number of training cases", minimum=1)
    test: int = option(8, "number of test cases", minimum=1)
    classes: int = option(1, "number of foreground classes", minimum=1, maximum=MOST_CLASSES)


def _smooth_field(rng: np.random.Generator, shape: Shape, scale: float) -> np.ndarray:
    """Random field (W,H,D) float32 of zero mean and unit sd, correlated over about `scale` voxels."""
    field = rng.standard_normal([int(n / scale) + 4 for n in shape])
    # Gaussian bumps on a coarse lattice, one axis at a time: much cheaper than filtering noise with a wide kernel.
    for axis, n in enumerate(shape):
        nodes = (np.arange(field.shape[axis]) - 1.5) * scale
        bumps = np.exp(-0.5 * ((np.arange(n)[:, None] - nodes) / (0.7 * scale)) ** 2)
        field = np.moveaxis(np.tensordot(bumps, field, (1, axis)), 0, axis)
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _blob(rng: np.random.Generator, shape: Shape, centre: np.ndarray, radii: np.ndarray, bump: float) -> np.ndarray:
    """Bool (W,H,D): an ellipsoid rotated by up to 20 degrees in x-y, its radius modulated by a field of sd `bump`."""
    x, y, z = (np.arange(n, dtype=np.float32) - c for n, c in zip(shape, centre, strict=True))
    turn = rng.uniform(-0.35, 0.35)
    u = (np.cos(turn) * x[:, None] + np.sin(turn) * y)[:, :, None] / radii[0]
    v = (np.cos(turn) * y - np.sin(turn) * x[:, None])[:, :, None] / radii[1]
    radius = np.sqrt(u**2 + v**2 + (z / radii[2]) ** 2)
    return radius < 1 + bump * np.clip(_smooth_field(rng, shape, 10), -2, 2)


def _draw_tube(mask: np.ndarray, points: np.ndarray, radii: np.ndarray) -> None:
    """Sets balls of `radii` (N,) voxels at `points` (N,3) in the bool `mask` (W,H,D), in place."""
    for point, radius in zip(points, radii, strict=True):
        low = np.maximum(np.floor(point - radius), 0).astype(int)
        high = np.maximum(np.ceil(point + radius).astype(int) + 1, 0)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        part = mask[box]
        grid = np.ogrid[tuple(slice(a, a + n) for a, n in zip(low, part.shape, strict=True))]
        part |= sum((g - p) ** 2 for g, p in zip(grid, point, strict=True)) < radius**2


def _atrium(rng: np.random.Generator, shape: Shape, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label (atrium and first parts of its veins) and the veins' whole tubes, both bool (W,H,D)."""
    size = np.array(shape)
    radii = size * rng.uniform((0.25, 0.26, 0.26), (0.29, 0.31, 0.30))
    body = _blob(rng, shape, centre, radii, 0.09)
    label, veins, count = body.copy(), np.zeros(shape, bool), int(rng.integers(3, 6))
    # Veins leave on the side away from the ventricle (+x), spread over a fan in x-y, alternately up and down.
    fan = np.linspace(-1.5, 1.5, count) + rng.uniform(-0.2, 0.2, count)
    for number, angle in enumerate(fan):
        rise = rng.uniform(0.15, 0.4) * (-1) ** number
        way = np.array((np.cos(angle), np.sin(angle), rise)) / np.hypot(1, rise)
        bend = rng.uniform(-1, 1, 3) * (0.010, 0.010, 0.004)
        travel = np.arange(0, 60, 0.7)[:, None]
        points = centre + way * travel + bend * travel**2
        nearest = np.clip(np.rint(points).astype(int), 0, size - 1)
        # The label ends 5 voxels past the body, where the tube is still wide; the tube itself is a little longer.
        past = travel[:, 0] - travel[body[tuple(nearest.T)]].max()
        width = rng.uniform(3.2, 4.2) - 0.12 * np.maximum(past, 0)
        near, whole = (past > -4) & (past < 5), (past > -4) & (past < 5 + rng.uniform(3, 6))
        _draw_tube(label, points[near], width[near])
        _draw_tube(veins, points[whole], width[whole])
    # Nothing of the label lies on the border, even where a vein runs out of the volume.
    parts = measure.label(np.pad(label[2:-2, 2:-2, 2:-2], 2), connectivity=1)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax(), veins


def phantom(seed: int, index: int, shape: Shape, classes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Makes case `index` of the phantoms of `seed`, a pure function of its arguments.

    Returns:
        The image, float32 (W,H,D) of zero mean and unit sd, and the label, uint8 (W,H,D). Class 1 is one 6-connected
        atrium that does not touch the border; for shapes about 80 x 72 x 44 it fills 6 to 14 % of the volume. With
        `classes` 2 or 3 the image is the same, and the visible ventricle is 2 and its muscle 3.
    """
    rng = np.random.default_rng([seed, index])
    size = np.array(shape)
    centre = size * rng.uniform((0.58, 0.46, 0.46), (0.64, 0.54, 0.54))
    label, veins = _atrium(rng, shape, centre)
    ball = ndimage.generate_binary_structure(3, 1)
    wall = ndimage.binary_dilation(label, ball, iterations=2) & ~label & ~veins

    # The rest of the blood: a ventricle at -x, larger than the atrium; an aorta along z; small vessels anywhere.
    side = centre - size * rng.uniform((0.38, -0.08, 0.00), (0.44, 0.08, 0.12))
    ventricle = _blob(rng, shape, side, size * rng.uniform((0.26, 0.33, 0.40), (0.30, 0.39, 0.47)), 0.06)
    muscle = ndimage.binary_dilation(ventricle, ball, iterations=4)
    vessels = veins.copy()
    z = np.arange(shape[2])
    foot, lean = centre[:2] + size[:2] * (-0.15, rng.choice((-0.4, 0.4))), rng.uniform(-0.15, 0.15, 2)
    _draw_tube(vessels, np.column_stack((foot + lean * (z - z.mean())[:, None], z)), np.full(len(z), rng.uniform(5, 7)))
    count = int(rng.integers(6, 11))
    _draw_tube(vessels, rng.uniform(0, 1, (count, 3)) * size, rng.uniform(2.5, 5, count))

    # Brightness before contrast: blood near 1, muscle and tissue about half of it, lung and the wall dark.
    lung = _smooth_field(rng, shape, 16) > 0.6
    fine = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 1.2)
    fine /= fine.std()
    signal = np.where(lung, 0.15, 0.5 + 0.1 * _smooth_field(rng, shape, 8)) + 0.08 * fine
    signal[muscle] = 0.45 + 0.05 * fine[muscle]
    # The ventricle and the vessels are mottled, as trabeculae and unsteady flow leave them; the atrium is smooth.
    mottle = _smooth_field(rng, shape, 3)
    signal[ventricle] = rng.uniform(0.9, 1.1) + 0.15 * mottle[ventricle]
    signal[vessels] = rng.uniform(0.9, 1.1) + 0.15 * mottle[vessels]
    signal[wall] = 0.1
    signal[label] = 1 + 0.03 * fine[label]

    # Contrast, coil sensitivity, point spread and the noise of a magnitude image.
    signal = np.clip(signal, 0, None) ** rng.uniform(0.8, 1.3) * np.exp(0.2 * _smooth_field(rng, shape, 30))
    signal = ndimage.gaussian_filter(signal.astype(np.float32), rng.uniform(0.6, 0.9))
    noise = rng.uniform(0.06, 0.11) * rng.standard_normal((2, *shape), dtype=np.float32)
    image = np.hypot(signal + noise[0], noise[1])
    labels = label.astype(np.uint8)
    free = ~(vessels | wall | label)
    for value, part in ((2, ventricle), (3, muscle & ~ventricle)):
        if value <= classes:
            labels[part & free] = value
    return ((image - image.mean()) / image.std()).astype(np.float32), labels


def case_shape(seed: int, index: int) -> Shape:
    """The shape (W,H,D) of case `index` in a set of `seed`: 72-88 x 64-80 x 40-48 voxels."""
    rng = np.random.default_rng([seed, index, 1])
    width, height, depth = (int(n) for n in rng.integers((72, 64, 40), (88, 80, 48), endpoint=True))
    return width, height, depth


def make_phantom_set(folder: Path, *, seed: int = 2021, train: int = 40, test: int = 8, classes: int = 1) -> None:
    """Writes `train` + `test` phantoms to `folder` in the layout of the LA set; an existing set is left unchanged.

    `folder/train.list` and `folder/test.list` name the cases, one per line. `folder/<case>/mri_norm2.h5` holds `image`
    float32 (W,H,D), `label` uint8 (W,H,D) and the attributes `spacing` in mm and `direction`. The set is written under
    another name and then renamed, so it is never incomplete.
    """
    folder = Path(folder)
    lists = (folder / "train.list", folder / "test.list")
    if all(path.is_file() for path in lists):
        return
    names = [f"phantom_{index:03d}" for index in range(train + test)]
    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    # Left over by a killed process with the same id.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for index, name in enumerate(names):
            image, label = phantom(seed, index, case_shape(seed, index), classes)
            (partial / name).mkdir()
            with h5py.File(partial / name / "mri_norm2.h5", "w") as file:
                file.create_dataset("image", data=image, compression="gzip")
                file.create_dataset("label", data=label, compression="gzip")
                file.attrs["spacing"] = SPACING
                file.attrs["direction"] = np.eye(3).ravel()
        for path, part in zip(lists, (names[:train], names[train:]), strict=True):
            (partial / path.name).write_text("".join(f"{name}\n" for name in part), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            # Another process was faster. Its set is the same as ours, which is removed below.
            if not all(path.is_file() for path in lists):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_other_set(folder: Path, flags: Mapping[str, int]) -> None:
    """Checks that a set, which may have been there before, is the one that the flags ask for.

    Raises:
        UserError: naming the first flag that asks for another one.
    """
    train, test = ((folder / f"{split}.list").read_text(encoding="utf-8").split() for split in ("train", "test"))
    shapes, classes = [], 0
    for name in (*train, *test):
        with h5py.File(folder / name / "mri_norm2.h5") as file:
            shapes.append(file["image"].shape)
            classes = classes or int(file["label"][:].max())
    there: dict[str, object] = {"train": len(train), "test": len(test), "classes": classes}
    for name, value in flags.items():
        of_seed = name == "seed" and shapes == [case_shape(value, index) for index in range(len(shapes))]
        if not (of_seed or there.get(name) == value):
            raise UserError(
                f"{folder} is there already, made with another {flag_of(name)}, and is kept. Name another folder, or "
                f"leave {flag_of(name)} out."
            )


def threshold_dice(cases: Iterable[tuple[np.ndarray, np.ndarray]], largest_component: bool = False) -> float:
    """Best mean Dice in [0,1] of one intensity interval [lo, hi] over all `cases` (image, label), at least one.

    The interval is optimized on the same cases, so the Dice is optimistic. With `largest_component` only the largest
    26-connected component of each thresholded volume counts.
    """
    cases = [(image, label > 0) for image, label in cases]
    inside = np.concatenate([image[label] for image, label in cases])
    # A useful interval lies within the range of the label's intensities.
    lows, highs = np.quantile(inside, np.linspace(0, 0.6, 13)), np.quantile(inside, (0.6, 0.8, 0.9, 0.95, 0.99, 1))
    best = 0.0
    for low, high in itertools.product(lows, highs):
        scores = []
        for image, label in cases:
            mask = (image >= low) & (image <= high)
            if largest_component:
                mask = masks.largest_component(mask)
            scores.append(2 * np.count_nonzero(mask & label) / (np.count_nonzero(mask) + np.count_nonzero(label)))
        best = max(best, float(np.mean(scores)))
    return best


def main(argv: list[str] | None = None) -> None:
    """Writes the set of the command line and prints the threshold's Dice on its test cases."""
    parser = Parser(description=__doc__, prog="python -m dataloaders.phantom")
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the set; an existing set is kept")
    parser.add_dataclass(Options)
    flags = parser.parse(argv)
    folder: Path = flags.pop("dest")
    make_phantom_set(folder, **dataclasses.asdict(fill(Options, flags)))
    refuse_other_set(folder, flags)
    cases = []
    for name in (folder / "test.list").read_text(encoding="utf-8").split():
        with h5py.File(folder / name / "mri_norm2.h5") as file:
            cases.append((file["image"][:], file["label"][:] == 1))
    print(f"threshold: Dice {threshold_dice(cases):.3f}")
    print(f"threshold and largest component: Dice {threshold_dice(cases, largest_component=True):.3f}")


if __name__ == "__main__":
    run(main)
