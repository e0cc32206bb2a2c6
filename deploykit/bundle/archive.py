"""A bundle's files where they lie: in a folder, or packed in an uncompressed zip that is never extracted.

The zip is read by its own few rules and not by a library's: every entry stored, contiguous, in the order of the directory,
with equal headers at both places, and nothing before, between or after them. So no entry can overlap another, sizes cannot
lie, and what is read is never more than the file has. Any unzip reads such a file; only ours and equally plain ones are
read here. Layout: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory) and 4.3.16 (end).

This package's reading half runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from deploykit.errors import UsageError, like, printable, translating_os_errors
from deploykit.publish import PARTIAL

MOST_ENTRIES = 8192
_MOST_BYTES = 0xFFFF_FFFE  # without ZIP64, which nothing of a CNN needs
_PIECE = 1 << 20
_LOCAL, _DIRECTORY, _END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
_LOCAL_MARK, _DIRECTORY_MARK, _END_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION, _UNIX, _FIRST_DATE = 20, 3 << 8, 0x21  # 2.0; made on Unix; 1980-01-01, so that the same files make the same zip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}){0,7}", re.ASCII)


class Files(Protocol):
    """Files by name: a folder's or a zip's."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Names and their sizes in bytes."""

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of a file that is there, in pieces of at most 1 MiB. Raises UsageError when it cannot be read whole."""


@dataclass(frozen=True)
class _Entry:
    start: int
    size: int


def objection(name: str) -> str:
    """Why `name` is no canonical relative POSIX path of ours; empty when it is one.

    ASCII letters, digits and `._+-`, at most eight parts, none that starts with a dot or a dash: so there is no `..`, no
    absolute path, no drive, no backslash, no option, and no letter with two spellings or another direction of writing.
    """
    return "" if _NAME.fullmatch(name) else f"{printable(name)[:80]!r} is not a plain relative path"


def twins(names: Iterable[str]) -> list[str]:
    """Names that some file systems take for one: doubles, other cases, and files that others need as folders."""
    seen: dict[str, str] = {}
    problems = []
    for name in names:
        key = name.casefold()
        if key in seen:
            problems.append(f"{printable(name)!r} and {printable(seen[key])!r} are the same file")
        seen[key] = name
    for key, name in seen.items():
        parts = key.split("/")
        folders = ("/".join(parts[:count]) for count in range(1, len(parts)))
        problems += [f"{seen[folder]!r} is a file, and the folder of {name!r}" for folder in folders if folder in seen]
    return problems


@contextmanager
def opened(path: Path) -> Iterator[Files]:
    """The files of the bundle at `path`. Raises UsageError when it is neither a folder nor a zip of the kind above, or a file
    of it is not plain (a link, a device), or has a name that is none of ours."""
    try:
        if path.is_dir():
            yield _Folder(path)
        elif path.exists() and not path.is_file():
            raise UsageError(f"{printable(path)} is not a bundle", why="it is a device, or otherwise neither file nor folder")
        else:
            with path.open("rb") as file:
                yield _Zip(path, file)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {printable(path)}", fix=like(path)) from error
    except IsADirectoryError as error:
        raise UsageError(f"{printable(path)} changed while it was read") from error


class _Folder:
    """A folder whose files are all plain: links and devices are refused, for their bytes are not the bundle's."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.sizes: dict[str, int] = {}
        problems: list[str] = []
        for path in _walk(root):
            name = path.relative_to(root).as_posix()
            if len(self.sizes) + len(problems) > MOST_ENTRIES:
                raise UsageError(f"{printable(root)} is not a bundle", why=f"it holds more than {MOST_ENTRIES} files")
            found = path.lstat()
            why = objection(name) or _not_plain(name, found)
            if why:
                problems.append(why)
            else:
                self.sizes[name] = found.st_size
        problems += twins(self.sizes)
        if problems:
            raise UsageError(f"{printable(root)} is not a bundle", problems=problems[:20])

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of one file. The flags and the check of the opened file refuse what was put there since."""
        try:
            file = os.fdopen(os.open(self._root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise UsageError(f"cannot read {printable(self._root / name)}", why=error.strerror or str(error)) from error
        with file:
            why = _not_plain(name, os.fstat(file.fileno()))
            if why:
                raise UsageError(f"{printable(self._root)} changed while it was read", why=why)
            yield from _read(file, self.sizes[name], name)


class _Zip:
    """The entries of a stored zip."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._file = file
        try:
            self._entries = _entries(file)
        except (ValueError, struct.error) as error:
            raise UsageError(f"{printable(path)} is not a bundle", why=str(error)) from error
        self.sizes = {name: entry.size for name, entry in self._entries.items()}

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of one entry."""
        entry = self._entries[name]
        self._file.seek(entry.start)
        yield from _read(self._file, entry.size, name)


def write(path: Path, files: Iterable[tuple[str, Path]]) -> None:
    """Pack files into a zip at `path` in the given order, complete or not at all. The same files make the same bytes.

    Raises UsageError when they are too many or too large for a plain zip, DeploykitError when the file system refuses.
    """
    aside = path.with_name(path.name + PARTIAL)
    with translating_os_errors("write", path):
        try:
            with aside.open("wb") as out:
                _write(out, files)
                out.flush()
                os.fsync(out.fileno())
            aside.rename(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(out: BinaryIO, files: Iterable[tuple[str, Path]]) -> None:
    directory, count = b"", 0
    for name, source in files:
        count, offset, encoded = count + 1, out.tell(), name.encode("ascii")
        out.write(bytes(_LOCAL.size) + encoded)
        crc, size = 0, 0
        with source.open("rb") as file:
            while piece := file.read(_PIECE):
                crc, size = zlib.crc32(piece, crc), size + len(piece)
                out.write(piece)
        end = out.tell()
        if end > _MOST_BYTES or count > MOST_ENTRIES:
            raise UsageError("the bundle is too large for one file", why="a plain zip ends at 4 GiB", fix="pack it as a folder")
        common = (0, 0, 0, _FIRST_DATE, crc, size, size, len(encoded), 0)
        out.seek(offset)
        out.write(_LOCAL.pack(_LOCAL_MARK, _VERSION, *common))
        out.seek(end)
        mode = (stat.S_IFREG | 0o644) << 16
        directory += _DIRECTORY.pack(_DIRECTORY_MARK, _UNIX | _VERSION, _VERSION, *common, 0, 0, 0, mode, offset) + encoded
    start = out.tell()
    out.write(directory + _END.pack(_END_MARK, 0, 0, count, count, len(directory), start, 0))


def _entries(file: BinaryIO) -> dict[str, _Entry]:
    """Where each entry lies. Raises ValueError for everything that `write` does not write."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        raise ValueError("it is no zip file: it is too short")
    file.seek(size - _END.size)
    mark, disk, other, here, count, length, start, comment = _END.unpack(file.read(_END.size))
    if mark != _END_MARK:
        raise ValueError("it is no zip file, is cut short, or something follows the end")
    if disk or other or comment or here != count or start + length != size - _END.size:
        raise ValueError("its end does not fit the file")
    if count > MOST_ENTRIES or length > MOST_ENTRIES * (_DIRECTORY.size + 1000):
        raise ValueError(f"it has {count} entries; a bundle has at most {MOST_ENTRIES}")
    file.seek(start)
    directory = file.read(length)
    entries: dict[str, _Entry] = {}
    names: list[str] = []
    position = expected = 0
    for _ in range(count):
        name, entry, position = _entry(file, directory, position, expected)
        names.append(name)
        entries[name] = entry
        expected = entry.start + entry.size
    if position != length or expected != start:
        raise ValueError("its directory and its entries do not fit together")
    if problems := twins(names):
        raise ValueError("; ".join(problems[:5]))
    return entries


def _entry(file: BinaryIO, directory: bytes, position: int, expected: int) -> tuple[str, _Entry, int]:
    """The next entry of the directory, its local header checked; it has to lie at `expected`."""
    mark, _, _, flags, method, *rest = _DIRECTORY.unpack_from(directory, position)
    _, _, crc, packed, size, length, extra, comment, disk, _, attributes, offset = rest
    position += _DIRECTORY.size
    encoded = directory[position : position + length]
    name = encoded.decode("ascii", "backslashreplace")
    if mark != _DIRECTORY_MARK or len(encoded) != length:
        raise ValueError("its directory is damaged")
    if why := objection(name):
        raise ValueError(why)
    if method or flags or packed != size or extra or comment or disk:
        raise ValueError(f"entry {name!r} is compressed, encrypted or otherwise not plain")
    if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG) or attributes & 0x10:
        raise ValueError(f"entry {name!r} is a link, a folder or a device")
    if offset != expected:
        raise ValueError(f"entry {name!r} overlaps another, or lies behind a gap")
    file.seek(offset)
    header = file.read(_LOCAL.size + length)
    found = _LOCAL.unpack_from(header) if len(header) == _LOCAL.size + length else (b"",)
    if found[0] != _LOCAL_MARK or header[_LOCAL.size :] != encoded or found[2:4] != (0, 0):
        raise ValueError(f"entry {name!r} is called otherwise at its own place")
    if found[6:] != (crc, size, size, length, 0):
        raise ValueError(f"entry {name!r} has another size at its own place")
    return name, _Entry(offset + _LOCAL.size + length, size), position + length


def _read(file: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    left = size
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            raise UsageError(f"{name} is cut short", why=f"{left} of its {size} bytes are missing")
        left -= len(piece)
        yield piece


def _walk(root: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder itself; links are named and never followed."""
    for folder, folders, files in os.walk(root):
        for name in sorted(folders):
            if Path(folder, name).is_symlink():
                yield Path(folder, name)
        for name in sorted(files):
            yield Path(folder, name)


def _not_plain(name: str, found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return f"{name!r} is a link, a device or otherwise no plain file"
    return f"{name!r} has another name elsewhere (a hard link)" if found.st_nlink != 1 else ""
