"""matplotlib without a screen. Everything that draws takes it from here, and never from pyplot.

A notebook hands MPLBACKEND=module://matplotlib_inline.backend_inline on to what it starts, and matplotlib refuses to be
imported where that module is missing. No backend is needed here: a Figure is drawn on its own canvas.
"""

import os
from contextlib import suppress

_asked = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
finally:
    if _asked is not None:
        os.environ["MPLBACKEND"] = _asked
if _asked:
    with suppress(ValueError):  # for a notebook that imports this and then draws by itself
        matplotlib.rcParams["backend"] = _asked

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "withStroke"]
