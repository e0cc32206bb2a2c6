"""A bisection as text: the culprit first, then the layers that stand out most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploykit.errors import printable

_LISTED = 8


def as_text(found: Mapping[str, Any]) -> str:
    """Lines for people; `found` is what `command.compare` gives. Names come from files that may be a stranger's."""
    return "".join(f"{printable(line)}\n" for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    culprit = found["culprit"]
    yield from (f"preprocessing differs: {difference}" for difference in found["preprocessing"])
    if found["failure"]:
        yield f"{found['b']} does not run: {found['failure'].splitlines()[0]}"
    if culprit is None:
        yield f"no layer of {found['b']} diverges beyond what its precision explains ({_images(found)})"
    else:
        where = f" of module {culprit['module']}" if culprit["module"] else ""
        yield f"{culprit['node']} ({culprit['op']}{where}) is the first beyond what its precision explains ({_images(found)})"
        yield from (f"  {hint}" for hint in found["hints"])
        channel = "" if culprit["channel"] is None else f", most in channel {culprit['channel']}"
        yield f"  its own error: {_own(culprit)}; explained: {culprit['explained_db']:.1f} dB{channel}"
        yield f"  {found['proven']}"
    others = [layer["node"] for layer in found["suspects"][1:]]
    if others:
        yield f"  also beyond, after it: {', '.join(others[:_LISTED])}{', ...' * (len(others) > _LISTED)}"
    if found["missing"]:
        named = ", ".join(found["missing"][:_LISTED]) + ", ..." * (len(found["missing"]) > _LISTED)
        yield f"not compared, as B has no tensor of theirs: {named}"
    if found["runtime"] == "tensorrt":
        yield "on TensorRT, every tensor an output: nothing is fused across one, so these are not the kernels of an engine"
    yield ""
    yield from _table(sorted(found["layers"], key=lambda layer: -float(layer["excess_db"]))[:_LISTED])
    yield ""
    machine, fed = found["machine"], found["fed"]
    yield f"{'1 input' if fed['images'] == 1 else str(fed['images']) + ' inputs'}: {fed['origin']}"
    yield f"on {machine['cpu']} ({', '.join(machine['features']) or 'no CPU feature that decides about int8'})"


def _images(found: Mapping[str, Any]) -> str:
    images = "1 image" if found["images"] == 1 else f"{found['images']} images"
    return f"{images}, {'1 pass' if found['passes'] == 1 else '2 passes'}"


def proof_of(found: Mapping[str, Any]) -> str:
    """What became of the output with the culprit alone as in the reference, in words; empty without a culprit."""
    culprit, proof = found["culprit"], found["proof"]
    if culprit is None:
        return ""
    if found["passes"] == 1:
        return f"proof: not tried, {proof['why']}"
    before, after = (_ratio(proof[key], "does not run") for key in ("before_db", "after_db"))
    told = f"proof: with {culprit['node']} as in the reference, SQNR at the output goes from {before} to {after}"
    return f"{told}: {proof['why']}" if proof["why"] else told


def _own(layer: Mapping[str, Any]) -> str:
    if layer["failure"]:
        return f"it does not run alone, {layer['failure'].splitlines()[0]}"
    return _ratio(layer["own_db"], "another shape, or not finite")


def _ratio(decibels: float | None, otherwise: str) -> str:
    return otherwise if decibels is None else f"{decibels:.1f} dB"


def _table(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [("layer", "op", "own, dB", "explained", "beyond", "with all before")]
    rows += [
        (
            layer["node"],
            layer["op"],
            "-" if layer["own_db"] is None else f"{layer['own_db']:.1f}",
            f"{layer['explained_db']:.1f}",
            f"{layer['excess_db']:+.1f}",
            "-" if layer["total_db"] is None else f"{layer['total_db']:.1f}",
        )
        for layer in layers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
