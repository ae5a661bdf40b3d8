"""One file per method: what is minimised, what is predicted. A new method is one file and one line of this table."""

from methods.base import Losses, Method, detached
from methods.dtml import DTML
from methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "dtml": DTML,
    "supervised": Supervised,
}

__all__ = ["METHODS", "Losses", "Method", "detached"]
