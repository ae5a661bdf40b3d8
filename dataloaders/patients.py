"""Which scans are of one patient, so that no patient is trained on and tested on.

`patients` in the dataset.json of a data set is {"scan": "patient"}. A scan that it does not name is a patient of its
own.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from dataloaders.class_names import DATASET, read_dataset
from utils.errors import UserError
from utils.text import some


def patients_of(folder: Path) -> dict[str, str]:
    """Name of a scan -> its patient, as the data set states it.

    Raises:
        UserError: if dataset.json cannot be read or has other content.
    """
    patients = read_dataset(folder / DATASET).get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(patient, str) for patient in patients.values()):
        raise UserError(f'"patients" in {folder / DATASET} must be {{"scan": "patient"}}. Fix it, or take it out.')
    return patients


def patients_by_name(names: Iterable[str], pattern: str) -> dict[str, str]:
    """Name of a scan -> its patient, the group in parentheses of a regular expression that its beginning matches.

    Raises:
        UserError: for a pattern that is none or has not one group, or that does not match a name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as e:
        raise UserError(f"--patient {pattern!r} is no regular expression: {e}. Try '([^_]+)_'.") from e
    if expression.groups != 1:
        raise UserError(f"--patient {pattern!r} needs one group in parentheses, the patient. Try '([^_]+)_'.")
    matches = {name: expression.match(name) for name in names}
    others = [name for name, match in matches.items() if not match or not match[1]]
    if others:
        raise UserError(f"--patient {pattern!r} finds no patient in {some(others)}. Change it.")
    return {name: match[1] for name, match in matches.items() if match}


def refuse_shared(lists: Mapping[str, Sequence[str]], patients: Mapping[str, str], advice: str) -> None:
    """Checks that no patient has scans in two lists, what a list is called -> names of its scans. `patients` is name of
    a scan -> its patient; `advice` ends the error.

    Raises:
        UserError: naming the first patients who have.
    """
    where: dict[str, dict[str, str]] = {}  # patient -> list -> a scan
    for called, names in lists.items():
        for name in names:
            where.setdefault(patients.get(name, name), {}).setdefault(called, name)
    shared = [
        f"{patient} has " + " and ".join(f"{name} in {called}" for called, name in there.items())
        for patient, there in where.items()
        if len(there) > 1
    ]
    if shared:
        raise UserError(f"a patient must be in one list: {some(shared, 3, '; ')}. {advice}")


def others_of(names: Sequence[str], seen: Collection[str], patients: Mapping[str, str]) -> list[str]:
    """The scans of `names` whose patients have no scan in `seen`."""
    known = {patients.get(name, name) for name in seen}
    return [name for name in names if patients.get(name, name) not in known]
