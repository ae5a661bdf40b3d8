"""What a training needs, from its options: data, method and optimizer; where a resumed one goes on; its pictures."""

import dataclasses
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch

from dataloaders.augmentation import Strengths
from dataloaders.cases import Case, CaseError, named
from dataloaders.channel_names import channel_names
from dataloaders.class_names import class_names, named_classes
from dataloaders.geometry import known_geometry
from dataloaders.normalization import OF_RAW, Normalization, normalization_of, raw_of
from dataloaders.orientation import orientation_of, viewing_turn
from dataloaders.training import median_spacing, refuse_classes, training_cases, validation_names
from dataloaders.two_stream import Patches, TwoStreamBatchSampler
from dataloaders.unseen import open_cases
from dataloaders.volumes import Volumes
from methods import Method
from networks.backbone import STEEPEST, compile_networks, set_precision, set_recompute
from settings import OPTIMIZERS, Options
from utils.checkpoint import fit_optimizer
from utils.devices import precision_on
from utils.distributed import RANK, RANKS
from utils.errors import UserError
from utils.masks import label_map
from utils.options import fill
from utils.report import Report
from utils.text import some


@dataclasses.dataclass
class Training:
    """A training between two iterations."""

    o: Options
    folder: Path
    device: torch.device
    method: Method
    optimizer: torch.optim.Optimizer
    patches: Patches
    sampler: TwoStreamBatchSampler
    labeled_batch: int
    """Labeled crops in a batch."""
    labeled: int
    """Labeled scans, which come first; the others have no label."""
    validation: list[Case]
    normalize: Normalization
    constant: dict[str, Any]
    """Entries of every checkpoint that stay the same."""
    start: int = 0
    """First iteration."""
    seconds: float = 0.0
    """Time that the iterations before took."""
    best: dict[str, Any] | None = None
    """Iteration and validation Dice of the best checkpoint, and the names of the scans that it was chosen on."""
    extended: list[int] = dataclasses.field(default_factory=list)
    """The numbers of iterations after which the run was once finished."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @property
    def options(self) -> dict[str, Any]:
        """All options, those of the method too."""
        return self.constant["options"]

    @property
    def volumes(self) -> Volumes:
        return self.patches.volumes

    @property
    def class_names(self) -> dict[str, str]:
        """Class, as text -> its name, of those that have one."""
        return self.constant.get("class_names", {})

    @property
    def unlabeled(self) -> int:
        """Unlabeled scans."""
        return len(self.volumes.cases) - self.labeled

    @property
    def elapsed(self) -> float:
        """Seconds of all iterations so far; those of this process count from `began` on."""
        return self.seconds + time.monotonic() - self.began

    def contents(self, done: int) -> dict[str, Any]:
        """The contents of a checkpoint after `done` iterations."""
        optional = {"best": self.best, "extended": self.extended}
        return {
            **self.constant, "iteration": done, "seconds": self.elapsed, "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), **{name: value for name, value in optional.items() if value},
        }  # fmt: skip


def prepare(
    o: Options, folder: Path, method: Method, device: torch.device, state: dict[str, Any] | None,
    origin: dict[str, Any] | None,
) -> Training:  # fmt: skip
    """Reads the data and makes what a training needs.

    Args:
        method: new, or as `state` has it, on the CPU.
        state: the checkpoint to go on from, if any.
        origin: the checkpoint of --init of a new run, if any.

    Raises:
        UserError: for data or options that do not fit each other, the device or the checkpoint.
    """
    data, classes, channels = Path(o.data), method.options.classes, method.options.channels
    cases, problems, labeled_batch = training_cases(
        data, labeled=o.labeled, unlabeled=o.unlabeled, batch_size=o.batch_size,
        labeled_batch=o.labeled_batch, patch_size=o.patch_size, multiples=method.side_multiples,
        classes=classes, channels=channels, fold=o.fold,
    )  # fmt: skip
    labeled = sum(case.labeled for case in cases)
    if method.needs_unlabeled and labeled_batch == o.batch_size:
        raise UserError(
            f"--method {o.method} needs unlabeled scans, but all {o.labeled} are labeled. Lower --labeled, or leave "
            "out --unlabeled 0."
        )
    if o.paste and labeled < 2:
        raise UserError(f"--paste {o.paste}: there is no second labeled scan. Raise --labeled.")
    to_validate = validation_names(data, o.labeled, o.fold) if o.validate_every else []
    normalize = normalization_of(dataclasses.asdict(o))
    try:
        normalize.of_channels(channels)
    except CaseError as e:
        raise UserError(f"{data} {e}.") from e
    volumes = Volumes(
        cases, cache=o.cache, folder=Path(o.cache_folder or data / ".cache"), downsample=o.downsample,
        normalize=normalize, device=device, problems=problems,
    )  # fmt: skip
    if state is None:
        refuse_classes(volumes.facts, classes)
    images = volumes.fingerprints | earlier_images(origin, state, volumes.fingerprints)
    validation, _ = open_cases(data, to_validate, classes, volumes.checksums, images, channels, normalize)
    names = {str(c): name for c, name in class_names(data).items() if c <= classes}
    attributes = attributes_of(cases, normalize)
    orientations = {orientation for _, orientation, _ in attributes.values()}
    constant = {
        "options": {**dataclasses.asdict(o), **dataclasses.asdict(method.options)}, "checksums": volumes.checksums,
        "images": images, "processes": RANKS, "attributes": attributes,
        "spacing": median_spacing(cases), "orientation": orientations.pop() if len(orientations) == 1 else None,
        "channel_names": channel_names(data, channels), **({"class_names": names} if names else {}),
    }  # fmt: skip
    method.to(device)
    choose_arithmetic(method, o, device)
    # not the weights of a teacher or a critic
    optimizer = OPTIMIZERS[o.optimizer]([p for p in method.parameters() if p.requires_grad], o)
    progress: dict[str, Any] = {}
    if state is not None:
        if state["checksums"] != volumes.checksums:
            raise UserError(
                f"the volumes in {o.data} are not those {folder} began with. Resume with the same data, or start a new "
                f"run from its weights with --init {folder}."
            )
        if [*state["checksums"]] != [*volumes.checksums]:  # batches are drawn by place
            raise UserError(
                f"the scans in {o.data} are those {folder} began with, but train.list has them in another order. Put "
                "the lines back in their order, or start a new run."
            )
        refuse_other_attributes(attributes, state.get("attributes", {}), o.data, folder)
        if state["processes"] != RANKS:
            raise UserError(
                f"{folder} was trained by {state['processes']} processes, not {RANKS}. Resume it with as many."
            )
        try:
            fit_optimizer(optimizer, state["optimizer"])
        except ValueError as e:
            raise UserError(f"{state['file']} does not fit this code ({e}). Another version wrote it.") from e
        progress = {"start": state["iteration"], "seconds": state["seconds"], "best": state.get("best"),
                    "extended": state.get("extended", [])}  # fmt: skip
    patches = Patches(
        volumes, patch_size=o.patch_size, augment=o.augment, seed=o.seed, sdm=method.needs_sdm,
        other=method.needs_other_crop, intensity=o.intensity, sdm_of=o.sdm_of,
        object_share=o.object_share, paste=o.paste, flip_axes=o.flip_axes,
        strengths=fill(Strengths, dataclasses.asdict(o)),
    )  # fmt: skip
    sampler = TwoStreamBatchSampler(
        labeled, len(cases) - labeled, batch_size=o.batch_size, labeled_batch=labeled_batch,
        seed=o.seed, start=progress.get("start", 0), iterations=o.iterations, rank=RANK, ranks=RANKS,
    )  # fmt: skip
    return Training(o, folder, device, method, optimizer, patches, sampler, labeled_batch, labeled, validation,
                    normalize, constant, **progress)  # fmt: skip


def attributes_of(cases: Sequence[Case], normalize: Normalization) -> dict[str, list[Any]]:
    """Name -> spacing, orientation and, if --normalize uses them, mean and sd of a case: what a run takes from its
    file besides the volumes.

    Raises:
        UserError: attributes that cannot be read.
    """
    attributes: dict[str, list[Any]] = {}
    for case in cases:
        with named(case):
            raw = raw_of(case) if normalize.kind in OF_RAW else None
        geometry = known_geometry(case)
        spacing, direction = geometry.get("spacing"), geometry.get("direction")
        orientation = None if direction is None else orientation_of(direction)
        attributes[case.name] = [spacing and [*spacing], orientation, raw and [[*pair] for pair in raw]]
    return attributes


def refuse_other_attributes(now: dict[str, list[Any]], before: dict[str, list[Any]], data: str, folder: Path) -> None:
    """Raises UserError if cases state other attributes than when a run began; early checkpoints keep none."""
    differ = [name for name, values in now.items() if before.get(name, values) != values]
    if differ:
        raise UserError(
            f"spacing, direction, mean or sd that the files of {some(differ)} in {data} state are not those {folder} "
            "began with. Resume with the same data, or start a new run."
        )


def earlier_images(origin: dict[str, Any] | None, state: dict[str, Any] | None, own: Container[str]) -> dict[str, str]:
    """Name -> fingerprint of the scans that the weights of --init were trained on, so that none of them is tested on.
    `origin` is their checkpoint in a new run; `state`, the checkpoint of a resumed one, knows them. Own scans are left
    out.
    """
    if origin is not None:
        return {f"{name} of {origin['file']}": mark for name, mark in origin.get("images", {}).items()}
    return {name: mark for name, mark in (state or {}).get("images", {}).items() if name not in own}


def choose_arithmetic(method: Method, o: Options, device: torch.device) -> None:
    """Applies --precision, --recompute and --compile.

    Raises:
        UserError: if the device or the method does not support an option, or the options exclude each other.
    """
    precision = precision_on(device, o.precision)
    if o.compile and o.recompute:
        raise UserError("--compile decides by itself what it keeps for the way back. Leave out --recompute.")
    if not set_precision(method, precision, training=True) and o.precision != "auto":
        lower = f", or lower --k to {STEEPEST:g}" if hasattr(method.options, "k") else ""
        raise UserError(
            f"--precision {o.precision} changes nothing for --method {o.method}: its networks have a distance head and "
            f"stay in fp32. Leave it out{lower}."
        )
    set_recompute(method, o.recompute)
    if o.compile:
        compile_networks(method)


@torch.no_grad()
def show(t: Training, report: Report, done: int) -> None:
    """Adds pictures after `done` iterations: a fixed slice of the first labeled and of the first unlabeled case.

    A picture shows the image, the method's maps and the contours. The labeled case also gets the surfaces of prediction
    and label. The method is in training mode afterwards.
    """
    from evaluation.slices import prediction_mesh, slice_picture  # here, as matplotlib takes half a second

    method, cases, names = t.method.eval(), t.volumes.cases, t.class_names
    spacing = t.constant["spacing"] or [1.0] * 3  # mm along x, y, z
    for name, case in {"labeled": 0, "unlabeled": t.labeled}.items():
        if case < len(cases):
            item = t.patches.centre_crop(case)
            tensors = {key: v[0] for key, v in method.maps(item["image"][None].to(t.device)).items()}
            prediction = label_map(torch.stack(list(tensors.values())[: method.options.classes])).cpu().numpy()
            label = item["label"].cpu().numpy() if "label" in item else None
            turn, orientation = viewing_turn(cases[case])
            maps = {key: turn(v.cpu().numpy()) for key, v in tensors.items()}
            classes = f", classes {named_classes(names)}" if names and method.options.classes > 1 else ""
            title = f"{item['case']}, iteration {done}{classes}"
            image = turn(item["image"][0].cpu().numpy())
            seen = None if label is None else turn(label)
            report.picture(name, slice_picture(image, maps, turn(prediction), seen, title, orientation), done)
            if label is not None:
                report.mesh(f"surface/{name}", prediction_mesh(prediction, label, spacing), done)
    method.train()
