"""Images of one channel, (W,H,D), or of K channels, (K,W,H,D), such as T1, T2 and FLAIR of one scan."""

from collections.abc import Callable
from typing import Any

import numpy as np


def with_channels(image: Any) -> Any:
    """Array or tensor (W,H,D) or (K,W,H,D) -> (K,W,H,D), a view."""
    return image if image.ndim == 4 else image[None]


def each_channel(f: Callable[[Any], Any], image: Any) -> Any:
    """Applies f, which takes an array (W,H,D), to (W,H,D) or to every channel of (K,W,H,D)."""
    return f(image) if image.ndim == 3 else np.stack([f(channel) for channel in image])
