"""Text files that a user gives, and lists of names in messages."""

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST = 2**24


def read_text(path: Path) -> str:
    """The text of a file of at most 16 MiB, so that a device or a volume named by mistake does not fill the memory.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
        ValueError: it is larger.
    """
    with open(path, "rb") as f:
        data = f.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"it has more than {MOST} bytes")
    return data.decode("utf-8-sig")


def some(names: Iterable[object], most: int = 5, between: str = ", ") -> str:
    """The names as text; of more than `most` the first ones, and how many more there are."""
    texts = [str(name) for name in names]
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def once(numbers: Iterable[int]) -> str:
    """Numbers along x, y, z as text; one if all are the same."""
    shown = [str(n) for n in numbers]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence that names the choice most like a word, with a blank before it; '' if none is like it."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {near[0]}?" if near else ""
