"""Hostile ONNX files: data in other people's files, shapes that are not there, bombs, and broken protobuf."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attacks.generate import Attack

OPSETS = [helper.make_opsetid("", 19)]
SECRET = "secret.bin"


def attacks() -> Iterator[Attack]:
    for found in (_external(), _shapes(), _bombs(), _functions(), _operators(), _wire()):
        yield from found


def graph(name: str, told: str, content: Callable[[], bytes]) -> Attack:
    def make(folder: Path, _: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(content())
        return path

    return Attack(f"graph-{name}", told, make, door="graph")


def model(nodes: Sequence[onnx.NodeProto] = (), constants: Sequence[onnx.TensorProto] = (), **more: Any) -> onnx.ModelProto:
    """x (n, 3) + w -> y (n, 3), after `nodes`, which are there and used by nobody."""
    weight = numpy_helper.from_array(np.ones((1, 3), np.float32), "w")
    add = helper.make_node("Add", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    made = helper.make_graph([*nodes, add], "g", ends[:1], ends[1:], [weight, *constants])
    return helper.make_model(made, **{"opset_imports": OPSETS, "ir_version": 9, **more})


def tensor(dims: Sequence[int], raw: bytes = b"", kind: int = TensorProto.FLOAT, name: str = "c") -> onnx.TensorProto:
    return TensorProto(dims=dims, data_type=kind, raw_data=raw, name=name)


def _external() -> Iterator[Attack]:
    """The table of edge cases of external data, each of which some reader has followed."""

    def of(name: str, told: str, location: str, prepare: Callable[[Path], object] = lambda _: None, **more: str) -> Attack:
        def make(folder: Path, _: Path) -> Path:
            (folder.parent / SECRET).write_bytes(bytes(64))
            inner = folder / "model"
            inner.mkdir()
            (inner / "ok.bin").write_bytes(bytes(64))
            prepare(inner)
            constant = TensorProto(dims=[4], data_type=TensorProto.FLOAT, name="c", data_location=TensorProto.EXTERNAL)
            entries = {"location": location.replace("{}", str(folder.parent)), **more}
            for key, value in entries.items():
                constant.external_data.add(key=key, value=value)
            made = model(constants=[constant])
            (inner / "model.onnx").write_bytes(made.SerializeToString())
            return inner / "model.onnx"

        return Attack(f"graph-external-{name}", told, make, door="graph")

    def linked(folder: Path) -> None:
        (folder / "link.bin").symlink_to(folder.parent.parent / SECRET)
        (folder / "inner").symlink_to(folder.parent.parent)
        (folder / "beside.bin").symlink_to("ok.bin")
        os.link(folder.parent.parent / SECRET, folder / "hard.bin")
        os.mkfifo(folder / "pipe")
        (folder / "sub").mkdir()
        (folder / "zero").symlink_to("/dev/zero")

    none = "is no path beneath the file's folder"
    yield of("parent", none, f"../../{SECRET}")
    yield of("absolute", none, "{}/" + SECRET)
    yield of("device", none, "/dev/zero")
    yield of("up-and-down", none, f"sub/../../../{SECRET}", linked)
    yield of("dot", none, "./ok.bin")
    yield of("double-slash", none, "sub//ok.bin")
    yield of("backslash", none, f"..\\..\\{SECRET}")
    yield of("zero-byte", none, f"ok.bin\0../../{SECRET}")
    yield of("empty", none, "")
    yield of("no-place", none, "", **{"offset": "0"})
    yield of("very-long", none, "a" * 5000)
    yield of("link", "too many levels|link", "link.bin", linked)
    yield of("link-to-a-neighbour", "too many levels|link", "beside.bin", linked)
    yield of("linked-folder", "not a directory|too many levels", f"inner/{SECRET}", linked)
    yield of("hard-link", "second name", "hard.bin", linked)
    yield of("pipe", "not a file", "pipe", linked)
    yield of("folder", "not a file|is a directory", "sub", linked)
    yield of("linked-device", "too many levels|link", "zero", linked)
    yield of("missing", "no such file", "nothing.bin")
    yield of("negative-offset", "takes", "ok.bin", offset="-16")
    yield of("offset-beyond", "which has 64", "ok.bin", offset=str(1 << 40))
    yield of("offset-that-overflows", "which has 64", "ok.bin", offset=str((1 << 64) - 8))
    yield of("offset-just-beyond", "which has 64", "ok.bin", offset="52")
    yield of("length-of-a-terabyte", "its shape wants 16", "ok.bin", length=str(1 << 40))
    yield of("length-too-short", "its shape wants 16", "ok.bin", length="8")
    yield of("negative-length", "its shape wants 16", "ok.bin", length="-16")
    yield of("offset-of-text", "no number", "ok.bin", offset="0x10")
    yield of("honest-data-beside-it", "keeps 1 of its constants in other files", "ok.bin", offset="0", length="16")

    def twice() -> bytes:
        constant = TensorProto(dims=[4], data_type=TensorProto.FLOAT, name="c", data_location=TensorProto.EXTERNAL)
        for location in ("ok.bin", f"../{SECRET}"):
            constant.external_data.add(key="location", value=location)
        return model(constants=[constant]).SerializeToString()

    yield graph("external-two-places", "says twice where it lies", twice)

    def hidden() -> bytes:
        constant = tensor([4], bytes(16))
        constant.external_data.add(key="location", value="/etc/passwd")
        return model(constants=[constant]).SerializeToString()

    yield graph("external-and-internal", "in another file and in this one", hidden)


def _shapes() -> Iterator[Attack]:
    """Constants whose shapes and bytes differ."""

    def of(name: str, told: str, constant: Callable[[], onnx.TensorProto]) -> Attack:
        return graph(f"shape-{name}", told, lambda: model(constants=[constant()]).SerializeToString())

    yield of("of-2-to-the-40", "has a shape of 1099511627776", lambda: tensor([1 << 40]))
    yield of("that-overflows", "wants", lambda: tensor([1 << 30] * 4, bytes(16)))
    yield of("negative", "has a shape of -4", lambda: tensor([-4], bytes(16)))
    yield of("minus-one-twice", "has a shape of -1x-1", lambda: tensor([-1, -1], bytes(4)))
    yield of("too-few-bytes", "holds 8 bytes, its shape of 4 wants 16", lambda: tensor([4], bytes(8)))
    yield of("too-many-bytes", "holds 32 bytes, its shape of 4 wants 16", lambda: tensor([4], bytes(32)))
    yield of("without-data", "holds 0 ", lambda: tensor([4]))
    yield of("of-thousand-dimensions", "has a shape", lambda: tensor([1] * 1000, bytes(4)))
    yield of("of-unknown-type", "is of type 99", lambda: tensor([1], bytes(4), kind=99))
    yield of("of-undefined-type", "is of type 0", lambda: tensor([1], bytes(4), kind=0))
    yield of(
        "in-segments", "stored in segments", lambda: TensorProto(dims=[4], data_type=1, name="c", segment={"begin": 0, "end": 9})
    )
    yield of(
        "in-two-forms", "several forms", lambda: TensorProto(dims=[1], data_type=1, name="c", raw_data=bytes(4), float_data=[1])
    )
    yield of("of-few-floats", "holds 1 values", lambda: TensorProto(dims=[9], data_type=1, name="c", float_data=[1]))
    yield of("of-few-integers", "holds 2 values", lambda: TensorProto(dims=[9], data_type=7, name="c", int64_data=[1, 2]))
    yield of(
        "of-few-nibbles",
        "holds 1 values, its shape of 9 wants 5",
        lambda: TensorProto(dims=[9], data_type=22, name="c", int32_data=[1]),
    )

    def of_input() -> bytes:
        made = model()
        made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 40
        return made.SerializeToString()

    yield graph("shape-of-an-input", "a side of 1099511627776", of_input)

    def sparse() -> bytes:
        made = model()
        made.graph.sparse_initializer.add(dims=[1 << 40])
        return made.SerializeToString()

    yield graph("shape-sparse", "sparse constants", sparse)


def _constant(name: str, values: Sequence[int]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _bombs() -> Iterator[Attack]:
    """A hundred bytes that ask for gigabytes or for ever."""
    huge = [1 << 18, 1 << 18]
    for op, made in {
        "Expand": helper.make_node("Expand", ["w", "s"], ["z"]),
        "ConstantOfShape": helper.make_node("ConstantOfShape", ["s"], ["z"]),
        "Tile": helper.make_node("Tile", ["w", "s"], ["z"]),
        "OneHot": helper.make_node("OneHot", ["s", "d", "v"], ["z"]),
    }.items():
        constants = [_constant("s", huge), _constant("d", [1 << 40]), numpy_helper.from_array(np.ones(2, np.float32), "v")]
        yield graph(f"bomb-{op}", f"{op} makes a tensor", lambda made=made, c=constants: model([made], c).SerializeToString())
    ends = [numpy_helper.from_array(np.int64(value), name) for name, value in (("a", 0), ("b", 1 << 36), ("i", 1))]
    ranged = helper.make_node("Range", ["a", "b", "i"], ["r"])
    yield graph("bomb-Range", "more memory", lambda: model(_used([ranged], "r"), ends).SerializeToString())
    small = [numpy_helper.from_array(np.int64(value), name) for name, value in (("a", 0), ("b", 1024), ("i", 1))]
    doubling = [helper.make_node("Concat", ["r" if i == 0 else f"r{i}"] * 2, [f"r{i + 1}"], axis=0) for i in range(36)]
    yield graph(
        "bomb-Concat-36-times", "more memory", lambda: model(_used([ranged, *doubling], "r36"), small).SerializeToString()
    )
    squared = [helper.make_node("Mul", ["s0" if i == 0 else f"s{i}"] * 2, [f"s{i + 1}"]) for i in range(3)]
    computed = [*squared, helper.make_node("ConstantOfShape", ["s3"], ["z"])]
    yield graph(
        "bomb-computed-shape", "more memory", lambda: model(_used(computed, "z"), [_constant("s0", [32])]).SerializeToString()
    )
    yield graph("bomb-200000-nodes", "more than 50000", lambda: model(_chain("Relu", "x", 200_000)).SerializeToString())
    yield graph("bomb-metadata", "more than 1000000 parts", lambda: model().SerializeToString() + b"\x72\x00" * 1_100_000)


def _used(nodes: Sequence[onnx.NodeProto], last: str) -> list[onnx.NodeProto]:
    """So that nothing is left out as unused: the result's sum is added to a part of what is answered."""
    return [
        *nodes,
        helper.make_node("Cast", [last], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["cast"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["unused"]),
    ]


def _functions() -> Iterator[Attack]:
    """Functions that are a thousand times longer once they are in line, or have no end."""

    def of(name: str, told: str, functions: Sequence[onnx.FunctionProto]) -> Attack:
        def content() -> bytes:
            imports = [*OPSETS, helper.make_opsetid("local", 1)]
            call = helper.make_node(functions[-1].name, ["x"], ["unused"], domain="local")
            return model([call], functions=functions, opset_imports=imports).SerializeToString()

        return graph(f"function-{name}", told, content)

    def function(name: str, calls: str, times: int, domain: str = "local") -> onnx.FunctionProto:
        inner = "" if calls == "Relu" else "local"
        nodes = [helper.make_node(calls, ["a"] if i == 0 else [f"t{i}"], [f"t{i + 1}"], domain=inner) for i in range(times)]
        nodes.append(helper.make_node("Relu", [f"t{times}"], ["b"]))
        return helper.make_function(domain, name, ["a"], ["b"], nodes, [*OPSETS, helper.make_opsetid("local", 1)])

    doubling = [function("f0", "Relu", 1), *(function(f"f{i}", f"f{i - 1}", 50) for i in range(1, 9))]
    yield of("times-50-to-the-8th", "with functions in line, more than 50000", doubling)
    yield of("calls-itself", "calls itself", [function("f", "f", 1)])
    yield of("calls-in-a-circle", "calls itself", [function("f", "g", 1), function("g", "f", 1)])
    yield of(
        "nested-100-deep",
        "nested more than",
        [function("f0", "Relu", 1), *(function(f"f{i}", f"f{i - 1}", 1) for i in range(1, 100))],
    )
    yield of("defined-twice", "is there twice", [function("f", "Relu", 1), function("f", "Relu", 2)])
    yield of(
        "in-the-name-of-onnx",
        "ONNX's or ONNX Runtime's own",
        [function("Relu", "Relu", 1, domain="ai.onnx"), function("f", "Relu", 1)],
    )


def _operators() -> Iterator[Attack]:
    """What no CNN is made of."""

    def of(name: str, op: str, domain: str = "", **attributes: object) -> Attack:
        node = helper.make_node(op, ["x"], ["unused"], domain=domain, **attributes)
        imports = [*OPSETS, *([helper.make_opsetid(domain, 1)] if domain else [])]
        told = "operators that CNNs are not made of" if not attributes else "holds a graph of its own"
        return graph(f"operator-{name}", told, lambda: model([node], opset_imports=imports).SerializeToString())

    body = helper.make_graph([], "body", [], [])
    yield of("loop-for-ever", "Loop", body=body)
    yield of("if-of-a-graph", "If", then_branch=body, else_branch=body)
    yield of("scan-of-a-graph", "Scan", body=body, num_scan_inputs=1)
    yield of("loop-without-body", "Loop")
    yield of("custom", "Anything", "com.example")
    yield of("python", "PyOp", "ai.onnx.contrib")
    yield of("aten", "ATen", "org.pytorch.aten")
    yield of("engine-of-tensorrt", "EPContext", "com.microsoft")
    yield of("plugin", "TRT_Plugin", "trt.plugins")
    yield of("sequence", "SequenceEmpty")
    yield of("strings", "StringNormalizer")
    yield of("random", "RandomNormal")
    yield of("training", "Adam", "ai.onnx.preview.training")
    yield of("without-a-name", "")

    def nested_if() -> bytes:
        inner = helper.make_graph([], "deepest", [], [])
        for depth in range(20):
            inner = helper.make_graph([helper.make_node("If", ["c"], ["d"], then_branch=inner)], f"g{depth}", [], [])
        return model([helper.make_node("If", ["c"], ["d"], then_branch=inner)]).SerializeToString()

    yield graph("operator-if-20-deep", "holds a graph of its own", nested_if)

    def nested_type() -> bytes:
        made = model()
        kind = made.graph.input[0].type
        for _ in range(40):
            kind = kind.sequence_type.elem_type
        kind.tensor_type.elem_type = 1
        return made.SerializeToString()

    yield graph("operator-type-40-deep", "nested more than", nested_type)

    def training() -> bytes:
        made = model()
        made.training_info.add()
        return made.SerializeToString()

    yield graph("operator-training-graph", "training graph", training)


def _wire() -> Iterator[Attack]:
    """Bytes that are no ONNX, or that readers of protobuf understand in different ways."""
    good = model().SerializeToString()

    def of(name: str, told: str, content: bytes) -> Attack:
        return graph(f"wire-{name}", told, lambda: content)

    refused = "is not an ONNX file that can be read"
    yield of("empty", "it is empty", b"")
    yield of("random", refused, random.Random(0).randbytes(4096))
    yield of("zeros", refused, bytes(4096))
    yield of("endless-number", refused, b"\xff" * (1 << 20))
    yield of("number-cut", "in the middle of a number", b"\x08")
    yield of("length-beyond-the-file", "longer than the file", b"\x3a\xff\xff\xff\xff\x0f" + good)
    yield of("length-of-2-to-the-63", "longer than the file", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
    yield of("group", "wire type 3", b"\x3b\x3c" + good)
    yield of("wire-type-7", "wire type 7", b"\x3f" + good)
    yield of("field-0", "field 0", b"\x00\x00" + good)
    yield of("two-graphs", "several graphs", good + b"\x3a\x00")
    yield of("no-graph", "no graph", b"\x08\x09")
    yield of("no-version", "no IR version", model(ir_version=0).SerializeToString())
    yield of("graph-as-number", "a number stands", b"\x08\x09\x38\x01")
    yield of("name-not-utf8", "not UTF-8", good.replace(b"Add", b"\xff\xfe\xfd"))
    yield of("picture", refused, b"\x89PNG\r\n\x1a\n" + bytes(64))
    yield of("web-page", refused, b"<!DOCTYPE html><html>404</html>")
    for kept in (0.1, 0.4, 0.6, 0.9, 0.99):
        yield of(f"cut-at-{kept}", refused, good[: int(kept * len(good))])

    def two_tensors() -> bytes:
        """A Constant of two elements, said twice: protobuf makes one tensor of 2x2 with 8 bytes of it."""
        value = _field(5, tensor([2], bytes(8)).SerializeToString())
        attribute = _field(1, b"value") + value + value + b"\xa0\x01\x04"
        node = _field(2, b"c") + _field(4, b"Constant") + _field(5, attribute)
        inside = model()
        merged = inside.graph.SerializeToString() + _field(1, node)
        inside.ClearField("graph")
        return inside.SerializeToString() + _field(7, merged)

    yield graph("wire-merged-tensors", "two tensors where one belongs", two_tensors)


def _chain(op: str, first: str, count: int) -> list[onnx.NodeProto]:
    return [helper.make_node(op, [first if i == 0 else f"n{i}"], [f"n{i + 1}"]) for i in range(count)]


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in the wire format."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content
