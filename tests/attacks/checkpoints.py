"""Hostile checkpoints: pickles that call, archives that lie, tensors that are not there, headers of safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from attacks.generate import Attack

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
WEIGHTS = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.zeros(2))


def attacks() -> Iterator[Attack]:
    for found in (_callers(), _opcodes(), _archives(), _tensors(), _bombs(), _streams(), _kinds(), _safetensors()):
        yield from found


def checkpoint(name: str, told: str, content: Callable[[Path], bytes], *, suffix: str = ".pth") -> Attack:
    """`content` gives the file's bytes; the path is of the marker that is to be touched."""

    def make(folder: Path, marker: Path) -> Path:
        path = folder / f"weights{suffix}"
        path.write_bytes(content(marker))
        return path

    return Attack(f"checkpoint-{name}", told, make, door="checkpoint")


# Pickles by hand: what Python's own pickler would not write.
def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle's operations that call module.name with texts."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR"


def proto2(operations: bytes) -> bytes:
    return b"\x80\x02" + operations + b"."


def zipped(data: bytes, *, records: Mapping[str, bytes] | None = None, root: str = "archive/") -> bytes:
    """An archive as torch.save writes it, around a pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}data.pkl", data)
        archive.writestr(f"{root}byteorder", b"little")
        for name, content in ({"data/0": bytes(24)} if records is None else records).items():
            archive.writestr(f"{root}{name}", content)
    return made.getvalue()


def saved(content: Any = WEIGHTS, *, legacy: bool = False) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, _use_new_zipfile_serialization=not legacy)
    return made.getvalue()


def streamed(operations: bytes, rest: bytes = b"") -> bytes:
    """The older format of torch.save around a pickle."""
    head = b"".join(pickle.dumps(one, protocol=2) for one in (MAGIC, VERSION, SYSTEM))
    return head + proto2(operations) + rest


def touching(marker: Path) -> bytes:
    return call("posix", "system", f"touch {marker}")


def _callers() -> Iterator[Attack]:
    """What a pickle can call to do something. All are refused by name, before anything is called."""
    yield checkpoint("system-in-archive", "it wants posix.system", lambda marker: zipped(proto2(touching(marker))))
    yield checkpoint("system-in-older-format", "it wants posix.system", lambda marker: streamed(touching(marker)))
    yield checkpoint("system-as-bare-pickle", "it wants posix.system", lambda marker: proto2(touching(marker)), suffix=".pkl")
    code = "__import__('os').system('touch {}')"
    names: dict[tuple[str, str], str] = {
        **dict.fromkeys([("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"), ("builtins", "__import__")], code),
        **dict.fromkeys([("os", "system"), ("nt", "system"), ("subprocess", "getoutput"), ("os", "popen")], "touch {}"),
        **dict.fromkeys([("pty", "spawn"), ("commands", "getoutput"), ("timeit", "timeit"), ("bdb", "Bdb.run")], code),
        **dict.fromkeys([("builtins", "getattr"), ("operator", "attrgetter"), ("functools", "partial")], "system"),
        **dict.fromkeys([("runpy", "run_path"), ("shutil", "rmtree"), ("pathlib", "Path.touch"), ("io", "open")], "{}"),
        **dict.fromkeys([("torch", "load"), ("torch.hub", "load"), ("torch.serialization", "load")], "{}"),
        **dict.fromkeys([("torch.utils.cpp_extension", "load_inline"), ("torch.jit", "load")], "{}"),
        **dict.fromkeys([("torch._utils", "os.system"), ("torch", "_utils.sys.modules")], "touch {}"),
        **dict.fromkeys([("torch.storage", "_load_from_bytes"), ("torch._C", "_jit_eval")], "{}"),
        **dict.fromkeys([("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("dill._dill", "_create_code")], "{}"),
        **dict.fromkeys([("cloudpickle", "loads"), ("joblib", "load"), ("marshal", "loads"), ("pickle", "loads")], "{}"),
        **dict.fromkeys([("importlib", "import_module"), ("ctypes", "CDLL"), ("socket", "create_connection")], "{}"),
    }
    for (module, name), argument in names.items():

        def content(marker: Path, module: str = module, name: str = name, argument: str = argument) -> bytes:
            return zipped(proto2(call(module, name, argument.replace("{}", str(marker)))))

        yield checkpoint(f"calls-{module}.{name}", "can run any code", content)
    yield checkpoint("whole-module", "torch.nn.modules.linear.Linear", lambda _: saved(torch.nn.Linear(2, 2)))
    yield checkpoint("class-made-by-newobj", "it wants posix.system", lambda m: zipped(proto2(b"cposix\nsystem\n)\x81")))
    yield checkpoint(
        "payload-beside-weights", "it wants posix.system", lambda marker: saved({"state_dict": WEIGHTS, "extra": _System(marker)})
    )
    yield checkpoint(
        "state-of-a-class", "it wants __main__.A", lambda m: zipped(proto2(b"c__main__\nA\n)\x81" + touching(m) + b"b"))
    )


class _System:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def _opcodes() -> Iterator[Attack]:
    """Operations by which scanners have been passed, and that torch.save does not write."""

    def of(name: str, operations: Callable[[Path], bytes]) -> Attack:
        return checkpoint(f"opcode-{name}", "damaged, or a pickle that torch.save did not write", operations)

    yield of("inst", lambda m: zipped(proto2(b"(" + text(f"touch {m}") + b"iposix\nsystem\n")))
    yield of("obj", lambda m: zipped(proto2(b"(" + text("posix") + text(f"touch {m}") + b"o")))
    yield of(
        "stack-global", lambda m: zipped(b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(f"touch {m}") + b"\x85R.")
    )
    yield of("extension-registry", lambda m: zipped(proto2(b"\x82\x01" + text(f"touch {m}") + b"\x85R")))
    yield of("persistent-text", lambda m: zipped(proto2(f"Ptouch {m}\n".encode())))
    yield of("newobj-with-keywords", lambda m: zipped(b"\x80\x04" + b"ccollections\nOrderedDict\n)}\x92."))
    yield of("frames", lambda m: zipped(pickle.dumps({"weight": 1}, protocol=5)))
    yield of("call-of-a-text", lambda m: zipped(proto2(text("posix.system") + b"(" + text(f"touch {m}") + b"tR")))
    yield of("call-of-a-tensor", lambda m: zipped(proto2(b"K\x01)R")))
    yield of("nothing-but-stop", lambda m: zipped(proto2(b"")))
    yield of("no-stop", lambda m: zipped(b"\x80\x02}"))
    yield of("mark-without-end", lambda m: zipped(proto2(b"t")))
    yield of("unknown-memo", lambda m: zipped(proto2(b"h\x07")))
    yield of("name-without-end", lambda m: zipped(b"\x80\x02c" + b"a" * (1 << 20)))
    yield of("text-longer-than-the-file", lambda m: zipped(b"\x80\x02X\xff\xff\xff\xff" + b"a."))
    yield of("items-of-a-number", lambda m: zipped(proto2(b"K\x01K\x02K\x03s")))
    yield of("storage-of-a-function", lambda m: zipped(proto2(_storage("collections\nOrderedDict"))))


def _storage(kind: str = "torch\nFloatStorage", key: str = "0", count: bytes = b"K\x06", view: bytes = b"") -> bytes:
    """A persistent id as torch writes it."""
    return b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text("cpu") + count + view + b"tQ"


def _tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", storage: bytes = b"") -> bytes:
    """{"w": a tensor}: the operations of torch._utils._rebuild_tensor_v2."""
    head = b"}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage or _storage())
    return head + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtRs"


def _long(value: int) -> bytes:
    content = value.to_bytes(12, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _tensors() -> Iterator[Attack]:
    """Tensors that would show memory which is not theirs, or would fill it."""

    def of(name: str, told: str, operations: bytes, **rest: Any) -> Attack:
        return checkpoint(f"tensor-{name}", told, lambda _: zipped(proto2(operations), **rest))

    yield of("beyond-its-storage", "beyond its storage of 6", _tensor(b"K\x07\x85", b"K\x01\x85"))
    yield of("beyond-by-stride", "beyond its storage", _tensor(b"K\x02\x85", b"M\xff\xff\x85"))
    yield of("beyond-by-offset", "beyond its storage", _tensor(b"K\x01\x85", b"K\x01\x85", b"K\x06"))
    yield of("negative-size", "did not write", _tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"))
    yield of("negative-stride", "did not write", _tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"))
    yield of("negative-offset", "did not write", _tensor(b"K\x02\x85", b"K\x01\x85", b"J\xf0\xff\xff\xff"))
    yield of("size-of-2-to-the-63", "beyond its storage", _tensor(_long(1 << 63) + b"\x85", b"K\x01\x85"))
    yield of("size-that-overflows", "beyond its storage", _tensor(_long(1 << 40) * 2 + b"\x86", b"K\x01K\x01\x86"))
    yield of("expanded-to-a-terabyte", "made to fill the memory", _tensor(_long(1 << 38) + b"\x85", b"K\x00\x85"))
    yield of("sizes-without-strides", "did not write", _tensor(b"K\x02\x85", b")"))
    yield of("size-of-text", "did not write", _tensor(text("2") + b"\x85", b"K\x01\x85"))
    yield of("size-of-float", "did not write", _tensor(b"G" + struct.pack(">d", 1e300) + b"\x85", b"K\x01\x85"))
    many = b"(" + b"K\x01" * 1000 + b"t"
    yield of("thousand-dimensions", "did not write", _tensor(many, many))
    yield of(
        "storage-longer-than-its-record",
        "has 24 bytes and not",
        _tensor(b"K\x01\x85", b"K\x01\x85", storage=_storage(count=b"K\x07")),
    )
    yield of("storage-of-negative-length", "did not write", _tensor(b")", b")", storage=_storage(count=b"J\xff\xff\xff\xff")))
    yield of("storage-of-2-to-the-62", "has 24 bytes and not", _tensor(b")", b")", storage=_storage(count=_long(1 << 62))))
    yield of("storage-that-is-missing", "data/7 is missing", _tensor(b")", b")", storage=_storage(key="7")))
    yield of("storage-outside-the-folder", "is missing", _tensor(b")", b")", storage=_storage(key="../../../etc/passwd")))
    yield of(
        "storage-seen-beyond-its-end",
        "did not write",
        _tensor(b")", b")", storage=_storage(view=b"(" + text("v") + b"K\x05K\x05t")),
    )
    yield of("no-weights", "holds no weights", b"}")
    yield of(
        "infinite",
        "NaN or infinite",
        _tensor(b"K\x06\x85", b"K\x01\x85"),
        records={"data/0": struct.pack("<6f", *[float("inf")] * 6)},
    )


def _bombs() -> Iterator[Attack]:
    """Small files that take for ever, or all memory, to read."""

    def of(name: str, told: str, content: Callable[[], bytes]) -> Attack:
        return checkpoint(f"bomb-{name}", told, lambda _: zipped(content()))

    yield of(
        "list-that-doubles-64-times",
        "nests its values|took more than",
        lambda: proto2(b"]q\x00" + b"".join(_doubled(i) for i in range(60))),
    )
    yield of("list-that-holds-itself", "nests its values", lambda: proto2(b"]q\x00h\x00a"))
    yield of("tuples-a-million-deep", "nests its values", lambda: proto2(b")" + b"\x85" * 1_000_000))
    yield of("key-a-million-deep", "holds no weights", lambda: proto2(b"})" + b"\x85" * 1_000_000 + b"K\x01s"))
    yield of("pickle-of-17-MB", "more than 16777216", lambda: proto2(b"N" * (17 << 20)))
    yield of("pickle-of-16-million-operations", "(took more than|damaged|nests)", lambda: proto2(b"(" + b"N" * (15 << 20) + b"t"))
    yield of("text-repeated", "nests its values", lambda: proto2(text("a" * 900) + b"q\x00](" + b"h\x00" * 500_000 + b"e"))
    yield of(
        "keys-of-one-hash",
        "(took more than|holds no weights|nests)",
        lambda: proto2(b"}(" + b"".join(map(_same_hash, range(1, 200_000))) + b"u"),
    )
    yield of(
        "memo-of-a-million",
        "holds no weights",
        lambda: proto2(b"}" + b"".join(b"r" + struct.pack("<I", i) for i in range(10**6))),
    )


def _same_hash(index: int) -> bytes:
    """A key and its value; Python hashes whole numbers modulo this prime."""
    return _long(index * ((1 << 61) - 1)) + b"N"


def _doubled(index: int) -> bytes:
    """A list that holds what was remembered last twice, and is remembered instead."""
    return b"](" + b"h" + bytes([index]) + b"h" + bytes([index]) + b"eq" + bytes([index + 1])


def _archives() -> Iterator[Attack]:
    """Zip files that say one thing in one place and another in the other."""

    def of(name: str, told: str, content: Callable[[], bytes]) -> Attack:
        return checkpoint(f"archive-{name}", told, lambda _: content())

    good = zipped(proto2(_tensor(b"K\x06\x85", b"K\x01\x85")))
    empty = proto2(b"}")
    for name in ("../../escaped", "/tmp/escaped", "..\\escaped", "a/../../escaped", "new\nline", "\x1b[2Jclear"):
        yield of(f"name-{name!r}", "is no name in the archive", lambda name=name: zipped(empty, records={name: b"x"}))
    yield of(
        "name-outside-the-folder",
        "is no name in the archive",
        lambda: _with(good, lambda a: a.writestr("elsewhere/data/0", b"x")),
    )
    yield of(
        "name-with-zero-byte",
        "is no name in the archive|damaged",
        lambda: zipped(empty, records={"a__b": b"x"}).replace(b"a__b", b"a\0_b"),
    )
    yield of("two-contents", "several checkpoints", lambda: _with(good, lambda a: a.writestr("other/data.pkl", empty)))
    yield of("content-twice", "several checkpoints", lambda: _twice(good, "archive/data.pkl"))
    yield of("record-twice", "is there twice", lambda: _twice(good, "archive/data/0"))
    yield of(
        "compressed-bomb",
        "is compressed",
        lambda: _with(good, lambda a: a.writestr("archive/data/1", bytes(50 << 20), zipfile.ZIP_DEFLATED)),
    )
    yield of("encrypted", "is encrypted", lambda: _patched_directory(good, 8, b"\x01\x08"))
    yield of("size-lies", "is said to have", lambda: _patched_directory(good, 24, struct.pack("<I", 1 << 30)))
    yield of("both-sizes-lie", "overlap|damaged", lambda: _patched_directory(good, 20, struct.pack("<2I", 1 << 30, 1 << 30)))
    yield of("offset-beyond-the-end", "damaged", lambda: _patched_directory(good, 42, struct.pack("<I", 1 << 30)))
    yield of("record-called-otherwise", "damaged|no name", lambda: good.replace(b"archive/data.pkl", b"archive/data.pk_", 1))
    yield of("records-overlap", "damaged|overlap", lambda: _overlapping())
    yield of("highest-byte-first", "highest byte first", lambda: good.replace(b"little", b"bigger"))
    yield of("without-end", "truncated or damaged", lambda: good[:-22])
    yield of("end-twice", "damaged|several|twice", lambda: good + good[-22:-2] + b"\xff\xff")
    yield of("hundred-thousand-records", "more than 100000", lambda: _many(100_001))
    yield of("no-checkpoint", "without a checkpoint", lambda: _with(b"", lambda a: a.writestr("readme.txt", "hello")))
    yield of(
        "checkpoint-in-a-checkpoint", "without a checkpoint", lambda: _with(b"", lambda a: a.writestr("x/weights.pth", good))
    )
    yield of("pickle-before-it", "did not write", lambda: proto2(b"}") + good)
    for kept in (0.03, 0.2, 0.5, 0.8, 0.97):
        yield of(f"cut-at-{kept}", "truncated|damaged", lambda kept=kept: saved()[: int(kept * len(saved()))])


def _with(content: bytes, add: Callable[[zipfile.ZipFile], object]) -> bytes:
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a") as archive:
        add(archive)
    return made.getvalue()


def _twice(content: bytes, name: str) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _with(content, lambda archive: archive.writestr(name, proto2(b"N")))


def _patched_directory(content: bytes, offset: int, value: bytes) -> bytes:
    """The first entry of the table of contents with other bytes at `offset` (APPNOTE 4.3.12)."""
    at = content.index(b"PK\x01\x02") + offset
    return content[:at] + value + content[at + len(value) :]


def _overlapping() -> bytes:
    """Every record of the table of contents begins where the first one does."""
    content = bytearray(zipped(proto2(b"}"), records={f"data/{index}": bytes(100) for index in range(50)}))
    at = content.index(b"PK\x01\x02")
    first = content[at + 42 : at + 46]
    while (at := content.find(b"PK\x01\x02", at + 1)) >= 0:
        content[at + 42 : at + 46] = first
    return bytes(content)


def _many(count: int) -> bytes:
    """An archive of so many empty records that share one header; zip64, because 65,535 is the most without."""
    local = b"PK\x03\x04" + struct.pack("<5H3L2H", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = b"PK\x01\x02" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    start, size = len(local), len(entry) * count
    end64 = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, start)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, start + size, 1)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + entry * count + end64 + locator + end


def _streams() -> Iterator[Attack]:
    """The format of before torch 1.6."""

    def of(name: str, told: str, content: Callable[[], bytes]) -> Attack:
        return checkpoint(f"older-{name}", told, lambda _: content())

    tensor = _tensor(b"K\x06\x85", b"K\x01\x85", storage=_storage(view=b"N"))
    keys = pickle.dumps(["0"], protocol=2)
    data = struct.pack("<q", 6) + bytes(24)
    yield of("another-magic-number", "did not write", lambda: pickle.dumps(7, protocol=2) + pickle.dumps(VERSION, protocol=2))
    yield of(
        "another-version", "version 999", lambda: b"".join(pickle.dumps(one, protocol=2) for one in (MAGIC, 999, SYSTEM, {}, []))
    )
    yield of("storage-cut", "truncated", lambda: streamed(tensor, keys + data[:-1]))
    yield of(
        "storage-longer-than-said", "another length", lambda: streamed(tensor, keys + struct.pack("<q", 1 << 60) + bytes(24))
    )
    yield of("storage-negative", "another length", lambda: streamed(tensor, keys + struct.pack("<q", -6) + bytes(24)))
    yield of("storage-missing", "is missing", lambda: streamed(tensor, pickle.dumps([], protocol=2)))
    yield of("storage-nobody-knows", "nothing says", lambda: streamed(tensor, pickle.dumps(["0", "1"], protocol=2) + data))
    yield of("keys-that-are-none", "which storages follow", lambda: streamed(tensor, pickle.dumps("0", protocol=2) + data))
    yield of(
        "code-in-the-keys", "it wants posix.system", lambda: streamed(tensor, proto2(call("posix", "system", "true")) + data)
    )
    yield of(
        "storage-of-a-terabyte",
        "truncated",
        lambda: streamed(_tensor(b")", b")", storage=_storage(count=_long(1 << 38), view=b"N")), keys + data),
    )
    for kept in (0.02, 0.3, 0.7, 0.99):
        yield of(
            f"cut-at-{kept}", "truncated|damaged", lambda kept=kept: saved(legacy=True)[: int(kept * len(saved(legacy=True)))]
        )


def _kinds() -> Iterator[Attack]:
    """What is no checkpoint at all, and what is no file."""

    def of(name: str, told: str, content: bytes, suffix: str = ".pth") -> Attack:
        return checkpoint(f"kind-{name}", told, lambda _: content, suffix=suffix)

    yield of("empty", "it is empty", b"")
    yield of("web-page", "web page", b"<!DOCTYPE html><html>")
    yield of("pointer-of-git-lfs", "git lfs pull", b"version https://git-lfs.github.com/spec/v1\n")
    yield of("text-pickle", "starts with", b"cposix\nsystem\n(S'true'\ntR.")
    yield of("zeros", "starts with", bytes(4096))
    yield of("tar", "starts with", b"storages".ljust(512, b"\0"))
    yield of("exported-program", "exported program", zipped(proto2(b"}")), ".pt2")
    members = {"serialized_exported_program.json": b"{}", "data/sample_inputs/model.pt": proto2(call("posix", "system", "true"))}
    yield of("exported-program-renamed", "exported program", zipped(proto2(b"}"), records=members), ".pt")
    yield of(
        "torchscript", "TorchScript", zipped(proto2(b"}"), records={"constants.pkl": proto2(b")"), "code/a.py": b"1"}), ".pt"
    )
    yield of("pickle-called-safetensors", "not safetensors", zipped(proto2(call("posix", "system", "true"))), ".safetensors")

    def pipe(folder: Path, _: Path) -> Path:
        os.mkfifo(folder / "pipe.pth")
        return folder / "pipe.pth"

    def endless(folder: Path, _: Path) -> Path:
        (folder / "endless.pth").symlink_to("/dev/zero")
        return folder / "endless.pth"

    yield Attack("checkpoint-kind-pipe", "it is not a file", pipe, door="checkpoint")
    yield Attack("checkpoint-kind-device", "it is not a file", endless, door="checkpoint")


def _safetensors() -> Iterator[Attack]:
    """huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON header, then numbers without holes."""

    def of(name: str, told: str, header: object, data: bytes = bytes(8), length: int | None = None) -> Attack:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        return checkpoint(f"safetensors-{name}", told, lambda _: struct.pack("<Q", size) + text + data, suffix=".safetensors")

    def entry(shape: list[int], start: int, end: int, kind: str = "F32", **more: object) -> dict[str, object]:
        return {"dtype": kind, "shape": shape, "data_offsets": [start, end], **more}

    yield of("header-of-2-to-the-63", "header is said", {}, length=1 << 63)
    yield of("header-longer-than-the-file", "header is said", {}, length=1000)
    yield of("header-of-17-MB", "header is said", b" " * (17 << 20))
    yield of("header-cut", "no JSON", b'{"a":')
    yield of("header-not-utf8", "no JSON", b'{"\xff": 1}')
    yield of("header-a-list", "lists no tensors", [])
    yield of("header-nested", "(nested too deep|no JSON)", b'{"a":' + b"[" * 200_000)
    yield of("name-twice", "there twice", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}')
    yield of("overlap", "overlap", {"a": entry([2], 0, 8), "b": entry([1], 4, 8)})
    yield of("hole", "overlap|between", {"a": entry([1], 4, 8)})
    yield of("something-behind", "end at byte 4 of 8", {"a": entry([1], 0, 4)})
    yield of("beyond-the-end", "end at byte", {"a": entry([4], 0, 16)})
    yield of("negative-offset", "shape or place", {"a": entry([2], -8, 0)})
    yield of("backwards", "its shape wants", {"a": entry([2], 8, 0)})
    yield of("shape-that-overflows", "its shape wants", {"a": entry([1 << 62, 4], 0, 8)})
    yield of("negative-shape", "shape or place", {"a": entry([-2], 0, 8)})
    yield of("shape-of-floats", "shape or place", {"a": entry([2.0], 0, 8)})  # type: ignore[list-item]
    yield of("shape-of-truth", "shape or place", {"a": entry([True, 2], 0, 8)})
    yield of("thousand-dimensions", "shape or place", {"a": entry([1] * 1000, 0, 4)})
    yield of("another-shape", "its shape wants 12", {"a": entry([3], 0, 8)})
    yield of("unknown-type", "not known", {"a": entry([2], 0, 8, "F999")})
    yield of("type-that-is-no-text", "not known", {"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}})
    yield of("more-than-a-tensor", "not described", {"a": entry([2], 0, 8, code="x")})
    yield of("infinite", "NaN or infinite", {"a": entry([2], 0, 8)}, struct.pack("<2f", float("nan"), float("inf")))
    yield checkpoint("safetensors-empty", "header is said", lambda _: b"", suffix=".safetensors")
