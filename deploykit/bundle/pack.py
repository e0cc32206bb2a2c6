"""Run -> Bundle: what a finished run made, as one file that is carried to a device."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit import artifact, publish
from deploykit import recipe as recipes
from deploykit.artifact import SAMPLES, Artifact, read_artifact
from deploykit.bundle import (
    BLOBS,
    CLASSES,
    DEVICE_HALF,
    GRAPH,
    MANIFEST,
    MODELS,
    PREPROCESS,
    RECIPE,
    SIGNATURE,
    Blob,
    Manifest,
    archive,
    check,
    device_half,
    dump,
    is_bundle,
    parse,
    require_whole,
    sbom,
    signature,
)
from deploykit.errors import UsageError, like, printable, translating_os_errors
from deploykit.gate import EXIT_CODES, Verdict, parse_rule
from deploykit.jsonable import to_json
from deploykit.machine import installed_version

SUFFIX = ".bundle"
_RESULT, _REPORT, _OBSERVATIONS = "result.json", "report.html", "calibrate"
# What a device needs to know of how a graph was made: what it is, and which layers were to run in int8.
_FACTS = (
    "model",
    "rules",
    "cpu",
    "float_type",
    "weight_bits",
    "int8_layers",
    "float_layers",
    "kept_float",
    "task",
    "heads",
    "scene",
    "tensorrt",
)
_TOOLS = ("deploykit", "numpy", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Packed:
    """A bundle that was packed: where it lies, its size in bytes, and what it holds."""

    path: Path
    size: int
    manifest: Manifest
    is_signed: bool


def pack(
    run: Path,
    to: Path,
    *,
    release: int,
    key: Path | None = None,
    timing_caches: Sequence[Path] = (),
    as_folder: bool = False,
    failed_gates: bool = False,
) -> Packed:
    """Pack the finished run in the folder `run` into `to`, as one file or as a folder; with `key`, signed by it.

    For each runtime of the recipe that devices have, the graph that its engine is built from goes in, once: the quantized one
    where there is one. With `failed_gates` a run goes in whose gates failed or cannot be decided; the manifest keeps what they
    said. `release` orders the bundles of one network: a device takes a lower one only when it is told to. `key` is a private key
    of OpenSSH.

    Raises UsageError when `run` is not a finished run, or one whose gates did not pass, when a graph is not there or keeps its
    weights in other files, when `to` cannot be written or is there and is no bundle, or the key cannot sign.
    """
    recipe, verdict = _recipe_of(run), _verdict_of(run, failed_gates)
    _refuse_existing(to, as_folder)
    with tempfile.TemporaryDirectory(dir=to.absolute().parent, prefix=".packing-") as scratch:
        tree, folder = Path(scratch, "tree"), Path(scratch, "bundle")
        portable = _portable(run, recipe, tree)
        beside = _beside(run, timing_caches, tree)
        name, gate = _plain(str(recipe["name"])), _latency_rules(recipe)
        manifest = Manifest(name, release, gate, _blobs(tree, portable), _blobs(tree, beside), verdict)
        (tree / "sbom.cdx.json").write_bytes(sbom.cyclonedx(manifest, _tools()))
        manifest = replace(manifest, beside=_blobs(tree, [*beside, "sbom.cdx.json"]))
        content = dump(manifest)
        parse(content, printable(run))
        signed = None if key is None else signature.sign(content, key)
        _fill(folder, tree, manifest, content, signed)
        require_whole(folder, check(folder))
        size = _publish(folder, to, manifest, as_folder)
    return Packed(to, size, manifest, signed is not None)


def _recipe_of(run: Path) -> Mapping[str, Any]:
    for name in (RECIPE, _RESULT):
        if not (run / name).is_file():
            raise UsageError(f"{printable(run)} is not a finished run", why=f"it has no {name}", fix="deploykit run, then pack")
    found = to_json(recipes.load(run / RECIPE))
    assert isinstance(found, dict)
    return found


def _verdict_of(run: Path, failed_gates: bool) -> str:
    """What the run's gates said, empty where it had none. Raises UsageError for another one than `pass` that nobody asked for."""
    path = run / _RESULT
    try:
        found = json.loads(path.read_bytes())
        code, said = found["exit_code"], found["verdict"]
        verdict = None if said is None else Verdict(said)
        if code != EXIT_CODES[verdict]:
            raise ValueError(f"its exit code is {code!r}, and its verdict {said!r}")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(f"{printable(path)} is no result of a run", why=why, fix="deploykit run, then pack") from error
    if code and not failed_gates:
        why = f"its gates say: {said} (exit code {code})"
        fix = "mend it and run again, or --failed-gates, which the bundle keeps"
        raise UsageError(f"{printable(run)} did not pass its gates", why=why, fix=fix)
    return "" if verdict is None else verdict.value


def _refuse_existing(to: Path, as_folder: bool) -> None:
    if why := publish.why_not_writable(to.absolute()):
        raise UsageError(f"cannot write {printable(to)}", why=why, fix="choose another name with --output")
    with translating_os_errors("read", to):
        if to.exists() and (as_folder or not is_bundle(to)):
            what = f"{printable(to)} is there already{'' if as_folder else ', and is no bundle'}"
            raise UsageError(what, fix="choose another name with --output")


def _portable(run: Path, recipe: Mapping[str, Any], tree: Path) -> list[str]:
    """Write the parts that make the identity into `tree`; their paths."""
    models = {}
    for runtime in filter(device_half.has, recipe["build"]["runtimes"]):
        model = _model_for(run, runtime, recipe)
        if runtime == "tensorrt":  # how its engine is to be built on the device
            model = replace(model, facts={**model.facts, "tensorrt": recipe["tensorrt"]})
        models[f"{runtime}-{model.precision.value}"] = model
    if not models:
        raise UsageError(f"{printable(run)} has no graph to deploy", fix="name a runtime in build.runtimes (--to onnxruntime)")
    for name, model in models.items():
        _write_model(model, tree / MODELS / name)
    one = next(iter(models.values()))
    (tree / CLASSES).write_bytes(_json(list(one.classes)))
    (tree / PREPROCESS).write_bytes(_json(to_json(one.preprocess)))
    (tree / DEVICE_HALF).write_bytes(device_half.zipapp())
    shutil.copyfile(run / RECIPE, tree / RECIPE)
    if (run / _OBSERVATIONS).is_dir():
        observed = read_artifact(run / _OBSERVATIONS)
        (tree / "calibration").mkdir()
        shutil.copyfile(observed.path, tree / "calibration" / observed.path.name)
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())


def _beside(run: Path, timing_caches: Sequence[Path], tree: Path) -> list[str]:
    sources = {f"reports/{name}": run / name for name in (_RESULT, _REPORT) if (run / name).is_file()}
    for cache in timing_caches:
        if not cache.is_file():
            why = "it is not a file" if cache.exists() else ""
            raise UsageError(f"cannot read the timing cache {printable(cache)}", why=why, fix="" if why else like(cache))
        name = f"timing-caches/{_plain(cache.name)}"
        if name.casefold() in (other.casefold() for other in sources):
            raise UsageError(f"two timing caches are called {_plain(cache.name)} in the bundle", fix="rename one of them")
        sources[name] = cache
    for name, source in sources.items():
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, tree / name)
    return sorted(sources)


def _model_for(run: Path, runtime: str, recipe: Mapping[str, Any]) -> Artifact:
    """The graph that the recipe has the engine of `runtime` built from, and no other one that lies there."""
    name = "export-onnx" if recipe["quantize"] is None else f"quantize-{runtime}"
    name += "-fp16" if recipe["build"]["float_type"] == "fp16" else ""
    if not (run / name / artifact.MANIFEST).is_file():
        why = f"its recipe makes {name}, which is not there"
        raise UsageError(f"{printable(run)} has no graph for {runtime}", why=why, fix="deploykit run again")
    return read_artifact(run / name)


def _write_model(model: Artifact, folder: Path) -> None:
    """The graph and its golden samples, with a manifest that leaves out where and by what versions they were made.

    Those are what differs between two runs that made the same bytes; `reports/result.json` keeps them.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(model.path, folder / GRAPH)
    shutil.copyfile(model.folder / SAMPLES, folder / SAMPLES)
    facts = {name: model.facts[name] for name in _FACTS if name in model.facts}
    plain = replace(model, path=folder / GRAPH, key="", parents=(), settings={}, tools={}, facts=facts)
    artifact.write_manifest(folder, plain)


def _fill(folder: Path, tree: Path, manifest: Manifest, content: bytes, signed: bytes | None) -> None:
    (folder / BLOBS).mkdir(parents=True)
    for name, blob in manifest.files.items():
        if not (folder / blob.entry).exists():
            shutil.copyfile(tree / name, folder / blob.entry)
    (folder / MANIFEST).write_bytes(content)
    if signed is not None:
        (folder / SIGNATURE).write_bytes(signed)


def _publish(folder: Path, to: Path, manifest: Manifest, as_folder: bool) -> int:
    names = [MANIFEST, *([SIGNATURE] if (folder / SIGNATURE).exists() else [])]
    names += sorted({blob.entry for blob in manifest.files.values()})
    if as_folder:
        with publish.directory(to) as final:
            shutil.copytree(folder, final, dirs_exist_ok=True)
        return sum((to / name).stat().st_size for name in names)
    archive.write(to, [(name, folder / name) for name in names])
    return to.stat().st_size


def _blobs(tree: Path, names: Sequence[str]) -> dict[str, Blob]:
    return {name: Blob(artifact.digest_file(tree / name), (tree / name).stat().st_size) for name in sorted(names)}


def _latency_rules(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(text for text in recipe["gate"] if parse_rule(text).metric == "latency")


def _plain(name: str) -> str:
    """A name as one part of a canonical path: what is no letter, digit, dot, dash or underscore becomes a dash."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    return plain.lstrip(".-")[:80] or "network"


def _tools() -> dict[str, str]:
    return {name: version for name in _TOOLS if (version := installed_version(name))}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()
