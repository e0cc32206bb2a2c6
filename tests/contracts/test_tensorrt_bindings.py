"""Our TensorRT code against NVIDIA's real Python bindings of six versions, and CUDA's real headers of two.

What is checked is what the code uses: mypy reads it with stubs made from the bindings' own signatures, in which nothing else
exists. The stubs come from tests/data, so this needs no network; that they say what the bindings say is checked where pip can
fetch these.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import trt_bindings
from trt_bindings import VERSIONS, MissingError

import deploykit
from deploykit.runtimes import cudart

PACKAGE = Path(deploykit.__file__).parent
SOURCES = sorted((PACKAGE / "runtimes" / "tensorrt").glob("*.py"))
CUDA = {"12.9.79": "nvidia-cuda-runtime-cu12", "13.5.37": "nvidia-cuda-runtime"}
SETTINGS = """
[mypy]
strict = True
python_version = 3.11
warn_unused_ignores = False
follow_imports = silent
disallow_any_generics = False
"""
CALLED_BY_TENSORRT = ("ILogger", "IProgressMonitor", "IProfiler")
SUBCLASSES = """
import sys, threading
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from deploykit.runtimes.tensorrt import callbacks
trt = tensorrt_bindings
log, told = callbacks.Log(), []
monitor = callbacks.Monitor(lambda *what: told.append(what), threading.Event())
times = callbacks.LayerTimes()
# Through the base class, and so through TensorRT's own C++ call, which finds what Python has overridden.
trt.ILogger.log(log, trt.ILogger.ERROR, "it failed")
trt.IProgressMonitor.phase_start(monitor, "Building", None, 2)
going = trt.IProgressMonitor.step_complete(monitor, "Building", 0)
monitor._cancelled.set()
cancelled = trt.IProgressMonitor.step_complete(monitor, "Building", 1)
trt.IProgressMonitor.phase_finish(monitor, "Building")
trt.IProfiler.report_layer_time(times, "conv1", 0.25)
print(log.errors(), told[0], going, cancelled, dict(times.milliseconds))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    return wanted(lambda: trt_bindings.libraries(tmp_path_factory.mktemp("libraries")))


def wanted(get: Callable[[], Path]) -> Path:
    try:
        return get()
    except MissingError as missing:
        pytest.skip(str(missing))


class Checker:
    """mypy on our TensorRT code, in a copy of the package that may be changed, with the stubs of one version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(PACKAGE, folder / "deploykit", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "stubs" / "tensorrt").mkdir(parents=True)
        (folder / "mypy.ini").write_text(SETTINGS)

    def stubs(self, version: str) -> None:
        told = trt_bindings.recorded(version)
        (self.folder / "stubs" / "tensorrt" / "__init__.pyi").write_text(trt_bindings.stub(told))

    def errors(self) -> list[str]:
        done = self._run("-m", "mypy", "--config-file", "mypy.ini", "-p", "deploykit.runtimes.tensorrt")
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"MYPYPATH": f"{self.folder / 'stubs'}:{self.folder}", "PATH": ""}
        return subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> Checker:
    return Checker(tmp_path_factory.mktemp("checked"))


@pytest.mark.parametrize("version", VERSIONS)
class TestEveryVersion:
    def test_says_what_is_recorded_of_it(self, version, libraries):
        wanted(lambda: trt_bindings.fetched(version))

        assert trt_bindings.asked(version, libraries) == trt_bindings.recorded(version)

    def test_has_every_member_that_the_code_uses_and_takes_every_call(self, version, checker):
        checker.stubs(version)

        assert checker.errors() == []

    def test_calls_our_logger_monitor_and_profiler(self, version, libraries):
        bindings = wanted(lambda: trt_bindings.fetched(version))

        ended = trt_bindings.python(bindings, libraries, "-c", SUBCLASSES)

        assert ended.stdout == "['it failed'] ('TensorRT: Building', 0, 2) True False {'conv1': [0.25]}\n", ended.stderr

    def test_calls_nothing_that_we_have_not_overridden(self, version):
        for kind, methods in overridden().items():
            recorded = trt_bindings.recorded(version)[kind]
            assert methods >= {
                name for name, value in recorded.items() if value["kind"] == "method" and not name.startswith("__")
            }

    def test_names_its_types_as_the_session_does(self, version):
        text = (PACKAGE / "runtimes" / "tensorrt" / "session.py").read_text()
        table = next(
            node for node in ast.parse(text).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_DTYPES"
        )

        assert set(ast.literal_eval(table.value)) <= set(trt_bindings.recorded(version)["DataType"])


def overridden() -> dict[str, set[str]]:
    """The methods of our subclasses of TensorRT's classes."""
    classes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    found = {}
    for node in classes:
        for base in node.bases:
            if ast.unparse(base).startswith("trt."):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                found[ast.unparse(base).removeprefix("trt.")] = methods
    return found


def test_there_are_subclasses_of_all_that_tensorrt_calls():
    assert set(overridden()) == set(CALLED_BY_TENSORRT)


class TestGuards:
    def test_what_only_some_versions_have_is_refused_without_its_guard(self, checker):
        path = checker.folder / "deploykit" / "runtimes" / "tensorrt" / "builder.py"
        text = path.read_text()
        guarded = re.findall(r'hasattr\((?:[\w.]+), "(\w+)"\)', text)
        assert guarded == ["ADJUST_FOR_DLA", "SAME_COMPUTE_CAPABILITY"]
        assert checker.folder in path.parents  # a copy
        unguarded = re.sub(r"not hasattr\(\w+, \"\w+\"\)", "options.batch is None", text)
        path.write_text(re.sub(r" and hasattr\([\w.]+, \"\w+\"\)", "", unguarded))

        checker.stubs("10.3.0")
        try:
            parser, level = checker.errors()
        finally:
            path.write_text(text)
        assert '"type[OnnxParserFlag]" has no attribute "ADJUST_FOR_DLA"' in parser
        assert '"type[HardwareCompatibilityLevel]" has no attribute "SAME_COMPUTE_CAPABILITY"' in level


def misspelled(name: str) -> str:
    return name[:-1] + ("q" if name[-1] != "q" else "x")


@cache
def of_any_version() -> tuple[frozenset[str], frozenset[str]]:
    """What TensorRT calls its members, and the keywords of its calls."""
    told = [trt_bindings.recorded(version) for version in VERSIONS]
    classes = {name for known in told for name in known}
    members = {name for known in told for found in known.values() for name in found}
    keywords = {
        argument[0]
        for known in told
        for found in known.values()
        for value in found.values()
        for signature in value.get("signatures", ())
        for argument in signature["takes"]
    }
    return frozenset(classes | members), frozenset(keywords - {"progress"})


def names(tree: ast.Module) -> list[ast.Attribute | ast.keyword]:
    """Where a module names a member of TensorRT, or a keyword of its calls."""
    members, keywords = of_any_version()
    found: list[ast.Attribute | ast.keyword] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in members:
            found.append(node)
        elif isinstance(node, ast.Call):
            found += [word for word in node.keywords if word.arg in keywords]
    return found


def strip_other_functions(tree: ast.Module, kept: ast.AST) -> None:
    """Leave no body but that around a node and those that make attributes: mypy is through with it in a fraction of the time."""
    for function in list(ast.walk(tree)):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        if not any(node is kept for node in ast.walk(function)):
            function.body = ast.parse("raise AssertionError").body


def of_tensorrt(errors: Sequence[str], kinds: Collection[str]) -> tuple[str, str] | None:
    """The class and member of TensorRT's that mypy misses; None where it is one of our own that is called alike."""
    patterns = (
        r'"(?:type\[)?(?P<kind>[\w.]+)\]?" has no attribute "(?P<member>\w+)"',
        r'keyword argument "(?P<member>\w+)" for "\w+" of "(?P<kind>\w+)"',
        r'(?P<kind>Module) has no attribute "(?P<member>\w+)"',
        r'Name "(?P<kind>trt)\.(?P<member>\w+)" is not defined',
    )
    for error in errors:
        found = next((match for pattern in patterns if (match := re.search(pattern, error))), None)
        if found is not None and (found["kind"] in kinds or found["kind"] in ("Module", "trt", "Severity")):
            return found["kind"], found["member"]
    return None


@dataclass
class Mutants:
    """Copies of our modules beside them, so that mypy reads all of them in one run: `made` each with one misspelling (its name
    and place), and `controls` that are the same without it."""

    made: dict[str, tuple[str, str]]
    controls: set[str]


@pytest.fixture(scope="module")
def mutants(checker) -> Iterator[Mutants]:
    folder = checker.folder / "deploykit" / "runtimes" / "tensorrt"
    made, controls = {}, {}
    for path in SOURCES:
        text, stem = path.read_text(), path.stem.strip("_")
        for number in range(len(names(ast.parse(text)))):
            tree = ast.parse(text)
            node = names(tree)[number]
            strip_other_functions(tree, node)
            controls.setdefault(ast.unparse(tree), f"control_{stem}_{number}")
            mutant, name = f"mutant_{stem}_{number}", node.attr if isinstance(node, ast.Attribute) else node.arg or ""
            setattr(node, "attr" if isinstance(node, ast.Attribute) else "arg", misspelled(name))
            (folder / f"{mutant}.py").write_text(ast.unparse(tree))
            made[mutant] = (name, f"{path.name}:{node.end_lineno}")
    for text, control in controls.items():
        (folder / f"{control}.py").write_text(text)
    yield Mutants(made, set(controls.values()))
    for name in (*made, *controls.values()):
        (folder / f"{name}.py").unlink()


@pytest.mark.slow
class TestMisspelling:
    """A member that is spelled wrong is found in every version, wherever the code names it: one misspelling for each place."""

    @pytest.mark.parametrize("version", VERSIONS)
    def test_is_caught_every_time(self, version, checker, mutants, capsys):
        checker.stubs(version)

        errors: dict[str, list[str]] = {}
        for line in checker.errors():
            errors.setdefault(Path(line.partition(":")[0]).stem, []).append(line)

        assert [errors[control] for control in mutants.controls & {*errors}] == []
        assert {where for mutant, (_, where) in mutants.made.items() if mutant not in errors} == set()
        kinds = set(trt_bindings.recorded(version))
        members = {member for mutant in mutants.made if (member := of_tensorrt(errors[mutant], kinds))}
        assert len(members) > 60
        found = f"{len(members)} distinct members, and {len(mutants.made)} places with a name that is one of TensorRT's"
        with capsys.disabled():
            sys.stdout.write(f"\nTensorRT {version}: {found}\n")

    def test_of_a_method_that_tensorrt_calls_leaves_its_own_not_overridden(self):
        told = trt_bindings.recorded("10.3.0")
        for kind, methods in overridden().items():
            wanted = {name for name, value in told[kind].items() if value["kind"] == "method" and not name.startswith("__")}
            for method in wanted:
                assert not (methods - {method} | {misspelled(method)}) >= wanted


@pytest.mark.parametrize("version", CUDA)
class TestCudaRuntime:
    def test_has_every_function_with_the_arguments_that_we_give(self, version):
        package = wanted(lambda: trt_bindings.fetched(version, CUDA[version]))
        header = next(package.rglob("cuda_runtime_api.h")).read_text()
        found = dict(re.findall(r"cudaError_t CUDARTAPI (\w+)\(([^;]*?)\);", header))

        for name, types in cudart._SIGNATURES.items():
            given = [] if found[name] == "void" else [argument.strip() for argument in found[name].split(",")]
            assert [width(kind.__name__) for kind in types] == [declared(argument) for argument in given], name

    def test_exports_every_function_and_says_that_there_is_no_gpu(self, version):
        package = wanted(lambda: trt_bindings.fetched(version, CUDA[version]))
        library = next(path for path in package.rglob("libcudart.so.*"))
        code = (
            "import ctypes, sys\nfrom deploykit.runtimes import cudart\n"
            "cuda = cudart.Cuda(ctypes.CDLL(sys.argv[1]))\n"
            "try: print(cuda.device_count())\n"
            "except cudart.CudaError as error: print(error.code, error)"
        )

        ended = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False)

        assert re.match(r"[1-9]\d* the CUDA call cudaGetDeviceCount failed\n  why: cudaError\w+: .*\(\d+\)|\d+$", ended.stdout), (
            ended
        )


def width(name: str) -> str:
    """How an argument is passed: a pointer, or a number of how many bits."""
    return {"c_int": "int", "c_uint": "unsigned", "c_ulong": "size", "c_ulonglong": "size"}.get(name, "pointer")


def declared(argument: str) -> str:
    argument = re.sub(r"__dv\(.*\)", "", argument).strip()
    if "*" in argument or re.match(r"(const )?cuda(Stream|Event|Graph|GraphExec)_t\b", argument):
        return "pointer"
    if re.match(r"(size_t|unsigned long long)\b", argument):
        return "size"
    return "unsigned" if argument.startswith("unsigned int") else "int"
