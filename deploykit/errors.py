"""Every error that a user can meet, as a tree with one class for each decision a caller might take.

DeploykitError            exit 1   something failed; the message says what, why and what to do
|-- UsageError            exit 2   what was asked for is wrong: an option, a recipe, a file, an image
|   |-- RecipeError       exit 2   all problems of one recipe, each with its table and key
|   |-- ModelError        exit 2   unknown model, unusable factory or checkpoint
|   `-- DataError         exit 2   images or labels that cannot be used
|-- LineError             exit 1   the line to a device was cut, or nobody answers: asking again may help, and goes on
|-- StageError            exit 1   a stage's own check failed: its result would have been wrong
`-- CapabilityError       exit 4   this machine does not have what was required (a runtime, a GPU)

What a gate says (exit 3: no, exit 5: cannot tell) is a result and not an error: see `gate.Verdict`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class DeploykitError(Exception):
    """What failed, why, and what to do about it.

    `what` is one line; `why` and `fix` are optional sentences, empty when there is nothing to say; `problems` lists all findings
    when several were collected before raising. `str` of the error is all of it, as the command line prints it.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "", problems: Sequence[str] = ()) -> None:
        self.what, self.why, self.fix, self.problems = what, why, fix, tuple(problems)
        lines = [what, *(f"  - {problem}" for problem in self.problems)]
        if why:
            lines.append(f"  why: {why}")
        if fix:
            lines.append(f"  try: {fix}")
        super().__init__("\n".join(lines))


class UsageError(DeploykitError):
    """What was asked for is wrong; asking differently helps."""

    exit_code = 2


class RecipeError(UsageError):
    """All problems of one recipe, raised once."""


class ModelError(UsageError):
    """An unknown model, or a factory or checkpoint that cannot be used."""


class DataError(UsageError):
    """Images or labels that cannot be used."""


class LineError(DeploykitError):
    """The line to a device was cut, or nobody answers there; what had arrived is kept, and trying again goes on from it."""


class StageError(DeploykitError):
    """A stage's postcondition failed, so its result was thrown away."""


class CapabilityError(DeploykitError):
    """This machine lacks what was required: a package, a runtime, a GPU."""

    exit_code = 4


_SHOWN, _COMPARED = 5, 2000  # names of a folder in a message, and those that are compared with one that is not there
_OS_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place with --output",
    errno.EDQUOT: "free some of your quota, or choose another place with --output",
    errno.EROFS: "the file system is mounted read-only: choose another place with --output",
    errno.EACCES: "check the permissions, or choose another place with --output",
    errno.EPERM: "check the permissions, or choose another place with --output",
    errno.ENOTDIR: "part of that path is a file, not a folder: choose another place with --output",
    errno.ENAMETOOLONG: "choose a shorter path with --output",
    errno.EIO: "the disk reports a fault: choose another place with --output",
}


@contextmanager
def translating_os_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn what a file system refuses into a DeploykitError (exit 1) that names the file and what to do.

    Other OSErrors, such as a file that is not there, pass through: here they are bugs and deserve their traceback.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OS_ADVICE:
            raise
        named = error.filename if isinstance(error.filename, (str, Path)) else path
        raise DeploykitError(
            f"cannot {doing}: {printable(named)}",
            why=(error.strerror or str(error)).lower(),
            fix=_OS_ADVICE[error.errno],
        ) from error


def like(path: Path) -> str:
    """What to try for a path where nothing is: what lies beside it under a name much like it, or what is in the way to it."""
    try:
        if path.is_symlink():
            return f"another path: it is a link to {printable(path.readlink())}, which is not there"
        folder = path.parent
        if not folder.is_dir():
            missing = next(one for one in (folder, *folder.parents) if one.parent.is_dir() or one == one.parent)
            told = "is not a folder" if missing.exists() else "is not there either"
            return f"another path: {printable(missing)} {told}"
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return "another path"
    import difflib  # a device's half loads this module at each start, and has no use for it

    close = difflib.get_close_matches(path.name, names, n=1) if len(names) <= _COMPARED else []
    return f"{printable(path.with_name(close[0]))}, which is there" if close else f"another path: {_held(folder, names)}"


def _held(folder: Path, names: Sequence[str]) -> str:
    if not names:
        return f"{printable(folder.absolute())} is empty"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{printable(folder.absolute())} holds {', '.join(map(printable, names[:_SHOWN]))}{more}"


def is_utf8(path: object) -> bool:
    """Whether a path or name can be written down as text: paths from a command line can hold bytes that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str | Path) -> str:
    """A path or name as text that any terminal can print, on one line: bytes that are not UTF-8 appear as \\xNN, and so do
    characters that move the cursor, change colours or the direction of writing."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
