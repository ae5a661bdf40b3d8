"""Pictures of a method while it is trained."""

from collections.abc import Sequence

import torch

from dataloaders.orientation import known_orientation
from dataloaders.two_stream import Patches
from evaluation.slices import prediction_mesh, slice_picture
from methods import Method
from utils.masks import label_map
from utils.report import Report


@torch.no_grad()
def show(
    report: Report, method: Method, patches: Patches, labeled: int, spacing: Sequence[float], done: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Adds pictures to the report: a fixed slice of the first labeled and of the first unlabeled case.

    A picture shows the image, the method's maps and the contours. The labeled case also gets the surfaces of prediction
    and label.

    Args:
        report: the open report.
        method: the method; it is in training mode afterwards.
        patches: crops of the training.
        labeled: number of labeled cases, the index of the first unlabeled one.
        spacing: mm along x, y, z.
        done: finished iterations.
        device: device of the method.
    """
    method.eval()
    for name, case in {"labeled": 0, "unlabeled": labeled}.items():
        if case < len(patches.volumes.cases):
            item = patches.middle(case)
            tensors = {key: v[0] for key, v in method.maps(item["image"][None].to(device)).items()}
            prediction = label_map(torch.stack(list(tensors.values())[: method.options.classes])).cpu().numpy()
            maps = {key: v.cpu().numpy() for key, v in tensors.items()}
            label = item["label"].cpu().numpy() if "label" in item else None
            title = f"{item['case']}, iteration {done}"
            orientation = known_orientation(patches.volumes.cases[case])
            image = item["image"][0].cpu().numpy()
            report.picture(name, slice_picture(image, maps, prediction, label, title, orientation), done)
            if label is not None:
                report.mesh(f"surface/{name}", prediction_mesh(prediction, label, spacing), done)
    method.train()
