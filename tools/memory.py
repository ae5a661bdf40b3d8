"""The memory of a training step, counted from the tensors that live at the same time.

The method runs forward and backward on torch's device 'meta', whose tensors have shapes but no values. So the count is
that of the real networks and losses at the real size, in a second, on any computer. It knows tensors alone: libraries
take workspaces, and freed memory is not always reused.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from methods import METHODS, Method
from utils.options import fill

MARGIN = 1.3
"""The most memory of a process over the counted bytes, measured on a CPU (docs/training.md)."""


class PeakMemory(TorchDispatchMode):
    """Context that counts the bytes of the tensors made in it, and the most that lived at once, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.is_meta:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is freed; views and results in place have one that is known."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def meta_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method with shapes but no weights, in training mode."""
    kind = METHODS[name]
    # The component filter of pseudo-labels needs values, and no memory of the device.
    method_options = fill(kind.Options, dict(options), {"largest_component": False})
    with torch.device("meta"):
        return kind(method_options, iterations=100).train()


def meta_batch(method: Method, patch_size: Sequence[int], batch_size: int, labeled: int) -> dict[str, Any]:
    """A batch of the method without values."""
    o = method.options
    with torch.device("meta"):
        image = torch.empty(batch_size, o.channels, *patch_size)
        label = torch.empty(labeled, *patch_size, dtype=torch.uint8)
        batch: dict[str, Any] = {"image": image, "label": label, "case": [""] * batch_size}
        if method.needs_sdm:
            batch["sdm"] = torch.empty(labeled, o.classes, *patch_size)
        if method.needs_other_crop:
            batch |= {"other_image": torch.empty_like(image), "other_label": torch.empty_like(label)}
    return batch


def step_bytes(method: Method, patch_size: Sequence[int], batch_size: int, labeled: int) -> tuple[int, int]:
    """Counts a training step with SGD of a method of `meta_method`; `labeled` of the crops have a label.

    Returns:
        The bytes of the weights and the optimizer, which no patch changes, and the most that batch, activations and
        gradients take at once.
    """
    batch = meta_batch(method, patch_size, batch_size, labeled)
    given = sum(x.untyped_storage().nbytes() for x in batch.values() if isinstance(x, Tensor))
    with PeakMemory() as memory:
        method(batch, method.iterations // 2).total.backward()
    for p in method.parameters():
        p.grad = None
    weights = sum(p.nbytes for p in method.parameters())
    return weights + trainable_bytes(method), given + memory.peak


def trainable_bytes(method: Method) -> int:
    """Bytes of the weights that are trained, and so of their gradients and of their momentum."""
    return sum(p.nbytes for p in method.parameters() if p.requires_grad)
