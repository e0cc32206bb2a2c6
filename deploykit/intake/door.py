"""One door for files that are not our own: looked through first, then parsed by a child process that can do little.

`checkpoint` reads weights, `onnx_file` admits a graph to the libraries that parse it. Nothing in here imports one of those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError, ModelError, UsageError, printable
from deploykit.intake import child, onnx, safetensors
from deploykit.intake.child import Limits
from deploykit.intake.refused import Refused

_CHECKPOINT = Limits(cpu_s=3, memory_bytes=1 << 30)
_GIB = 1 << 30


def checkpoint(path: Path) -> Any:
    """What `torch.save` left in the file, as `deploykit.intake.checkpoint.read` tells it: tensors by where their numbers lie.

    It is read in a child process and nothing in it is unpickled. Raises ModelError; OSError when it cannot be opened.
    """
    try:
        if path.suffix == ".pt2":
            why = "it is an exported program (.pt2), and loading one can run code that is in it, in every torch so far"
            raise Refused(
                why, told="cannot take weights from {}", fix="save the network's weights: torch.save(model.state_dict(), FILE)"
            )
        # The older format is mapped whole, and its address space counts.
        return child.ask("checkpoint", path, Limits(_CHECKPOINT.cpu_s, _CHECKPOINT.memory_bytes + path.stat().st_size))
    except Refused as refused:
        raise _as(ModelError, refused, "cannot read the weights {}", path) from refused


def safetensors_file(path: Path) -> None:
    """Raise ModelError unless header and data fit each other. The library that reads the rest is safe in memory."""
    try:
        safetensors.check(path)
    except Refused as refused:
        raise _as(ModelError, refused, "cannot read the weights {}", path) from refused


def onnx_file(path: Path) -> onnx.Summary:
    """Look through an ONNX file; see `deploykit.intake.onnx`. Raises UsageError."""
    try:
        return onnx.check(path)
    except Refused as refused:
        raise _as(UsageError, refused, "{} is not an ONNX file that can be read", path) from refused
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}", why=(error.strerror or str(error)).lower()) from error


def graph_facts(path: Path) -> dict[str, Any]:
    """What an ONNX file says of itself, by `deploykit.intake.graphs.facts`, after it was looked through."""
    onnx_file(path)
    try:
        found: dict[str, Any] = child.ask("graph", path, _for(path))
    except Refused as refused:
        raise _as(UsageError, refused, "{} is not an ONNX file that can be read", path) from refused
    return found


def rehearse(path: Path) -> str:
    """Open an ONNX file that was looked through in ONNX Runtime, where it can do no harm, before anything is done with it here.

    Gives what ONNX Runtime has against the graph, which it will say again. Raises UsageError when opening it crashed, or took too
    much memory or time.
    """
    try:
        return str(child.ask("session", path, _for(path)))
    except Refused as refused:
        raise _as(UsageError, refused, "{} cannot be opened in ONNX Runtime", path) from refused


def _for(path: Path) -> Limits:
    """Parsing and optimizing a graph keeps up to four copies of its constants, and takes a second for 20 MB at most."""
    size = path.stat().st_size
    return Limits(cpu_s=4 + size // (20 << 20), memory_bytes=2 * _GIB + 4 * size)


def _as(kind: type[DeploykitError], refused: Refused, what: str, path: Path) -> DeploykitError:
    """The refusal as an error of ours; all its words may come from the file."""
    told = printable(refused.told or what).replace("{}", printable(path), 1)
    problems = [printable(problem) for problem in refused.problems]
    return kind(told, why=printable(refused.why), fix=printable(refused.fix), problems=problems)
