"""The directory of a zip file that torch.save wrote: names and places of its records, and nothing unpacked."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from deploykit.intake.refused import Refused

_MOST_RECORDS = 100_000
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # PKWARE APPNOTE 6.3.10, section 4.3.7
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED, _UTF_8 = 0x1, 0x800
# What torch.jit.save and torch.export.save add, and torch.save does not.
_TORCHSCRIPT, _PROGRAM = "constants.pkl", frozenset({"archive_format", "serialized_exported_program.json"})


@dataclass(frozen=True)
class Record:
    """One file in the archive: its bytes lie in the archive from `start` on."""

    start: int
    size: int


def records(file: BinaryIO) -> Mapping[str, Record]:
    """The records by their names, without the folder that holds them all; all are stored as they are, side by side.

    Raises Refused for an archive that is damaged, compressed or encrypted, whose names leave the folder or are there twice,
    whose records overlap, or which is a program and no checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, EOFError, RuntimeError) as error:
        # zipfile itself raises UnicodeDecodeError (a ValueError) and others for damaged tables of contents.
        raise Refused(f"truncated or damaged: {_line(error)}") from error
    names = [info.filename for info in listed]
    _refuse_programs({name.rpartition("/")[2] for name in names})
    root = _root(names)
    problems = [problem for info in listed if (problem := _objection(info, root))]
    problems += [f"{name!r} is there twice" for name, times in Counter(names).items() if times > 1]
    if problems:
        raise Refused("torch.save writes no such archive", problems=[*problems[:10], *["..."] * (len(problems) > 10)])
    found = {info.filename.removeprefix(root): Record(_start(file, info), info.file_size) for info in listed}
    _refuse_overlaps(list(found.values()), end)
    return found


def _refuse_programs(members: set[str]) -> None:
    if _TORCHSCRIPT in members:
        kind = "a TorchScript archive"
    elif members & _PROGRAM:
        kind = "an exported program (.pt2)"
    else:
        return
    fix = "save the network's weights: torch.save(model.state_dict(), FILE), and name the network's code"
    fix += "; or let it run, if you trust it: --trust" * (_TORCHSCRIPT in members)
    raise Refused(
        f"it is {kind}: a finished program, which deploykit would have to run", told="cannot take weights from {}", fix=fix
    )


def _root(names: Sequence[str]) -> str:
    """The folder of `data.pkl`, which torch.save calls like the file and which holds everything."""
    if len(names) > _MOST_RECORDS:
        raise Refused(f"it has {len(names)} records, more than {_MOST_RECORDS}")
    found = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
    if not found:
        raise Refused("it is a zip archive without a checkpoint in it")
    if len(found) > 1 or found[0].count("/") > 1:
        raise Refused("it is a zip archive with several checkpoints in it, or one that torch.save did not write")
    return found[0]


def _objection(info: zipfile.ZipInfo, root: str) -> str:
    name = info.filename
    parts = name.split("/")
    # orig_filename: zipfile cuts a name at its first zero byte, other readers may not.
    inner = name.removeprefix(root)
    if inner == name or not inner.isprintable() or "\\" in name or name != info.orig_filename or {"", "..", "."} & {*parts}:
        return f"{info.orig_filename!r} is no name in the archive's folder {root!r}"
    if info.flag_bits & _ENCRYPTED:
        return f"{name!r} is encrypted"
    if info.compress_type != zipfile.ZIP_STORED:
        return f"{name!r} is compressed, {info.compress_size} bytes to {info.file_size}"
    if info.compress_size != info.file_size:
        return f"{name!r} is said to have {info.file_size} bytes and to take {info.compress_size}"
    return ""


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, by the header that stands before them: the table of contents does not say it."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_SIGNATURE):
        raise Refused(f"damaged: there is no record {info.filename!r} where the table of contents says")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if file.read(name_length) != info.filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437"):
        raise Refused(f"damaged: the record {info.filename!r} has another name in the table of contents")
    return info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _refuse_overlaps(found: Sequence[Record], end: int) -> None:
    """Overlapping records are how a small archive holds much."""
    before = 0
    for record in sorted(found, key=lambda record: (record.start, record.size)):
        if record.start < before or record.start + record.size > end:
            raise Refused("damaged: its records overlap, or reach beyond the archive's end")
        before = record.start + record.size


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
