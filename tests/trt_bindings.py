"""NVIDIA's real Python bindings of TensorRT without TensorRT: fetched, imported against empty libraries, and asked for every
signature.

The bindings are wheels of a megabyte each. What they link to is made here: libraries that export the nine functions the bindings
look up, each of which returns null. So the module imports, its classes can be subclassed and inspected, and nothing can be built.

    python tests/trt_bindings.py            fetch all versions and write what they say to tests/data/tensorrt_signatures.json
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.9.0.34": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu13-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.0.0.114": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
RECORDED = Path(__file__).parent / "data" / "tensorrt_signatures.json"
FOLDER_VARIABLE = "DEPLOYKIT_TENSORRT_BINDINGS"  # where the fetched bindings are kept
# With all members of these the contract is checked; another class that the code uses is not found, and has to be added here.
CLASSES = (
    *("ILogger", "IProfiler", "IProgressMonitor", "Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile"),
    *("OnnxParser", "ParserError", "Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "ITimingCache"),
    *("IHostMemory", "ILayer", "ITensor", "Dims", "NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType"),
    *(
        "ProfilingVerbosity",
        "HardwareCompatibilityLevel",
        "DeviceType",
        "OnnxParserFlag",
        "ErrorCode",
        "TensorIOMode",
        "DataType",
    ),
    *("LayerInformationFormat",),
)
_EXPORTED = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "getBuilderPluginRegistry"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion", "getPluginRegistry"),
    "initLibNvInferPlugins",
)
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
_OWN = re.compile(r"\b(?:tensorrt_bindings\.)?tensorrt\.(?=\w)|\b\w+::(?=\w)")  # of C++ too, where Python has no name yet
# What later pybind11 calls the argument of C++ type int64_t or float, and what C++ calls a class that Python knows otherwise.
_SAME = (
    (re.compile(r"typing\.SupportsInt( \| typing\.SupportsIndex)?"), "int"),
    (re.compile(r"typing\.SupportsFloat( \| typing\.SupportsIndex)?"), "float"),
    (re.compile(r"\bIParserError\b"), "ParserError"),
)
_DEFAULT = re.compile(r"<[^<>]*>")  # how pybind11 writes an enum member, which is not Python


class MissingError(Exception):
    """Why the real bindings cannot be had here."""


def fetched(version: str, package: str | None = None, folder: Path | None = None) -> Path:
    """The folder of one version's bindings, fetched by pip once and kept. Raises MissingError."""
    base = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "deploykit" / "tensorrt-bindings")
    package = package or VERSIONS[version]
    found = (folder or base) / f"{package}-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if not found.is_dir():
        aside = found.with_name(f"{found.name}.{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ]
        try:
            done = subprocess.run(
                [*command, "--target", str(aside), f"{package}=={version}"],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode:
                raise MissingError(f"pip cannot fetch {package} {version}: {done.stderr.strip().splitlines()[-1:]}")
            shutil.rmtree(found, ignore_errors=True)
            aside.rename(found)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"pip takes too long to fetch {package} {version}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return found


def libraries(folder: Path) -> Path:
    """Empty libraries with the names and functions that the bindings of all versions link to. Raises MissingError without gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise MissingError("this test wants gcc, to compile the libraries that TensorRT's bindings link to")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _EXPORTED))
    made = folder / "empty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True, timeout=60)
    for major in (10, 11):
        for name in _LIBRARIES:
            shutil.copyfile(made, folder / f"lib{name}.so.{major}")
    return folder


def python(
    bindings: Path, libraries: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python process that can import the bindings of one version as `tensorrt_bindings`."""
    here = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join([str(bindings), str(Path(__file__).parents[1])])}
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **here, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def asked(version: str, stubs: Path) -> dict[str, Any]:
    """What the bindings of one version say of themselves. Raises MissingError."""
    done = python(fetched(version), stubs, str(Path(__file__)), "--tell")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def recorded(version: str) -> dict[str, Any]:
    """What `asked` answered when the file in tests/data was written."""
    return expanded(json.loads(RECORDED.read_text()))[version]


def packed(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The answers of all versions as class -> member -> signature -> versions: most are the same in all of them."""
    found: dict[str, Any] = {}
    for version, classes in told.items():
        for name, members in classes.items():
            for member, value in members.items():
                found.setdefault(name, {}).setdefault(member, {}).setdefault(json.dumps(value), []).append(version)
    everywhere = list(told)
    for members in found.values():
        for member, values in members.items():
            members[member] = [
                [json.loads(value), "all" if versions == everywhere else versions] for value, versions in values.items()
            ]
    return {"versions": everywhere, "classes": found}


def expanded(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `packed`."""
    found: dict[str, dict[str, Any]] = {version: {} for version in content["versions"]}
    for name, members in content["classes"].items():
        for member, values in members.items():
            for value, versions in values:
                for version in content["versions"] if versions == "all" else versions:
                    found[version].setdefault(name, {})[member] = value
    return found


def tell() -> dict[str, Any]:
    """Every member of CLASSES, in a process that can import the bindings: class -> member -> what kind, and its signatures."""
    module = importlib.import_module("tensorrt_bindings")
    found = {name: _members(getattr(module, name)) for name in CLASSES}
    nested = {"ILogger.Severity": _members(module.ILogger.Severity)}
    return {**found, **nested, "": {"__version__": {"kind": "text"}}}


def _members(kind: type) -> dict[str, Any]:
    bases = [base.__name__ for base in kind.__mro__[1:-1] if base.__name__ != "pybind11_object"]
    found: dict[str, Any] = {
        "": {"kind": "enum" if hasattr(kind, "__members__") else "class", "bases": bases, "buffer": _buffer(kind)}
    }
    for name, value in sorted(vars(kind).items()):
        if hasattr(kind, "__members__") and name in kind.__members__:
            found[name] = {"kind": "member", "type": kind.__name__}
        elif isinstance(value, property):
            getter = _signatures("_", inspect.getdoc(value.fget) or "")
            found[name] = {
                "kind": "property",
                "type": getter[0]["returns"] if getter else "object",
                "set": value.fset is not None,
            }
        elif not isinstance(value, type) and (callable(value) or isinstance(value, staticmethod)):
            signatures = _signatures(name, getattr(kind, name).__doc__ or "")
            if signatures and (not name.startswith("__") or name in ("__init__", "__len__", "__getitem__", "__iter__")):
                found[name] = {"kind": "method", "signatures": signatures}
        elif not name.startswith("_") and not isinstance(value, type):
            found[name] = {"kind": "constant", "type": type(value).__qualname__}
    return found


def _buffer(kind: type) -> bool:
    """Whether `bytes` takes one."""
    try:
        return bool(ctypes.pythonapi.PyObject_CheckBuffer(ctypes.py_object(kind.__new__(kind))))
    except TypeError:
        return False


def _signatures(name: str, text: str) -> list[dict[str, Any]]:
    """pybind11's lines `name(self: tensorrt.Builder, flags: int = 0) -> tensorrt.INetworkDefinition`, one or several."""
    lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in text.splitlines()]
    wanted = re.compile(rf"^(?:{re.escape(name)})?\(.*\) -> .+$" if name == "_" else rf"^{re.escape(name)}\(.*\) -> .+$")
    found = []
    for line in lines:
        if not wanted.match(line) or "*args" in line:
            continue
        plain = _DEFAULT.sub("...", _OWN.sub("", line))
        for pattern, name_ in _SAME:
            plain = pattern.sub(name_, plain)
        inside, _, returns = plain[plain.index("(") + 1 :].rpartition(") -> ")
        arguments = [_parts(piece) for piece in _split(inside)]
        # pybind11 lets an argument without a default follow one that has one; Python does not, and then both have to be given.
        last = max((number for number, (_, _, default) in enumerate(arguments) if not default), default=-1)
        takes = [
            [name, kind, number > last]
            for number, (name, kind, _) in enumerate(arguments)
            if number or name not in ("self", "arg0")
        ]
        found.append({"takes": takes, "returns": returns.strip()})
    return found


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def _parts(argument: str) -> tuple[str, str, bool]:
    """Name, type and whether there is a default, of `flags: int = 0`."""
    declared, equals, _ = argument.partition(" = ")
    name, _, kind = declared.partition(": ")
    return name, kind or "object", bool(equals)


def stub(told: Mapping[str, Any]) -> str:
    """A `.pyi` file for mypy: what is not recorded does not exist, and what TensorRT makes may be None."""
    lines = [
        "import collections.abc, typing",
        "from typing import Any, Iterator, Optional, Union",
        "from typing_extensions import Buffer",
        "__version__: str",
        "class _Unknown: ...",
    ]
    for name, members in told.items():
        if name and "." not in name:
            lines += _class(name, members, told)
    return "\n".join(lines) + "\n"


def _class(name: str, members: Mapping[str, Any], told: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    header = members[""]
    bases = [base for base in header["bases"] if base in told][:1]
    yield f"{indent}class {name.rpartition('.')[2]}({', '.join(bases)}):"
    inner = f"{indent}    "
    if header["buffer"]:
        yield f"{inner}def __buffer__(self, flags: int, /) -> memoryview: ..."
    if header["kind"] == "enum":
        yield f"{inner}name: str"
        yield f"{inner}value: int"
        yield f"{inner}def __int__(self) -> int: ..."
    if "__getitem__" in members and "__iter__" not in members:
        # Python itself goes through what has only __getitem__; mypy wants to be told.
        yield f"{inner}def __iter__(self) -> Iterator[int]: ..."
    for other in told:
        if other.startswith(f"{name}."):
            yield from _class(other, told[other], told, inner)
    for member, value in members.items():
        if not (header["kind"] == "enum" and value["kind"] == "property"):
            yield from (f"{inner}{line}" for line in _member(member, value, told))


def _member(name: str, value: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    kind = value["kind"]
    if kind in ("member", "constant"):
        yield f"{name}: {_type(value['type'], told)}"
    elif kind == "property":
        yield "@property"
        yield f"def {name}(self) -> {_type(value['type'], told)}: ..."
        if value["set"]:
            yield f"@{name}.setter"
            yield f"def {name}(self, value: {_type(value['type'], told)}, /) -> None: ..."
    elif kind == "method":
        for signature in value["signatures"]:
            if len(value["signatures"]) > 1:
                yield "@typing.overload"
            taken = ", ".join(_argument(*argument, told) for argument in signature["takes"])
            returns = _type(signature["returns"], told)
            if is_made(signature["returns"], told):
                returns = f"Optional[{returns}]"
            yield f"def {name}(self{', ' * bool(taken)}{taken}) -> {returns}: ..."


def is_made(kind: str, told: Mapping[str, Any]) -> bool:
    """Whether a method that returns this may return None: pybind11 makes None of a null pointer."""
    return kind in told and told[kind][""]["kind"] == "class" and kind not in ("Dims",)


def _argument(name: str, kind: str, has_default: bool, told: Mapping[str, Any]) -> str:
    # pybind11 calls what has no name, and cannot be given by one, arg0, arg1 and so on.
    positional = re.fullmatch(r"arg\d+", name)
    # pybind11 makes Dims of any sequence of numbers.
    taken = re.sub(r"\bDims\b", "Union[Dims, collections.abc.Sequence[int]]", _type(kind, told))
    return f"{'__' if positional else ''}{name}: {taken}{' = ...' if has_default else ''}"


_PLAIN = {
    **{
        name: name for name in ("int", "str", "bool", "float", "bytes", "None", "object", "list", "tuple", "dict", "slice", "Any")
    },
    **{"List": "list", "Tuple": "tuple", "Dict": "dict", "buffer": "Buffer", "Buffer": "Buffer", "capsule": "object"},
    **{name: name for name in ("typing", "collections", "Optional", "Union", "Iterator")},
}


def _type(kind: str, told: Mapping[str, Any]) -> str:
    """A recorded type for mypy; one of a class that is not recorded is `_Unknown`, which nothing fits."""
    tree = ast.parse(kind, mode="eval")

    class Names(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            if node.id == "Dims":
                return ast.Name("Dims")
            return ast.Name(_PLAIN.get(node.id, node.id if node.id in told else "_Unknown"))

        def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
            text = ast.unparse(node)
            known = text in told or text.startswith(("typing.", "collections.abc."))
            return node if known else ast.Name(_PLAIN.get(node.attr, "_Unknown"))

    return ast.unparse(Names().visit(tree))


def main() -> None:
    if "--tell" in sys.argv:
        sys.stdout.write(json.dumps(tell()))
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        stubs = libraries(Path(folder))
        told = {version: asked(version, stubs) for version in VERSIONS}
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(packed(told), indent=None, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
