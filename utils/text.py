"""Text files that a user gives, lists of names in messages, and tables as Markdown and CSV."""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.errors import UserError

MOST = 2**24


def read_text(path: Path) -> str:
    """The text of a file of at most 16 MiB, so that a device or a volume named by mistake does not fill the memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text in UTF-8, or larger.
    """
    with open(path, "rb") as f:
        data = f.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"it has more than {MOST} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError("it is no text in UTF-8. Save it as UTF-8") from e


def refuse_bytes(name: str) -> None:
    """Raises UserError for a name of bytes that are no text in this locale, which TensorBoard and ITK cannot take."""
    if re.search("[\ud800-\udfff]", name):
        raise UserError(f"{name!a} is not valid in this locale's encoding. Set LC_ALL=C.UTF-8, or rename the file.")


def some(names: Iterable[object], most: int = 5, between: str = ", ") -> str:
    """The names as text; of more than `most` the first ones, and how many more there are."""
    texts = [str(name) for name in names]
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def counted(n: int, noun: str) -> str:
    """The number of things, such as 1 scan or 3 scans."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def xyz_text(numbers: Iterable[int]) -> str:
    """Numbers along x, y, z as text; one if all are the same."""
    shown = [str(n) for n in numbers]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence that names the choice most like a word, with a blank before it; '' if none is like it."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a line break at its end; a | in a cell, as of a class's name, is escaped."""
    texts = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    first, *lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in texts]
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def csv_table(rows: Sequence[Mapping[str, object]]) -> str:
    """CSV with the columns of all rows, in the order in which they first appear; empty where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
