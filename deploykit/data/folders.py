"""A folder of pictures as an ordered set, with labels from the names of its sub-folders where they are asked for."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploykit.data.images import Images, first_problems, refuse_bad_images
from deploykit.data.pictures import EXTENSIONS, check_header
from deploykit.errors import DataError, like, printable

# The first bytes of JPEG, PNG, GIF and TIFF (and of the raw formats of cameras, which are TIFF).
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
# The brands of HEIC and AVIF in an ISO base media file (ISO/IEC 23008-12), which Pillow alone does not read.
_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif")


def folder(
    root: Path, *, classes: Sequence[str] = (), synsets: Sequence[str] = (), labelled: bool, skip_bad: bool = False
) -> Images:
    """All pictures below `root`, sorted by the bytes of their relative names.

    Only headers are read, so a file whose pixels are damaged is found by `Images.checked`. Hidden files and folders
    and files that are not pictures are ignored; a link to a folder, or to a file outside `root`, is a bad file.

    With `labelled`, the name of the first sub-folder says the class: `root/<class>/**/picture.jpg`. It is one of
    `classes` (exactly, or else without regard to case and with `_` for spaces), or the entry of `synsets`, such as
    n02012849, at the class's position; not every class needs a folder. Without `classes` the sorted names of the
    sub-folders are the classes, as in torchvision's ImageFolder.

    Raises DataError: a folder that is missing or cannot be read, no pictures in it, sub-folders that name no class or
    more than one, bad files (all of them in one error; with `skip_bad` they are left out and listed in `skipped`).
    """
    origin = printable(root)
    try:
        paths, bad = _find(root)
    except OSError as error:
        named = printable(error.filename or root)
        fix = like(root) if isinstance(error, FileNotFoundError) else ""
        raise DataError(
            f"cannot read the folder of images {named}", why=(error.strerror or str(error)).lower(), fix=fix
        ) from error
    if not paths and not bad:
        raise DataError(f"there are no images in {origin}", why=f"no file in it ends in {', '.join(EXTENSIONS)}")
    indices, known = _classes_of(root, paths, tuple(classes), tuple(synsets)) if labelled else ({}, ())
    good: list[Path] = []
    for path in paths:
        try:
            check_header(path)
        except DataError as error:
            bad.append(f"{_name(path, root)}: {error.why}")
        else:
            good.append(path)
    refuse_bad_images(bad, len(good) + len(bad), origin, skip_bad=skip_bad)
    return Images(
        names=tuple(_name(path, root) for path in good),
        labels=np.array([indices[_class_folder(path, root)] for path in good], np.int64) if labelled else None,
        classes=known,
        skipped=tuple(bad),
        origin=origin,
        sources=tuple(good),
    )


def _find(root: Path) -> tuple[list[Path], list[str]]:
    """(pictures in order, files that cannot be taken with their reasons). Raises OSError when a folder cannot be listed."""
    paths: list[Path] = []
    bad: list[str] = []
    for place, folders, files in os.walk(root, onerror=_raise):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (here / name for name in folders):
            if path.is_symlink():
                bad.append(f"{_name(path, root)}: it is a link to a folder")
        for path in (here / name for name in files if not name.startswith(".")):
            if path.suffix.lower() not in EXTENSIONS:
                if _looks_like_a_picture(path):
                    bad.append(f"{_name(path, root)}: it looks like a picture, but does not end in {', '.join(EXTENSIONS)}")
            elif objection := _objection(path, root):
                bad.append(f"{_name(path, root)}: {objection}")
            else:
                paths.append(path)
    return sorted(paths, key=lambda path: os.fsencode(path.relative_to(root))), sorted(bad)


def _objection(path: Path, root: Path) -> str:
    """Why a directory entry with a picture's name is not a file of this folder; empty when it is."""
    try:
        leaves = path.is_symlink() and not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # before Python 3.13 a RuntimeError
        return "it is a link that leads to itself"
    if leaves:
        return "it is a link that leaves the folder"
    if not path.is_file():
        return "it is not a regular file"  # a pipe would wait for a writer forever
    return ""


def _looks_like_a_picture(path: Path) -> bool:
    """Whether the first bytes are a picture's: a photograph must not be ignored for its name."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_SIGNATURES) or start[4:] in _BRANDS or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def _raise(error: OSError) -> None:
    """What os.walk is to do with a folder that it cannot list; left alone, it would pass it over in silence."""
    raise error


def _classes_of(
    root: Path, paths: Sequence[Path], classes: tuple[str, ...], synsets: tuple[str, ...]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """(class index of each sub-folder, class names). Raises DataError with all problems."""
    problems = [f"{_name(path, root)} lies in no sub-folder, so it has no class" for path in paths if path.parent == root]
    holding = {_class_folder(path, root) for path in paths if path.parent != root}
    indices: dict[str, int] = {}
    if classes:
        known = classes
        for name in sorted(holding, key=os.fsencode):
            found = _matching(name, classes, synsets)
            if len(found) == 1:
                indices[name] = found[0]
            else:
                problems.append(f"{printable(name)}/ {_misfit(found, classes, synsets)}")
        fix = f"name each sub-folder like one of the {len(classes)} classes ({_some(classes)})"
        fix += f" or by its synset ({_some(synsets)})" if synsets else ""
    else:
        folders = sorted((path.name for path in root.iterdir() if _is_class_folder(path)), key=os.fsencode)
        known = tuple(printable(name) for name in folders)
        indices = {name: index for index, name in enumerate(folders)}
        problems += [f"{printable(name)}/ holds no pictures" for name in folders if name not in holding]
        fix = "put the pictures of each class into one sub-folder with the class's name"
    if problems:
        raise DataError(f"cannot tell the classes of the images in {printable(root)}", problems=first_problems(problems), fix=fix)
    return indices, known


def _matching(name: str, classes: Sequence[str], synsets: Sequence[str]) -> list[int]:
    """The classes that a sub-folder's name may mean. Position or number of the sub-folders is never evidence."""
    exactly = [index for index, known in enumerate(classes) if known == name]
    loosely = [index for index, known in enumerate(classes) if _folded(known) == _folded(name)]
    return exactly or loosely or [index for index, synset in enumerate(synsets) if synset == name]


def _misfit(found: Sequence[int], classes: Sequence[str], synsets: Sequence[str]) -> str:
    if not found:
        return "is none of the model's classes"
    text = f"may be any of the classes {', '.join(f'{index} ({classes[index]})' for index in found)}"
    # ImageNet has two classes "crane", a bird and a machine, and two "maillot".
    return f"{text}: name it {' or '.join(synsets[index] for index in found)}" if synsets else text


def _folded(name: str) -> str:
    # NFC because macOS writes names decomposed.
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _class_folder(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0]


def _name(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())
