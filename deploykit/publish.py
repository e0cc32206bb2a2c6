"""Files and directories that appear complete or not at all, also after a power cut.

The order is the only one that survived simulated power cuts on ext4 and xfs: fsync every file, fsync the directory
that names it, rename, fsync the parent. Without the directory's fsync, default ext4 can show the new name with a
0-byte file behind it. A failed fsync is never retried: the kernel has already dropped the pages (Rebello et al.,
"Can Applications Recover from fsync Failures?", USENIX ATC 2020), so the work is thrown away instead.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors

PARTIAL = ".partial"
STALE = ".stale"
UNFINISHED = (PARTIAL, STALE)
LOCK = ".lock"
_RESERVE_BYTES = 16 << 20


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; whatever happens, the path holds the old bytes or the new ones.

    Raises DeploykitError when the file system refuses (full, read-only, no permission).
    """
    aside = path.with_name(path.name + PARTIAL)
    with translating_os_errors("write", path):
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
            fsync(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def why_not_writable(path: Path) -> str:
    """The reason why `write_file` cannot write `path`, as far as that can be known beforehand; empty when there is none.

    What stands there and is no plain file (a folder, a link, /dev/null) is not to be replaced by one.
    """
    try:
        if path.is_dir():
            return "it is a folder"
        if not path.parent.is_dir():
            return f"there is no folder {printable(path.parent)}"
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return "it is no plain file"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if os.access(path.parent, os.W_OK) else f"there is no right to write in {printable(path.parent)}"


def require_space(root: Path, needed: int) -> None:
    """Raise DeploykitError when the disk of `root`, which need not be there yet, has not so many bytes free and some to spare."""
    place = root
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if free < needed + _RESERVE_BYTES:
        why = f"{(needed + _RESERVE_BYTES) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        raise DeploykitError(f"there is too little space in {printable(root)}", why=why, fix="collect-garbage, or a larger disk")


@contextmanager
def directory(final: Path) -> Iterator[Path]:
    """Give an empty directory to fill; when the block ends without an exception, it becomes `final`.

    A directory that already stands at `final` is moved aside only after the new one is complete on disk, and then
    removed. On any exception, Ctrl-C included, what was written is removed and `final` is as it was before; only when
    the very last fsync fails has `final` changed already, and is complete.

    Raises DeploykitError when the file system refuses.
    """
    partial, stale = final.with_name(final.name + PARTIAL), final.with_name(final.name + STALE)
    with translating_os_errors("write", final):
        replacing = final.exists()
        remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            _fsync_tree(partial)
            if replacing:
                remove(stale)
                final.rename(stale)
            partial.rename(final)
            fsync(final.parent)
        except BaseException:
            remove(partial)
            if replacing and not final.exists():
                stale.rename(final)
            raise
        remove(stale)


def leftovers(root: Path) -> list[Path]:
    """What killed runs left in `root`: unfinished and superseded files and directories, sorted."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.name.endswith(UNFINISHED))


def remove(path: Path) -> None:
    """Remove a file or a whole directory if it is there. A link is removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold `root` for this process. The kernel drops the lock when the process dies, however it dies.

    Raises UsageError when `root` is a file, or another process, which it names, works there.
    """
    path, is_new = root / LOCK, not root.exists()
    with translating_os_errors("lock", path):
        if root.exists() and not root.is_dir():
            raise UsageError(f"{printable(root)} is a file, not a folder", fix="choose another folder with --output")
        root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"{printable(root)} is in use by another run ({file.read().strip() or 'unknown process'})",
                fix="wait for it, or choose another place with --output",
            ) from error
        with translating_os_errors("lock", path):
            os.ftruncate(file.fileno(), 0)
            # Not file.write: on a full disk it would keep the text and fail once more when the file is closed.
            os.write(file.fileno(), f"pid {os.getpid()}\n".encode())
        try:
            yield
        finally:
            if is_new and root.is_dir() and [found.name for found in root.iterdir()] == [LOCK]:
                remove(root)  # work that was refused before it wrote anything leaves nothing


def _fsync_tree(root: Path) -> None:
    """Every file, then every directory, deepest first, so that no name reaches the disk before what it names."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def fsync(path: Path) -> None:
    """Let what a file holds, or which names a folder has, be on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
