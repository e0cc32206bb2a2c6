"""Hostile pictures: bombs, files that are something else, links and pipes, and sizes that are not there."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from attacks.generate import Attack

_PNG = b"\x89PNG\r\n\x1a\n"


def attacks() -> Iterator[Attack]:
    for found in (_bombs(), _others(), _cut(), _no_files(), _classes()):
        yield from found


def picture(name: str, told: str, content: Callable[[], bytes], suffix: str = ".png") -> Attack:
    def make(folder: Path, _: Path) -> Path:
        (folder / f"photo{suffix}").write_bytes(content())
        return folder

    return Attack(f"picture-{name}", told, make, door="picture")


def encoded(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """An honest picture."""
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(out, kind)
    return out.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes = bytes(100)) -> bytes:
    """A PNG with the header of such a picture and `pixels` for all of it."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return _PNG + header + _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")


def _bombs() -> Iterator[Attack]:
    def of(name: str, content: Callable[[], bytes], suffix: str = ".png") -> Attack:
        return picture(
            f"bomb-{name}", "50,000,000|cannot be read|damaged|truncated|not a picture|broken|too long", content, suffix
        )

    yield of("png-20000", lambda: png(20_000, 20_000))
    yield of("png-of-400-million-real-pixels", lambda: png(20_000, 20_000, bytes(20_001 * 20_000)))
    yield of("png-just-above", lambda: png(10_000, 5_001))
    yield of("png-2-to-the-31", lambda: png((1 << 31) - 1, (1 << 31) - 1))
    yield of("png-one-line", lambda: png((1 << 31) - 1, 1))
    yield of("bmp", lambda: _bmp(60_000, 60_000), ".bmp")
    yield of("bmp-upside-down", lambda: _bmp(60_000, -60_000), ".bmp")
    yield of("bmp-run-length", lambda: _bmp(60_000, 60_000, compression=1), ".bmp")
    yield of("ppm", lambda: b"P6 100000 100000 255\n" + bytes(30), ".ppm")
    yield of("ppm-of-many-digits", lambda: b"P6 " + b"9" * 5000 + b" 9 255\n", ".ppm")
    yield of("gif-screen", lambda: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + _gif_frame(65_535), ".gif")
    yield of("gif-frame", lambda: b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + _gif_frame(65_535), ".gif")
    yield of("jpeg", lambda: _jpeg(65_500, 65_500), ".jpg")
    yield of("tiff", lambda: _tiff(1 << 20, 1 << 20), ".tif")
    yield of("tiff-2-to-the-32", lambda: _tiff((1 << 32) - 1, (1 << 32) - 1), ".tif")


def _bmp(width: int, height: int, compression: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8 if compression else 24, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 8, 0, 0, 54) + head + bytes(8)


def _gif_frame(side: int) -> bytes:
    return b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00\x3b"


def _jpeg(width: int, height: int) -> bytes:
    content = bytearray(encoded("JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def _tiff(width: int, height: int) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 8)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(entries)) + table + bytes(4)


def _others() -> Iterator[Attack]:
    """What is no picture, or one of a format that other programs are started for."""
    told = "not a picture|cannot be read|no picture|empty|starts with|damaged|truncated"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch marker) (w) file\nshowpage\n"
    contents = {
        "empty": b"",
        "web-page": b"<!DOCTYPE html><title>404</title>",
        "postscript": script,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "zip": b"PK\x03\x04" + bytes(100),
        "pickle": b"cposix\nsystem\n(S'touch marker'\ntR.",
        "zeros": bytes(1 << 16),
        "pointer-of-git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "movie": b"\0\0\0\x18ftypmp42" + bytes(100),
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "fits": b"SIMPLE  =                    T" + bytes(2880),
        "icon": b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + bytes(50),
    }
    for name, content in contents.items():
        yield picture(f"is-{name}", told, lambda content=content: content, ".jpg")
    yield picture("float-pixels", "float|range", lambda: b"Pf 2 2 -1.0\n" + bytes(16), ".ppm")


def _cut() -> Iterator[Attack]:
    told = "truncated|damaged|cannot be read|not a picture|broken|could not create decoder"
    for kind, suffix in (
        ("JPEG", ".jpg"),
        ("PNG", ".png"),
        ("WEBP", ".webp"),
        ("GIF", ".gif"),
        ("TIFF", ".tif"),
        ("BMP", ".bmp"),
    ):
        for kept in (0.1, 0.6):
            yield picture(
                f"{kind.lower()}-cut-at-{kept}",
                told,
                lambda kind=kind, kept=kept: (whole := encoded(kind))[: int(kept * len(whole))],
                suffix,
            )


def _no_files() -> Iterator[Attack]:
    def of(name: str, told: str, prepare: Callable[[Path], object]) -> Attack:
        def make(folder: Path, _: Path) -> Path:
            prepare(folder / "photo.jpg")
            return folder

        return Attack(f"picture-{name}", told, make, door="picture")

    yield of("pipe", "not a regular file", os.mkfifo)
    yield of("folder", "no images|not a regular file", lambda path: path.mkdir())
    yield of("link-to-a-device", "leaves the folder", lambda path: path.symlink_to("/dev/zero"))
    yield of("link-to-a-secret", "leaves the folder", lambda path: path.symlink_to("/etc/passwd"))
    yield of("link-to-itself", "leads to itself", lambda path: path.symlink_to(path))
    yield of("linked-folder", "link to a folder", lambda path: (path.parent / "more").symlink_to("/"))
    yield of("socket", "not a regular file", _socket)


def _socket(path: Path) -> None:
    import socket

    # The name of a socket has at most 108 bytes, and test folders are deep.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def _classes() -> Iterator[Attack]:
    """Labels are the names of folders: those that are no class of the network, or mean to look like one."""
    names = {
        "unknown": "wasp",
        "escape-sequence": "\x1b[2Jant",
        "other-direction": "\u202etna",
        "no-width": "an\u200bt",
        "look-alike": "\u0430nt",
        "line-break": "ant\nbee",
        "not-utf8": os.fsdecode(b"\xff\xfe"),
        "number": "0",
        "option": "--ant",
        "very-long": "a" * 250,
    }
    for name, called in names.items():

        def make(folder: Path, _: Path, called: str = called) -> Path:
            for place in ("ant", "bee", called):
                (folder / place).mkdir()
                (folder / place / "a.png").write_bytes(encoded("PNG", (8, 8)))
            return folder

        yield Attack(f"classes-{name}", "is none of the model's classes", make, door="classes")
    yield Attack("classes-none", "lies in no sub-folder", lambda folder, _: _loose(folder), door="classes")


def _loose(folder: Path) -> Path:
    (folder / "a.png").write_bytes(encoded("PNG", (8, 8)))
    return folder
