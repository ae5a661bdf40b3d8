"""matplotlib without a screen. All drawing code imports it from here, never from pyplot.

A notebook sets MPLBACKEND=module://matplotlib_inline.backend_inline for its subprocesses, and importing matplotlib
fails where that module is missing. No backend is needed here: a Figure has its own canvas.
"""

import os
from contextlib import suppress
from typing import Any

_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend:
    with suppress(ValueError):  # for a notebook that imports this and draws with pyplot
        matplotlib.rcParams["backend"] = _backend

WIDTH = 7.0  # of a page, in inches
FONT: dict[str, Any] = {"family": "DejaVu Sans", "size": 8}

__all__ = ["FONT", "WIDTH", "Axes", "Figure", "FigureCanvasAgg", "Patch", "withStroke"]
