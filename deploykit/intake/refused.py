"""A file from elsewhere that will not be read, with the reason."""

from __future__ import annotations

from collections.abc import Sequence


class Refused(Exception):  # noqa: N818 - it is an answer about a file; callers make an error of theirs of it
    """Why a file is not read, and what to do; `problems` lists all findings, `told` is the first line with {} for the
    file's name, when there is more to say than what could not be done.

    Whoever asked knows that name and what the file was wanted for, and raises a DeploykitError with both.
    """

    def __init__(self, why: str = "", *, told: str = "", fix: str = "", problems: Sequence[str] = ()) -> None:
        self.why, self.told, self.fix, self.problems = why, told, fix, tuple(problems)
        super().__init__("; ".join([*self.problems, *([why] if why else [])]))
