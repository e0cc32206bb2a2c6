"""Constants that an ONNX file keeps in other files: where they may lie (onnx/docs/ExternalData.md)."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

_LONGEST_LOCATION = 1024


def objection(folder: Path, entries: Mapping[str, str], size: int) -> str:
    """Why `size` bytes are not to be read from where `entries` say; empty when they lie in a file beneath `folder`.

    No part of the way may be a link, nor may the file have a second name: six repairs of other readers forgot one of these
    (CVE-2022-25882, -2024-27318, -2026-27489, -2026-34446, -2026-34447).
    """
    location = entries.get("location", "")
    # PurePosixPath would tidy away `.` and double slashes, so the text itself is looked at.
    parts = location.split("/")
    if not location or len(location) > _LONGEST_LOCATION or {"", ".", ".."} & {*parts} or "\\" in location or "\0" in location:
        return f"lies in {location[:100]!r}, which is no path beneath the file's folder"
    try:
        offset, length = (int(entries[key]) if key in entries else None for key in ("offset", "length"))
    except ValueError:
        return "has an offset or length that is no number"
    try:
        found = _regular_file(folder, parts)
    except OSError as error:
        return f"lies in {location[:100]!r}: {(error.strerror or str(error)).lower()}"
    if isinstance(found, str):
        return f"lies in {location[:100]!r}, {found}"
    begin, wanted = offset or 0, size if length is None else length
    if begin < 0 or wanted != size or begin + size > found:
        return f"takes {wanted} bytes from {begin} on of {location[:100]!r}, which has {found}; its shape wants {size}"
    return ""


def _regular_file(folder: Path, parts: list[str]) -> int | str:
    """The size of the file, or what it is instead. Raises OSError for a link on the way, and for what cannot be opened."""
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        for part in parts:
            # A pipe would wait for a writer.
            kind = os.O_NONBLOCK if len(opened) == len(parts) else os.O_DIRECTORY
            opened.append(os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=opened[-1]))
        facts = os.fstat(opened[-1])
    finally:
        for one in opened:
            os.close(one)
    if not stat.S_ISREG(facts.st_mode):
        return "which is not a file"
    return "which has a second name (a hard link)" if facts.st_nlink > 1 else facts.st_size
