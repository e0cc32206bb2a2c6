"""Bundles as somebody would make them who means harm: one for each trick, made out of a good one.

usage: python tests/hostile_bundles.py GOOD.bundle FOLDER        writes them all, and prints how many there are
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

MANIFEST, SIGNATURE = "bundle.json", "bundle.json.sig"
Entries = dict[str, bytes]


@dataclass(frozen=True)
class Hostile:
    """One bundle and whether only a signature gives it away: then it is refused where signers are known."""

    name: str
    path: Path
    is_about_signing: bool = False


def entries_of(bundle: Path) -> Entries:
    """The entries of a good bundle, in order."""
    with zipfile.ZipFile(bundle) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(entries: Mapping[str, bytes] | list[tuple[Any, bytes]], *, method: int = zipfile.ZIP_STORED) -> bytes:
    """Any names and attributes, as the standard library writes them without asking."""
    out = io.BytesIO()
    pairs = list(entries.items()) if isinstance(entries, Mapping) else entries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, content in pairs:
                info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
                info.compress_type = method
                archive.writestr(info, content)
    return out.getvalue()


def all_of(good: Path, folder: Path, trusted: Path | None = None) -> list[Hostile]:
    """Write every hostile bundle into `folder`; `trusted` is the private key of a signer who is allowed to sign, but not this."""
    entries = entries_of(good)
    found = [*_zips(entries, good.read_bytes()), *_manifests(entries), *_blobs(entries), *_graphs(entries)]
    made = []
    for name, content in found:
        path = folder / f"{name.replace(' ', '-')}.bundle"
        path.write_bytes(content)
        made.append(Hostile(name, path))
    for name, content in _signatures(entries, folder, trusted):
        path = folder / f"{name.replace(' ', '-')}.bundle"
        path.write_bytes(content)
        made.append(Hostile(name, path, is_about_signing=True))
    return made + _folders(entries, folder)


def _entry(name: str, mode: int = 0o100644, **attributes: Any) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def _zips(entries: Entries, whole: bytes) -> list[tuple[str, bytes]]:
    pairs = [(_entry(name), content) for name, content in entries.items()]
    (first, content), *_ = list(entries.items())
    blob = next(name for name in entries if name.startswith("blobs/"))
    names = {
        "path escape": "../evil",
        "path escape inside blobs": "blobs/../../evil",
        "absolute path": "/tmp/evil",
        "windows path escape": "..\\evil",
        "windows drive": "C:evil",
        "unc path": "\\\\host\\share",
        "hidden name": ".profile",
        "name like an option": "-rf",
        "name with a line break": "a\nb",
        "name with another direction of writing": "a\u202egnp.exe",
        "empty name": "",
        "very long name": "a" * 5000,
        "case twin of the manifest": MANIFEST.upper(),
        "case twin of a blob": blob.upper(),
        "a file that is also a folder": f"{blob}/inside",
        "extra file": "blobs/" + "0" * 64,
    }
    found = [(name, zipped([*pairs, (_entry(entry), b"evil")])) for name, entry in names.items()]
    modes = {"symlink": stat.S_IFLNK, "device file": stat.S_IFCHR, "block device": stat.S_IFBLK, "fifo": stat.S_IFIFO}
    for name, mode in {**modes, "socket": stat.S_IFSOCK}.items():
        kept = [(_entry(path, mode | 0o777 if path == blob else 0o100644), held) for path, held in entries.items()]
        found.append((f"{name} in the zip", zipped(kept)))
    end = whole[-22:]
    count, length, start = struct.unpack_from("<HLL", end, 10)
    found += [
        ("manifest twice", zipped([*pairs, (_entry(first), content)])),
        ("another manifest twice", zipped([(_entry(first), b"{}"), *pairs])),
        ("blob twice", zipped([*pairs, (_entry(blob), b"other")])),
        ("folder entry", zipped([*pairs, (_entry("blobs/", 0o040755), b"")])),
        ("compressed", zipped(entries, method=zipfile.ZIP_DEFLATED)),
        ("compression bomb", zipped({**entries, blob: bytes(50 << 20)}, method=zipfile.ZIP_DEFLATED)),
        ("count bomb", zipped({**entries, **{f"blobs/{number:064x}": b"" for number in range(9000)}})),
        ("count lie", whole[:-22] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, length, start, 0)),
        ("directory lie", whole[:-22] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, length, 0, 0)),
        ("directory that is huge", whole[:-22] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, 0xFFFFFFFE, 0, 0)),
        ("trailing data", whole + b"#!/bin/sh\n"),
        ("leading data", b"#!/bin/sh\n" + whole),
        ("comment", whole[:-2] + struct.pack("<H", 4) + b"evil"),
        ("cut after the manifest", whole[: len(content) + 40]),
        ("cut in half", whole[: len(whole) // 2]),
        ("last byte missing", whole[:-1]),
        ("first byte missing", whole[1:]),
        ("empty file", b""),
        ("garbage", b"\x00\xff" * 5000),
        ("only an end", whole[-22:]),
        ("a tar file", b"bundle.json".ljust(257, b"\0") + b"ustar\0" + bytes(2000)),
    ]
    tars = {"hard link": tarfile.LNKTYPE, "symlink": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    found += [(f"a tar file with a {name}", _tarred(entries, blob, kind)) for name, kind in tars.items()]
    found.append(("a tar file with a path escape", _tarred({**entries, "../../evil": b"evil"}, "", tarfile.REGTYPE)))
    found.append(("compressed by gzip", gzip.compress(whole, mtime=0)))
    gap = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, length, start + 4, 0)
    found.append(("gap before the directory", whole[:start] + b"evil" + whole[start:-22] + gap))
    found += [("directory in another order", _reordered(whole, start, length))]
    found += _headers(whole, first, content, start)
    return found


def _tarred(entries: Entries, special: str, kind: bytes) -> bytes:
    """The same files as a tar, the one called `special` as something else than a file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            if name == special:
                info.type, info.linkname = kind, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _reordered(whole: bytes, start: int, length: int) -> bytes:
    """The third entry of the directory before the second; every entry itself is as it was."""
    directory, parts = whole[start : start + length], []
    while directory:
        size = 46 + struct.unpack_from("<H", directory, 28)[0]
        parts.append(directory[:size])
        directory = directory[size:]
    parts[1], parts[2] = parts[2], parts[1]
    return whole[:start] + b"".join(parts) + whole[start + length :]


def _headers(whole: bytes, first: str, content: bytes, start: int) -> list[tuple[str, bytes]]:
    """One field of the first entry's headers changed: at its own place (offset 0), or in the directory (offset `start`)."""

    def changed(at: int, form: str, value: Any) -> bytes:
        made = bytearray(whole)
        struct.pack_into(form, made, at, value)
        return bytes(made)

    second = start + 46 + len(first)
    return [
        ("name differs at its place", changed(30, "1s", b"B")),
        ("size lie at its place", changed(22, "<L", len(content) + 1)),
        ("size lie in the directory", changed(start + 24, "<L", len(content) + 1)),
        ("packed size lie", changed(start + 20, "<L", 1)),
        ("size of four gigabytes", changed(start + 24, "<L", 0xFFFFFFFF)),
        ("encrypted", changed(start + 8, "<H", 1)),
        ("size comes later", changed(6, "<H", 8)),
        ("method differs at its place", changed(8, "<H", 8)),
        ("extra field", changed(start + 30, "<H", 4)),
        ("entry on another disk", changed(start + 34, "<H", 1)),
        ("overlapping entries", changed(second + 42, "<L", 0)),
        ("entry behind the end", changed(second + 42, "<L", 0xFFFFFFF0)),
    ]


def _manifests(entries: Entries) -> list[tuple[str, bytes]]:
    good = json.loads(entries[MANIFEST])
    path = next(iter(good["portable"]))

    def canonical(value: Any) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()

    def renamed(name: str) -> bytes:
        files = {name if key == path else key: blob for key, blob in good["portable"].items()}
        return canonical(identified({**good, "portable": files}))

    text = entries[MANIFEST].decode()
    reordered = {key: good[key] for key in reversed(list(good))}
    of_one = {**good["portable"][path]}
    names = {
        "path escape": "../../evil",
        "absolute path": "/tmp/evil",
        "dots in the middle": "models/../../../evil",
        "a single dot": "./classes.json",
        "doubled slash": "models//x",
        "slash at the end": "models/",
        "backslash": "..\\evil",
        "authorized keys": ".ssh/authorized_keys",
        "an option": "--checkpoint-action=exec",
        "NUL": "a\0b",
        "another direction of writing": "a\u202eb",
        "two spellings": "cafe\u0301",
        "very deep": "/".join("abcdefghijkl"),
        "very long": "a" * 5000,
        "empty": "",
        "case twin": "DEVICE.PYZ",
        "a file as a folder": "device.pyz/evil",
    }
    found = [(f"manifest with {name}", renamed(entry)) for name, entry in names.items()]

    def with_blob(**values: Any) -> bytes:
        return canonical(identified({**good, "portable": {**good["portable"], path: {**of_one, **values}}}))

    found += [
        ("manifest re-ordered", (json.dumps(reordered, indent=1) + "\n").encode()),
        ("manifest with a key twice", text.replace('"release":', '"release": 999,\n "release":', 1).encode()),
        ("manifest with a space too many", text.replace(": ", ":  ", 1).encode()),
        ("manifest with an unknown key", canonical({**good, "run": "rm -rf /"})),
        ("manifest with another identity", canonical({**good, "id": "0" * 64})),
        ("manifest of a later schema", canonical({**good, "schema": 2})),
        ("manifest with a size that lies", with_blob(bytes=of_one["bytes"] + 1)),
        ("size bomb", with_blob(bytes=2**39)),
        ("size beyond all", with_blob(bytes=2**70)),
        ("size below nothing", with_blob(bytes=-1)),
        ("size as text", with_blob(bytes="12")),
        ("manifest with another digest", with_blob(sha256="0" * 64)),
        ("digest that is a path", with_blob(sha256="../../../../etc/passwd")),
        ("digest in capitals", with_blob(sha256=of_one["sha256"].upper())),
        ("manifest with too many files", canonical(identified({**good, "portable": {f"f{n}": of_one for n in range(5000)}}))),
        ("manifest that is huge", canonical({**good, "gate": ["x" * (5 << 20)]})),
        ("manifest that is deep", b'{"schema": 1, "gate": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("manifest with a number of thousands of digits", text.replace('"schema": 1', f'"schema": {"9" * 10_000}').encode()),
        ("manifest with NaN", text.replace('"schema": 1', '"schema": NaN').encode()),
        ("manifest that is a list", b"[]\n"),
        ("manifest that is empty", b""),
        ("manifest in UTF-16", text.encode("utf-16")),
        ("manifest with a byte order mark", b"\xef\xbb\xbf" + text.encode()),
        ("release below nothing", canonical(identified({**good, "release": -1}))),
        ("release that is true", canonical(identified({**good, "release": True}))),
        ("release with a fraction", canonical(identified({**good, "release": 1.5}))),
        ("release as text", canonical(identified({**good, "release": "9"}))),
        ("name that is a path", canonical(identified({**good, "name": "../evil"}))),
        ("gate that is none", canonical(identified({**good, "gate": ["drop table"]}))),
        ("gate of another kind", canonical(identified({**good, "gate": ["drop <= 0.5 points"]}))),
    ]
    return [(name, zipped({**entries, MANIFEST: content})) for name, content in found]


def identified(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the identity that belongs to its content: the attacker knows how to compute it."""
    parts = {key: manifest[key] for key in ("schema", "name", "gate", "portable")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {**manifest, "id": hashlib.sha256(text.encode()).hexdigest()}


def with_file(entries: Entries, path: str, content: bytes) -> Entries:
    """A consistent bundle with other content at one path; only a signature could tell."""
    manifest = json.loads(entries[MANIFEST])
    digest = hashlib.sha256(content).hexdigest()
    old = manifest["portable"].get(path)
    manifest["portable"][path] = {"sha256": digest, "bytes": len(content)}
    text = json.dumps(identified(manifest), sort_keys=True, indent=1) + "\n"
    kept = {name: held for name, held in entries.items() if old is None or name != f"blobs/{old['sha256']}"}
    return {**kept, MANIFEST: text.encode(), f"blobs/{digest}": content}


def _blobs(entries: Entries) -> list[tuple[str, bytes]]:
    manifest = json.loads(entries[MANIFEST])
    found = []
    for path in ("device.pyz", "classes.json", next(name for name in manifest["portable"] if name.endswith(".onnx"))):
        entry = f"blobs/{manifest['portable'][path]['sha256']}"
        content = bytearray(entries[entry])
        content[len(content) // 2] ^= 1
        kept = {name: held for name, held in entries.items() if name != entry}
        plain = path.replace("/", " ")
        found += [
            (f"{plain} changed by one bit", zipped({**entries, entry: bytes(content)})),
            (f"{plain} missing", zipped(kept)),
            (f"{plain} cut short", zipped({**entries, entry: entries[entry][:-1]})),
        ]
    zipapp = f"blobs/{manifest['portable']['device.pyz']['sha256']}"
    found.append(("zipapp replaced", zipped({**entries, zipapp: evil_zipapp(Path("/tmp/evil"))})))
    return found


def evil_zipapp(marker: Path) -> bytes:
    """A device half that leaves a file when it is run."""
    return zipped({"__main__.py": f"open({str(marker)!r}, 'w')\n".encode()})


def _graphs(entries: Entries) -> list[tuple[str, bytes]]:
    path = next(name for name in json.loads(entries[MANIFEST])["portable"] if name.endswith(".onnx"))
    locations = {
        "outside data": "../../../../etc/passwd",
        "absolute outside data": "/etc/passwd",
        "data beside it": "weights.bin",
        "data with NUL": "ok\0x",
        "data nowhere": "",
    }
    found = [(f"graph with {name}", graph(location)) for name, location in locations.items()]
    found.append(("graph with outside data in a node", graph("/etc/passwd", inside=True)))
    found += [("graph that is garbage", b"\xff" * 100), ("graph that is empty", b""), ("graph that is a pickle", b"\x80\x04c")]
    made = [(name, zipped(with_file(entries, path, content))) for name, content in found]
    hidden = path.replace("model.onnx", "model.bin")
    return [*made, ("graph under another name", zipped(with_file(entries, hidden, graph("/etc/passwd"))))]


def graph(location: str, *, inside: bool = False) -> bytes:
    """An ONNX file with a constant whose data lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Constant", [], ["y"], value=tensor) if inside else helper.make_node("Identity", ["w"], ["y"])
    made = helper.make_graph([node], "g", [], [value], [] if inside else [tensor])
    return bytes(helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)]).SerializeToString())


def _signatures(entries: Entries, folder: Path, trusted: Path | None) -> list[tuple[str, bytes]]:
    plain = {name: content for name, content in entries.items() if name != SIGNATURE}
    key = folder / "mallory"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mallory", "-f", str(key)], check=True)

    def signed(content: bytes, namespace: str = "deploykit-bundle@v1", by: Path = key) -> bytes:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(by)]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout

    replaced = with_file(entries, "device.pyz", evil_zipapp(Path("/tmp/evil")))
    newer = json.loads(entries[MANIFEST])
    newer["release"] += 1000
    newer_text = (json.dumps(newer, sort_keys=True, indent=1) + "\n").encode()
    found = {
        "unsigned": plain,
        "wrong signer": {**entries, SIGNATURE: signed(entries[MANIFEST])},
        "wrong namespace": {**entries, SIGNATURE: signed(entries[MANIFEST], "git", trusted or key)},
        "signature of another manifest": replaced,
        "signature by another over another manifest": {**replaced, SIGNATURE: signed(replaced[MANIFEST])},
        "release number raised": {**entries, MANIFEST: newer_text},
        "signature that is garbage": {
            **entries,
            SIGNATURE: b"-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n",
        },
        "signature that is empty": {**entries, SIGNATURE: b""},
        "signature that is huge": {**entries, SIGNATURE: b"A" * (1 << 20)},
        "signature that is cut": {**entries, SIGNATURE: entries.get(SIGNATURE, b"")[:100]},
    }
    return [(name, zipped(content)) for name, content in found.items()]


def _folders(entries: Entries, folder: Path) -> list[Hostile]:
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    blob = next(name for name in entries if name.startswith("blobs/"))
    (outside / "blob").write_bytes(entries[blob])
    (outside / "bundle.json").write_bytes(entries[MANIFEST])

    def link(to: str) -> Callable[[Path], None]:
        def change(place: Path) -> None:
            (place / to).unlink()
            (place / to).symlink_to(outside / ("blob" if to == blob else "bundle.json"))

        return change

    def hard(place: Path) -> None:
        (place / blob).unlink()
        os.link(outside / "blob", place / blob)

    def linked_folder(place: Path) -> None:
        shutil.move(place / "blobs", outside / f"{place.name}-blobs")
        (place / "blobs").symlink_to(outside / f"{place.name}-blobs")

    def fifo(place: Path) -> None:
        (place / blob).unlink()
        os.mkfifo(place / blob)

    def device(place: Path) -> None:
        (place / blob).unlink()
        os.mknod(place / blob, stat.S_IFCHR | 0o666, os.makedev(1, 5))

    def socket_file(place: Path) -> None:
        (place / blob).unlink()
        os.mknod(place / blob, stat.S_IFSOCK | 0o666)

    changes: dict[str, Callable[[Path], None]] = {
        "folder with a link out": link(blob),
        "folder with a linked manifest": link(MANIFEST),
        "folder with a hard link out": hard,
        "folder with a linked folder": linked_folder,
        "folder with a fifo": fifo,
        "folder with a fifo as manifest": lambda place: ((place / MANIFEST).unlink(), os.mkfifo(place / MANIFEST))[1],
        "folder with a link to a device": lambda place: ((place / blob).unlink(), (place / blob).symlink_to("/dev/zero"))[1],
        "folder with a hidden file": lambda place: (place / ".profile").write_text("evil") and None,
        "folder with an odd name": lambda place: Path(os.fsdecode(bytes(place) + b"/\xff\xfe")).write_text("x") and None,
        "folder with an extra file": lambda place: (place / "run.sh").write_text("evil") and None,
        "folder with a socket": socket_file,
        **({"folder with a device file": device} if os.geteuid() == 0 else {}),  # only root may make one
        "folder without a manifest": lambda place: (place / MANIFEST).unlink(),
        "folder with a blob missing": lambda place: (place / blob).unlink(),
    }
    made = []
    for name, change in changes.items():
        place = folder / name.replace(" ", "-")
        for entry, content in entries.items():
            (place / entry).parent.mkdir(parents=True, exist_ok=True)
            (place / entry).write_bytes(content)
        change(place)
        made.append(Hostile(name, place))
    return made


if __name__ == "__main__":
    written = all_of(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(f"{len(written)} hostile bundles in {sys.argv[2]}\n")
