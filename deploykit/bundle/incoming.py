"""What comes to a device over a connection: blobs, resumed where they were cut, hashed before they count as there.

    incoming/<bundle id>/      the manifest, its signature and the device half
    incoming/blobs/<sha256>    blobs that came whole; `.part`: the beginning of one

A blob that an installed release has is not sent again. The beginning of a blob is never believed: when the rest has come, all
of it is hashed, and thrown away when that is not its name (a transfer that is resumed by its length alone goes on after
damaged bytes, and reports success).

A network whose head changed is one new blob, of which most bytes are those of the release that runs. So for a blob whose name
that release has, too, the sums of its blocks are told, and blocks that are the same are taken from there. The sums only save
bytes: what counts is the digest of the whole.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from deploykit import artifact, bundle, publish, slots
from deploykit.bundle import Blob, Manifest
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors

INCOMING = "incoming"
_PART = ".part"
BLOCK = 1 << 14
_SUM, _WORTH = 16, 4 * BLOCK
_PIECE, _LONGEST_HEADER = 1 << 20, 1 << 20


@dataclass(frozen=True)
class Lacking:
    """A blob that is not there, how many bytes of its beginning are, and the sums of the blocks of what it replaces."""

    sha256: str
    bytes: int
    part: int
    sums: tuple[str, ...] = ()


def folder(root: Path, id: str) -> Path:
    """Where the manifest of a bundle lies that is coming."""
    return root / INCOMING / slots.release_folder(root, id).name


class Arrived:
    """The files of a bundle that is coming, for `bundle.opened`: what has come, and what installed releases have of it."""

    def __init__(self, root: Path, id: str) -> None:
        self._paths: dict[str, Path] = {}
        place = folder(root, id)
        for name in (bundle.MANIFEST, bundle.SIGNATURE):
            if (place / name).is_file():
                self._paths[name] = place / name
        for release in sorted((root / slots.RELEASES).glob("*/")):
            for name, blob in _files_of(release).items():
                if (release / name).is_file():
                    self._paths[blob.entry] = release / name
        half = place / bundle.DEVICE_HALF
        if half.is_file():
            self._paths[f"{bundle.BLOBS}/{artifact.digest_file(half)}"] = half
        for path in sorted(_blobs(root).glob("*")):
            if not path.name.endswith(_PART) and path.is_file():
                self._paths[f"{bundle.BLOBS}/{path.name}"] = path
        self.sizes = {name: path.stat().st_size for name, path in self._paths.items()}

    def only(self, manifest: Manifest) -> None:
        """Forget what other bundles have: it is not of this one."""
        wanted = {blob.entry for blob in manifest.files.values()} | {bundle.MANIFEST, bundle.SIGNATURE}
        self.sizes = {name: size for name, size in self.sizes.items() if name in wanted}

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of one file; who reads it checks its digest."""
        try:
            with self._paths[name].open("rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise UsageError(f"cannot read {printable(self._paths[name])}", why=error.strerror or str(error)) from error


def manifest(root: Path, id: str, signers: Path | None) -> Manifest:
    """The manifest of the bundle that is coming, its signature checked where signers are known."""
    place = folder(root, id)
    with bundle.opened(place, signers=signers, files=Arrived(root, id)) as opened:
        if opened.manifest.id != id:
            raise UsageError(f"{printable(place)} is not the bundle {id}", why=f"it is {opened.manifest.id}")
        return opened.manifest


def lacking(root: Path, wanted: Manifest) -> list[Lacking]:
    """The blobs that are not there, or not what their names say; every one that is there is read and hashed."""
    arrived, found = Arrived(root, wanted.id), []
    for blob in {blob.entry: blob for blob in wanted.files.values()}.values():
        if not _is_there(arrived, blob):
            (_blobs(root) / blob.sha256).unlink(missing_ok=True)
            part = _blobs(root) / (blob.sha256 + _PART)
            size = part.stat().st_size if part.is_file() and part.stat().st_size <= blob.size else 0
            base = None if size else _replaced(root, wanted, blob)
            found.append(Lacking(blob.sha256, blob.size, size, () if base is None else sums(_pieces(base))))
    return found


def sums(pieces: Iterable[bytes]) -> tuple[str, ...]:
    """A short sum of each block; every piece but the last is a whole number of blocks."""
    blocks = (piece[start : start + BLOCK] for piece in pieces for start in range(0, len(piece), BLOCK))
    return tuple(hashlib.sha256(block).hexdigest()[:_SUM] for block in blocks)


def receive(root: Path, wanted: Manifest, stream: BinaryIO) -> tuple[list[str], list[str]]:
    """Take blobs from a stream, each after a line of JSON; those that came, and those that were damaged.

    The line says `sha256`; `offset`, where it goes on; and `keep`, runs of blocks `[first, count]` in order that are taken from
    the file that it replaces.

    A blob gets its name after all of it was hashed and is on the disk. When the stream ends early its beginning is kept.
    Raises UsageError for a blob that nobody asked for, DeploykitError when the stream ends early or the disk refuses.
    """
    blobs = {blob.sha256: blob for blob in wanted.files.values()}
    slots.make_folder(_blobs(root))
    came: list[str] = []
    damaged: list[str] = []
    while line := stream.readline(_LONGEST_HEADER):
        try:
            header = json.loads(line)
            blob, offset = blobs[header["sha256"]], int(header["offset"])
            keep = [range(int(first), int(first) + int(count)) for first, count in header.get("keep", [])]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError("what came is no blob of this bundle", why=printable(str(error))[:200]) from error
        part = _blobs(root) / (blob.sha256 + _PART)
        with translating_os_errors("write", part):
            is_good = _append(part, blob, offset, _Woven(stream, _replaced(root, wanted, blob), keep) if keep else stream)
            if is_good:
                part.rename(_blobs(root) / blob.sha256)
            else:
                part.unlink()
        (came if is_good else damaged).append(blob.sha256)
    with translating_os_errors("sync", _blobs(root)):
        publish.fsync(_blobs(root))
    return came, damaged


def clear(root: Path, installed: Manifest) -> None:
    """Remove what came of a bundle that is a release now, and the manifests of others; its device half may still be running."""
    for blob in installed.files.values():
        (_blobs(root) / blob.sha256).unlink(missing_ok=True)
        (_blobs(root) / (blob.sha256 + _PART)).unlink(missing_ok=True)
    for path in (root / INCOMING).glob("*/"):
        if path.name not in (installed.id, bundle.BLOBS):
            publish.remove(path)


def clear_all(root: Path) -> bool:
    """Remove everything that came and is no release; whether there was something."""
    there = (root / INCOMING).is_dir()
    publish.remove(root / INCOMING)
    return there


def _append(part: Path, blob: Blob, offset: int, stream: _Source) -> bool:
    """The rest of one blob; whether the whole is what its name says. Raises DeploykitError when the stream ends before."""
    sha = hashlib.sha256()
    with part.open("r+b" if part.exists() else "w+b") as file:
        if not 0 <= offset <= min(file.seek(0, os.SEEK_END), blob.size):
            raise UsageError(f"{blob.sha256} cannot go on at {offset}", why="that much of it is not here")
        file.truncate(offset)
        file.seek(0)
        while piece := file.read(_PIECE):
            sha.update(piece)
        left = blob.size - offset
        while left:
            piece = stream.read(min(left, _PIECE))
            if not piece:
                file.flush()
                os.fsync(file.fileno())
                raise DeploykitError("the line was cut", why=f"{left} bytes of {blob.sha256} have not come", fix="send the rest")
            file.write(piece)
            sha.update(piece)
            left -= len(piece)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest() == blob.sha256


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Woven:
    """A stream into which blocks of another file are woven, from the beginning of a blob."""

    def __init__(self, stream: BinaryIO, base: Path | None, keep: list[range]) -> None:
        if base is None:
            raise UsageError("blocks of a file were named that is not here", fix="deploy again")
        self._stream, self._base, self._keep, self._at = stream, base, deque(keep), 0

    def read(self, size: int) -> bytes:
        """The next bytes: up to the end of a block that is kept, or up to the next one that is."""
        block = self._at // BLOCK
        while self._keep and self._keep[0].stop <= block:
            self._keep.popleft()
        run = self._keep[0] if self._keep else None
        if run is not None and block in run:
            with self._base.open("rb") as file:
                file.seek(self._at)
                found = file.read(min(size, run.stop * BLOCK - self._at))
        else:
            found = self._stream.read(size if run is None else min(size, run.start * BLOCK - self._at))
        self._at += len(found)
        return found


def _replaced(root: Path, wanted: Manifest, blob: Blob) -> Path | None:
    """The file of the current release that has a name of this blob, where it is large enough to be worth it."""
    running = slots.current(root)
    if running is None or blob.size < _WORTH:
        return None
    names = (name for name, found in wanted.files.items() if found == blob)
    paths = (slots.release_folder(root, running) / name for name in names)
    return next((path for path in paths if path.is_file()), None)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _is_there(arrived: Arrived, blob: Blob) -> bool:
    if arrived.sizes.get(blob.entry) != blob.size:
        return False
    sha = hashlib.sha256()
    with suppress(UsageError):
        for piece in arrived.pieces(blob.entry):
            sha.update(piece)
    return sha.hexdigest() == blob.sha256


def _blobs(root: Path) -> Path:
    return root / INCOMING / bundle.BLOBS


def _files_of(release: Path) -> dict[str, Blob]:
    """The files of an installed release by name; none when its manifest cannot be read, for another release may be sound."""
    try:
        return bundle.parse((release / bundle.MANIFEST).read_bytes(), printable(release)).files
    except (OSError, UsageError):
        return {}
