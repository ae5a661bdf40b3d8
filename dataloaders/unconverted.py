"""Folders of scans that were not converted yet, given where a data set is needed."""

from pathlib import Path

from utils.errors import UserError

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm")
FOLDERS = ("", "images", "imagesTr", "labels", "labelsTr")


def refuse_unconverted(folder: Path) -> None:
    """Refuses a folder without lists that holds scans of other formats than h5, itself or in its folders of images.

    Raises:
        UserError: naming a scan, and the command that converts them.
    """
    for part in FOLDERS:
        inner = folder / part
        files = sorted(inner.iterdir()) if inner.is_dir() else []
        scan = next((path for path in files if path.name.lower().endswith(ENDINGS)), None)
        if scan is not None:
            source = folder if part or folder.name not in FOLDERS else folder.parent
            raise UserError(
                f"{folder} holds scans such as {scan.relative_to(folder)} and no converted data set. Convert them "
                f"first: python -m tools.convert --source {source} --out data/mine, then give --data data/mine."
            )
