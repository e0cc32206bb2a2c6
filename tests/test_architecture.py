"""Who may import whom, what the device half does without, and what no module of the library does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import tomllib

import deploykit

PACKAGE = Path(deploykit.__file__).parent
FLOORS = (
    {
        "errors",
        "publish",
        "jsonable",
        "progress",
        "gate",
        "machine",
        "artifact",
        "recipe",
        "scenes",
        "intake",
        "telemetry",
        "arm64",
    },
    {"models", "data", "runtimes", "targets", "slots", "remote"},
    {
        *("finetune", "export", "quantize", "build", "parity", "benchmark", "sources", "emulate", "foreign"),
        *("bundle", "infer", "lease", "watchdog"),
    },
    {"report", "inspect", "viewing", "bundled", "device", "engines"},
    {"verify", "timing", "bisect", "stopwatch", "workspace", "isa", "crosscheck", "forecast", "rebuild", "work"},
    {"deploy", "precision"},
    {"pipeline", "agent", "fleet"},
    {"cli", "__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What travels to a device without torch, and may meet Python 3.10 there.
DEVICE = (
    *("publish", "machine", "artifact", "scenes", "runtimes", "runtimes.onnxruntime", "runtimes.openvino"),
    "runtimes.cudart",
    *("build", "parity", "emulate"),
    *("benchmark", "benchmark.process", "benchmark.judge"),
    *(
        "bundle",
        "bundle.archive",
        "bundle.signature",
        "bundle.incoming",
        "slots",
        "lease",
        "watchdog",
        "infer",
        "engines",
        "rebuild",
        "agent",
        "agent.answer",
        "agent.commands",
    ),
)
# The same, but it loads only where there is TensorRT.
WITH_A_GPU = ("runtimes.tensorrt",)
NOT_ON_A_DEVICE = (
    "torch",
    "torchvision",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "click",
    "rich",
    "PIL",
    "tomllib",
    "tomli_w",
)
HEAVY = ("torch", "torchvision", "onnx", "onnx_ir", "onnxruntime", "openvino", "numpy", "rich", "PIL", "sklearn", "safetensors")


def module_name(path: Path) -> str:
    """The dotted name below `deploykit`; empty for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def walk(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """All nodes but those for the type checker; with `at_import` only what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for part in (node.args, *getattr(node, "decorator_list", ())):
                yield from (part, *walk(part, at_import=at_import))
        else:
            yield from walk(node, at_import=at_import)


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """The modules below `deploykit` that a module imports."""
    found = set()
    for node in walk(MODULES[module], at_import=at_import):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deploykit":
            source = (node.module or "").removeprefix("deploykit").lstrip(".")
            inner = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in MODULES else source for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("deploykit.") for alias in node.names if alias.name.startswith("deploykit.")}
    return found - {""}


def room(module: str) -> str:
    return module.partition(".")[0]


def with_all_they_import(modules: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    left = [*modules]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += imports(module, at_import=True)
    return found


def python(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True, check=False)


class TestTheHouse:
    def test_every_module_has_a_floor_and_every_floor_its_modules(self):
        rooms = {room(module) for module in MODULES} - {"", "recipes"}

        assert rooms == set(FLOOR)

    def test_the_floors_are_told_to_contributors(self):
        page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()

        told = {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in re.findall(r"\| (\d) \| (.*) \|", page)}

        assert told == dict(enumerate(FLOORS))

    @pytest.mark.parametrize("module", [name for name in MODULES if name])
    def test_a_module_imports_only_from_floors_below_its_own(self, module):
        here = FLOOR[room(module)]
        allowed = {name for name, floor in FLOOR.items() if floor < here or floor == here == 0} | {room(module)}
        if module == "__main__":
            allowed.add("cli")

        assert {room(name) for name in imports(module)} <= allowed

    def test_no_module_imports_itself_by_a_detour(self):
        graph = {module: imports(module, at_import=True) - {module} for module in MODULES}

        order = list(TopologicalSorter(graph).static_order())

        assert order.index("errors") < order.index("cli")

    def test_a_wheel_holds_every_package(self):
        listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

        folders = {path.parent.relative_to(PACKAGE.parent).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
        assert set(listed) == folders | {"deploykit.recipes"}

    def test_the_package_itself_imports_nothing(self):
        done = python("import sys; before = set(sys.modules); import deploykit; print(sorted(set(sys.modules) - before))")

        assert done.stdout == "['deploykit']\n"


class TestTheCommandLine:
    @pytest.mark.parametrize("command", [["--help"], ["--version"], ["run", "--help"], ["export", "--help"]])
    def test_help_comes_without_anything_heavy(self, command):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "deploykit", *command], capture_output=True, text=True, check=True
        )

        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "click" in imported
        assert not imported & set(HEAVY)
        assert done.stdout

    def test_a_recipe_with_a_mistake_is_refused_without_anything_heavy(self, tmp_path):
        (tmp_path / "bad.toml").write_text("nam = 1")

        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "deploykit", "run", str(tmp_path / "bad.toml")],
            capture_output=True,
            text=True,
            check=False,
        )

        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert done.returncode == 2
        assert "did you mean 'name'?" in done.stderr
        assert not imported & set(HEAVY)


class TestTheDeviceHalf:
    def test_it_imports_where_there_is_only_numpy_and_a_runtime(self):
        script = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_ON_A_DEVICE!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {DEVICE!r}:
    importlib.import_module(f"deploykit.{{name}}")
from deploykit.machine import Machine
Machine.probe()
"""
        done = python(script)

        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("module", sorted(with_all_they_import((*DEVICE, *WITH_A_GPU))))
    def test_it_is_python_3_10(self, module):
        path = PACKAGE / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # Names that came with Python 3.11 and 3.12; what is only for the type checker does not matter.
        newer = {
            *("StrEnum", "ReprEnum", "verify", "member", "nonmember", "global_enum"),
            *("Self", "LiteralString", "Never", "assert_never", "assert_type", "reveal_type", "Required", "NotRequired"),
            *("Unpack", "TypeVarTuple", "override", "TypeAliasType", "dataclass_transform", "Buffer"),
            *("ExceptionGroup", "BaseExceptionGroup", "add_note", "TaskGroup", "file_digest", "batched", "chdir"),
            *("tomllib", "UTC", "getLevelNamesMapping", "walk_up", "is_junction", "EnumCheck", "monitoring"),
        }

        tree = ast.parse(file.read_text(), feature_version=(3, 10))

        used = set()
        for node in walk(tree, at_import=False):
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.alias):
                used |= {node.name, node.name.partition(".")[0]}
        assert not used & newer


def calls(module: str, *, at_import: bool = False) -> list[ast.Call]:
    return [node for node in walk(MODULES[module], at_import=at_import) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", MODULES)
class TestNoModule:
    def test_prints_or_runs_text_as_code(self, module):
        called = {ast.unparse(call.func) for call in calls(module)}

        assert not called & {"print", "eval", "exec", "compile", "__import__", "os.system", "os.popen"}

    def test_goes_through_a_shell(self, module):
        assert not [ast.unparse(call) for call in calls(module) for word in call.keywords if word.arg == "shell"]

    def test_unpickles(self, module):
        for call in calls(module):
            name = ast.unparse(call.func)
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            # Loading TorchScript runs it: only our own files, whose digests were checked, come to this one place.
            # The other place takes weights out of a file that the user has said to trust.
            assert name != "torch.jit.load" or module in ("runtimes.torchscript", "models.script")
            if name == "torch.load":
                assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True"
            if name == "np.load":
                assert {word.arg: ast.unparse(word.value) for word in call.keywords}["allow_pickle"] == "False"

    def test_reads_the_clock_or_the_environment_when_it_is_imported(self, module):
        if module == "__main__":
            return

        called = {ast.unparse(call.func) for call in calls(module, at_import=True)}
        nodes = list(walk(MODULES[module], at_import=True))
        written = {node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)}
        read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node not in written}

        assert not {name.rpartition(".")[2] for name in called} & {"time", "time_ns", "perf_counter", "now", "today", "getenv"}
        assert not read & {"environ", "environb", "argv"}
