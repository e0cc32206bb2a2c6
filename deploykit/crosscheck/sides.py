"""What two words on a command line are, each opened as a side of a comparison: what it takes, what it answers, a session."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from deploykit import bundled, foreign, models, recipe, runtimes
from deploykit.artifact import MANIFEST, Artifact, Format, Precision, Preprocess, Tensors, TensorSpec, artifact_of, read_artifact
from deploykit.errors import DeploykitError, UsageError, like, printable
from deploykit.export.boxes import torch_answer
from deploykit.machine import available_cores
from deploykit.models import preprocess, script
from deploykit.publish import UNFINISHED
from deploykit.recipe import PreprocessTable
from deploykit.runtimes import Session, check_inputs, onnxruntime, torchscript

Layout = Literal["nchw", "nhwc"]
LABELS = ("A", "B")
_RUN = "result.json"
_SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")
_COMPARED = (Format.ONNX, Format.TORCHSCRIPT, Format.ENGINE)


@dataclass(frozen=True)
class Said:
    """What the user says of the two sides; `literal` and `layouts` are by label, A or B.

    `preprocess` and `args` hold keys of the recipe with their values in TOML syntax. `size` is the height and width where a file
    leaves them open. `trust` allows TorchScript, which runs the program in it when it is loaded, and whose manifest, where there
    is one, anybody may have written; `cast` feeds each side its own floating-point type; `by_position`
    says that inputs and outputs come in one order, whatever they are called.
    """

    weights: str = "default"
    preprocess: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    literal: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    trust: bool = False
    cast: bool = False
    by_position: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two. `inputs` are as it takes them, in its own `layout`.

    `model` is None for a PyTorch network; `preprocess` and `classes` are of what is ours, and None and empty elsewhere. `graph`
    is what an engine was built from, where it was built here. `open` gives a session that uses so many threads, where it
    `has_threads` at all: an engine on a GPU has none.
    """

    label: str
    name: str
    kind: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layout: Layout
    preprocess: Preprocess | None
    classes: tuple[str, ...]
    open: Callable[[int], Session]
    model: Artifact | None = None
    module: nn.Module | None = None
    graph: Artifact | None = None
    is_ours: bool = False
    has_threads: bool = True

    @property
    def batch(self) -> int | None:
        """The number of images that is fixed in it, if one is."""
        first = self.inputs[0].shape[0]
        return first if isinstance(first, int) else None

    def canonical(self, spec: TensorSpec) -> TensorSpec:
        """An input of this side with its channels in dimension 1, wherever the side has them."""
        if self.layout == "nchw" or len(spec.shape) != 4:
            return spec
        batch, height, width, channels = spec.shape
        return replace(spec, shape=(batch, channels, height, width))


def open_sides(names: tuple[str, str], said: Said, scratch: Path, *, is_of_pictures: bool = False) -> tuple[Side, Side]:
    """What the two words name. A TorchScript file that does not say what it takes, takes what the other side does.

    `is_of_pictures` says whether they are to be fed pictures. A bundle's engine is built in the folder `scratch`, which has to
    outlive the sides.

    Raises UsageError for what cannot be compared, ModelError for a network that cannot be built.
    """
    scripts = [_is_script(name) for name in names]
    sides = [
        None if script else _side(name, label, said, scratch) for name, label, script in zip(names, LABELS, scripts, strict=True)
    ]
    known = next((side for side in sides if side is not None), None)
    first, second = (side or _script(name, label, said, known) for side, name, label in zip(sides, names, LABELS, strict=True))
    _refuse_unused(first, second, said, is_of_pictures=is_of_pictures, says_size=known is None)
    return first, second


def asked_size(said: Said) -> int | None:
    """The height and width where no side fixes them: --size, else the crop that --preprocess says."""
    given = _given(said)
    return said.size or (None if given is None else given.crop)


def given_preprocess(said: Said) -> Preprocess | None:
    """What --preprocess says, where neither side knows; None when nothing was said. Raises ModelError when it is too little."""
    given = _given(said)
    return None if given is None else preprocess.resolve(None, given, name="--preprocess")[0]


def _refuse_unused(first: Side, second: Side, said: Said, *, is_of_pictures: bool, says_size: bool) -> None:
    """Raise UsageError for what was said of a side, and means nothing for what it is.

    `says_size` is for sides of which --preprocess alone says what they take.
    """
    sides = (first, second)
    is_open = any(foreign.is_open(spec) for side in sides for spec in side.inputs)
    problems = [
        f"--layout {side.label}=nhwc: {printable(side.name)} takes its channels first"
        for side in sides
        if said.layouts.get(side.label, "nchw") != side.layout
    ]
    if said.weights != "default" and first.module is None and second.module is None:
        problems.append(f"--weights {printable(said.weights)}: neither side is a PyTorch network")
    if said.by_position and all(len(specs) == 1 for side in sides for specs in (side.inputs, side.outputs)):
        problems.append("--by-position: each side has one input and one output")
    if said.args and first.module is None and second.module is None:
        problems.append("--arg: neither side is a PyTorch network")
    if said.size is not None and not is_open:
        problems.append(f"--size {said.size}: neither side leaves its height and width open")
    if said.preprocess and first.module is None and second.module is None:
        if first.is_ours or second.is_ours:
            problems.append("--preprocess: a side is ours, and its manifest says how a picture becomes its input")
        elif not (is_of_pictures or is_open or says_size):
            problems.append("--preprocess: there are no pictures (--data DIR), and the sides say what size they take")
    if problems:
        raise UsageError("these say nothing about what is compared", problems=problems)


def _side(name: str, label: str, said: Said, scratch: Path) -> Side:
    path = Path(name)
    packed = bundled.named(name)
    if packed is not None:
        place = scratch / label
        place.mkdir()
        graph, engine = bundled.engine(*packed, place)
        return replace(_ours(engine, name, label, said), kind=f"{_kind(engine, False)}, of a bundle", graph=graph)
    if not path.exists():
        return _network(name, label, said)
    found = read_artifact(path) if (path / MANIFEST).is_file() else artifact_of(path)
    if found is not None:
        return _ours(found, name, label, said)
    if path.is_dir():
        raise UsageError(f"{label}: {printable(name)} is a folder with no manifest", why=_inside(path), fix="name what is in it")
    if path.suffix == ".onnx":
        return _onnx(path, label, said)
    why = "known are folders of ours, bundles, .onnx files, TorchScript (.pt, .ts), networks by name and FILE.py:factory"
    raise UsageError(f"{label}: {printable(name)} is nothing that answers", why=why)


def _inside(folder: Path) -> str:
    found = [one.parent.name for one in sorted(folder.glob(f"*/{MANIFEST}")) if _is_comparable(one.parent)]
    what = "it is a run" if (folder / _RUN).is_file() else "it is no artifact"
    return f"{what}; in it are {', '.join(map(printable, found))}" if found else f"{what}, and there is none in it"


def _is_comparable(folder: Path) -> bool:
    try:
        return not folder.name.endswith(UNFINISHED) and read_artifact(folder).format in _COMPARED
    except UsageError:
        return False


def _ours(found: Artifact, name: str, label: str, said: Said) -> Side:
    if found.format not in _COMPARED:
        raise UsageError(f"{label}: {printable(name)} is a {found.format.value}, which answers nothing")
    if found.format is Format.ENGINE and not runtimes.is_engine(found):
        raise UsageError(f"{label}: {printable(name)} is an engine of no runtime that is known here")
    if runtimes.runs_code(found):
        _check_trust(name, label, said)
    literal = label in said.literal
    _refuse_literal(literal and found.format is not Format.ONNX, name, label)
    return Side(
        label=label,
        name=name,
        kind=_kind(found, literal),
        precision=found.precision,
        inputs=found.inputs,
        outputs=found.outputs,
        layout="nchw",
        preprocess=found.preprocess,
        classes=found.classes,
        open=_opener(found, literal),
        model=found,
        is_ours=True,
        has_threads=found.format is not Format.ENGINE or _threads_key(found) is not None,
    )


def _onnx(path: Path, label: str, said: Said) -> Side:
    found, literal = foreign.onnx_file(path), label in said.literal
    return Side(
        label=label,
        name=str(path),
        kind=_kind(found, literal),
        precision=found.precision,
        inputs=found.inputs,
        outputs=found.outputs,
        layout=said.layouts.get(label, "nchw"),
        preprocess=None,
        classes=(),
        open=lambda threads: _opened(path, threads, literal=literal),
        model=found,
    )


def _opened(path: Path, threads: int, *, literal: bool) -> Session:
    """A session on a stranger's file. What it does not run for may be an opset that its operators were not written in."""
    try:
        return onnxruntime.reference(path, threads=threads, optimise=not literal)
    except DeploykitError as error:
        why = f"{error.why}; the file says that it is of opset {foreign.opset(path)}"
        fix = "export it again, or let it say the opset that its operators were written in"
        raise DeploykitError(error.what, why=why, fix=fix) from error


def _check_trust(name: str, label: str, said: Said) -> None:
    if not said.trust:
        why = "loading it runs the program in it, whatever stands in a manifest beside it"
        raise UsageError(f"{label}: {printable(name)} is TorchScript", why=why, fix="--trust, if you know its maker")


def _script(name: str, label: str, said: Said, other: Side | None) -> Side:
    if not _has_program(Path(name)):
        why = "there is no program in it: a checkpoint has weights alone"
        fix = "name the network, such as resnet18 or FILE.py:factory, and its checkpoint with --weights FILE"
        raise UsageError(f"{label}: {printable(name)} is no TorchScript that can be loaded", why=why, fix=fix)
    _check_trust(name, label, said)
    _refuse_literal(label in said.literal, name, label)
    inputs = () if other is None else tuple(replace(other.canonical(spec), name="input") for spec in other.inputs)
    given = given_preprocess(said)
    if other is None and given is not None:
        inputs = (TensorSpec("input", "float32", ("batch", *given.shape)),)
    if len(inputs) != 1:
        why = "TorchScript does not say what it takes, nor does anything else"
        raise UsageError(
            f"{label}: cannot feed {printable(name)}", why=why, fix="--preprocess crop=224 and the keys that it needs"
        )
    found = foreign.torchscript_file(Path(name), inputs)
    _check_script(found)
    return Side(
        label=label,
        name=name,
        kind="TorchScript from elsewhere",
        precision=Precision.FP32,
        inputs=found.inputs,
        outputs=found.outputs,
        layout="nchw",
        preprocess=None,
        classes=(),
        open=_opener(found, literal=False),
        model=found,
    )


def _check_script(found: Artifact) -> None:
    script.check_members(found.path)
    try:
        torchscript.load(found).close()
    except RuntimeError as error:
        why = str(error).strip().partition("\n")[0]
        raise UsageError(f"{printable(found.path)} is no TorchScript that can be loaded", why=why) from error


def _network(name: str, label: str, said: Said) -> Side:
    overrides = {"model.weights": said.weights, "model.trust": "true" if said.trust else "false", **said.args}
    overrides |= {f"preprocess.{key}": value for key, value in said.preprocess.items()}
    here = Path.cwd()
    content = {"name": "parity", "model": {"name": name}}
    asked = recipe.parse(content, base=here, source="the command line", overrides=overrides, overrides_base=here)
    _refuse_literal(label in said.literal, name, label)
    try:
        found = models.load(asked.model, asked.preprocess)
    except UsageError as error:
        if ":" not in name and ("/" in name or "." in name):
            raise UsageError(f"{label}: there is no {printable(name)}", fix=like(Path(name))) from error
        raise
    inputs = (TensorSpec("image", "float32", (1 if found.task == "detect" else "batch", *found.preprocess.shape)),)
    outputs = _answered_by(found)
    return Side(
        label=label,
        name=name,
        kind=f"PyTorch, {found.weights}",
        precision=Precision.FP32,
        inputs=inputs,
        outputs=outputs,
        layout="nchw",
        preprocess=found.preprocess,
        classes=found.classes,
        open=lambda threads: TorchThreads(ModuleSession(found.module, inputs, outputs), threads),
        module=found.module,
        is_ours=True,
    )


def _answered_by(found: models.Model) -> tuple[TensorSpec, ...]:
    """The outputs of a network. What a detector finds on a black picture has the types and sizes of all that it finds."""
    if found.task == "segment":
        return (TensorSpec(found.outputs[0], "float32", ("batch", found.num_classes, *found.preprocess.crop)),)
    if found.task != "detect":
        return (TensorSpec(found.outputs[0], "float32", ("batch", found.num_classes)),)
    answer = torch_answer(found, np.zeros(found.preprocess.shape, np.float32))
    return tuple(TensorSpec(name, answer[name].dtype.name, ("boxes", *answer[name].shape[1:])) for name in found.outputs)


def _given(said: Said) -> PreprocessTable | None:
    if not said.preprocess:
        return None
    overrides = {f"preprocess.{key}": value for key, value in said.preprocess.items()}
    content = {"name": "parity", "model": {"name": "unknown"}}
    return recipe.parse(content, base=Path.cwd(), source="the command line", overrides=overrides).preprocess


def _refuse_literal(is_meaningless: bool, name: str, label: str) -> None:
    if is_meaningless:
        raise UsageError(
            f"--literal {label}: {printable(name)} is no ONNX graph", why="only those are optimized when they are opened"
        )


def _is_script(name: str) -> bool:
    path = Path(name)
    return path.is_file() and path.suffix in _SCRIPTS and artifact_of(path) is None


def _has_program(path: Path) -> bool:
    """Whether it is a zip with a folder `code`, which torch.jit.save writes and torch.save does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _kind(found: Artifact, literal: bool) -> str:
    if found.format is Format.ENGINE:
        return f"engine of {found.facts['runtime']}"
    if found.format is Format.TORCHSCRIPT:
        return "TorchScript"
    return f"ONNX graph on ONNX Runtime {onnxruntime.VERSION}, {'executed literally' if literal else 'optimized'}"


def _opener(found: Artifact, literal: bool) -> Callable[[int], Session]:
    if found.format is Format.TORCHSCRIPT:
        return lambda threads: TorchThreads(torchscript.load(found), threads)
    if found.format is Format.ENGINE:
        runtime, key = runtimes.get(str(found.facts["runtime"])), _threads_key(found)
        return lambda threads: runtime.load(
            replace(found, settings={**found.settings, key: threads}) if threads and key is not None else found
        )
    if literal:
        return lambda threads: onnxruntime.reference(found.path, threads=threads)
    return lambda threads: onnxruntime.optimized(found.path, threads=threads or available_cores())


def _threads_key(engine: Artifact) -> str | None:
    """What the settings of an engine call the number of its threads; None where it has none."""
    return runtimes.REGISTRY[str(engine.facts["runtime"])].threads


class ModuleSession:
    """A `Session` on a PyTorch module with one input, on the CPU."""

    def __init__(self, module: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._module, self._inputs, self._outputs = module, inputs, outputs
        self._fed = torch.empty(0)
        self._answers: list[torch.Tensor] = []

    def feed(self, inputs: Tensors) -> None:
        """Copy the input into a tensor."""
        check_inputs(inputs, [(spec.name, spec.dtype, spec.shape) for spec in self._inputs])
        self._fed = torch.from_numpy(np.array(inputs[self._inputs[0].name]))

    def execute(self) -> None:
        """Run once."""
        with torch.inference_mode():
            answer = self._module(self._fed)
        self._answers = list(answer) if isinstance(answer, (tuple, list)) else [answer]

    def fetch(self) -> Tensors:
        """The answers of the last execute, copied."""
        return {spec.name: np.array(value.numpy()) for spec, value in zip(self._outputs, self._answers, strict=True)}

    def close(self) -> None:
        """Drop the module."""
        del self._module


class TorchThreads:
    """A `Session` of torch that executes with so many threads (0: as many as torch has) and leaves torch's own number alone."""

    def __init__(self, session: Session, threads: int) -> None:
        self._session, self._threads = session, threads
        self.feed, self.fetch, self.close = session.feed, session.fetch, session.close

    def execute(self) -> None:
        """Run once."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            self._session.execute()
        finally:
            torch.set_num_threads(before)
