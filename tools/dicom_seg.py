"""The segmentation of a DICOM series as a DICOM Segmentation object (DICOM-SEG), for viewers and archives of hospitals.

It needs the package highdicom (requirements-dicom.txt). The object has a segment for each class and the frames of the
series, refers to its images, and belongs to the same patient, study and frame of reference.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataloaders.cases import CaseError
from dataloaders.geometry import Geometry
from utils.errors import UserError

LONGEST = 64  # characters of a label or a meaning in DICOM
SCHEME = "99DTML"  # of our codes; private ones begin with 99
VERSION = "0.1.0"


def require_highdicom() -> None:
    """Raises UserError if the package is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"--dicom-seg needs the package highdicom ({e}). Run pip install -r requirements-dicom.txt, or leave the "
            "flag out."
        ) from e


def dicom_seg(
    label: NDArray[np.uint8], geometry: Geometry, slices: Sequence[str], *, classes: int, names: Mapping[int, str],
    method: str,
) -> bytes:  # fmt: skip
    """The contents of a DICOM-SEG file of a label (W,H,D) of 0 to `classes`, on the grid of the series whose slices are
    files in the order of z. `names` are those of the classes that have one.

    Raises:
        CaseError: continuing a sentence that begins with the series: attributes that a DICOM-SEG needs and the series
            does not have.
    """
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    images = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in slices]
    between = pydicom.valuerep.DSfloat(geometry["spacing"][2], auto_format=True)
    for image in images:  # headers may state another distance than that of their positions, or none
        image.SpacingBetweenSlices = between
        image.SliceThickness = getattr(image, "SliceThickness", None) or between
    algorithm = hd.AlgorithmIdentificationSequence(
        name=method[:LONGEST], version=VERSION, family=codes.DCM.ArtificialIntelligence
    )

    def segment(c: int) -> Any:
        name = (names.get(c) or f"class {c}")[:LONGEST]
        return hd.seg.SegmentDescription(
            segment_number=c,
            segment_label=name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=hd.sr.CodedConcept(f"CLASS{c}", SCHEME, name),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no class is there, or that a name in the series is unusual
            result = hd.seg.Segmentation(
                source_images=images,
                pixel_array=np.ascontiguousarray(label.transpose(2, 1, 0)),  # frames, rows, columns
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[segment(c) for c in range(1, classes + 1)],
                series_instance_uid=hd.UID(),
                series_number=1000 + int(getattr(images[0], "SeriesNumber", None) or 0),
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="DTML",
                manufacturer_model_name=method[:LONGEST],
                software_versions=VERSION,
                device_serial_number="0",
                series_description=f"Segmentation by {method}"[:LONGEST],
            )
            data = io.BytesIO()
            result.save_as(data)
    except (AttributeError, ValueError, TypeError, KeyError) as e:
        why = str(e).splitlines()[0].rstrip(".")
        raise CaseError(f"cannot be written as DICOM-SEG ({why}). Leave out --dicom-seg") from e
    return data.getvalue()
