"""The ways in which a program can end, and their exit codes."""

import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class UserError(Exception):
    """A mistake of the user. The text names the file or flag, the problem and the solution. Exit code 2."""


class Diverged(Exception):
    """A loss or a gradient is not finite, as the message says. Exit code 3. `iteration` is that of the batch that
    caused it, if known; `here` whether it is this process's own, and not only that of another one.
    """

    def __init__(self, message: str, iteration: int | None = None, here: bool = True):
        super().__init__(message)
        self.iteration, self.here = iteration, here


class Stopped(Exception):
    """A signal asked the program to stop, and it stopped after saving. Exit code 128 + signal number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


def warn(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {text}", file=sys.stderr)


OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # Path.exists and its like raise these
PLAIN = {"±": "+-", "\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x"}


def in_plain(e: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for codecs: writes characters that a terminal lacks in ASCII, such as +- or \\xe9."""
    if isinstance(e, UnicodeEncodeError) and e.object[e.start] in PLAIN:
        return PLAIN[e.object[e.start]], e.start + 1
    return codecs.backslashreplace_errors(e)


def print_anything() -> None:
    """Makes printing safe: neither an unencodable character (LANG=C) nor a closed stream ends the program."""
    codecs.register_error("in_plain", in_plain)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next open file would get its number, and the output of libraries
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None and number:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="in_plain")


def run(main: Callable[[], None]) -> None:
    """Runs `main`. Exit codes: 0 done, 2 mistake of the user, 3 diverged, 130 Ctrl-C, 143 SIGTERM, 1 bug."""
    try:
        print_anything()
        main()
        flush_stdout()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Diverged as e:
        print(f"diverged: {e}", file=sys.stderr)
        sys.exit(3)
    except Stopped as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("stopped: Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output ended early, as `| head` does
        discard_stdout()
    except OSError as e:
        if e.errno not in OF_THE_PATH or e.filename is None:
            raise
        path = os.fsdecode(e.filename)
        print(f"error: {path}: {e.strerror}. Give another path, or ask its owner for access.", file=sys.stderr)
        sys.exit(2)


def flush_stdout() -> None:
    """Raises UserError if what was printed cannot be written, on a full disk for instance."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        discard_stdout()  # or Python tries again at its end, and shows a traceback
        raise UserError(f"the standard output cannot be written: {e.strerror}. All files are written.") from e


def discard_stdout() -> None:
    """Discards the buffer of stdout and everything that is printed later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopSignal:
    """Remembers SIGTERM or the first Ctrl-C, so that the loop can save and end. A second Ctrl-C quits at once.

    `number` is the signal's number, 0 while none came.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int = 0) -> None:
    """For data workers: at a signal to the whole group the main process saves first, and then ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
