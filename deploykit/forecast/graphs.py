"""A model that somebody names -> its kernels: a bundle, an artifact's folder, an ONNX file, or a name.

The kernels of most networks that have a name come with deploykit; any other is built and exported in memory, with random weights,
because latency does not depend on them. Everything else is read without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from deploykit import bundle
from deploykit.artifact import MANIFEST, Artifact, Format, artifact_of, digest_file, read_artifact
from deploykit.errors import UsageError, printable
from deploykit.intake import door
from deploykit.targets import known, layers
from deploykit.targets.layers import Network


def network_of(model: str, *, size: int | None = None, precision: str | None = None) -> Network:
    """The kernels of a model; `precision` picks one graph of a bundle, `size` is for inputs that leave it open.

    Raises UsageError for what is none of those kinds, ModelError for an unknown name.
    """
    path = Path(model)
    if bundle.is_bundle(path):
        return _of_bundle(path, precision, size)
    if (path / MANIFEST).is_file():
        found = read_artifact(path)
        if found.format is not Format.ONNX:
            raise UsageError(f"{printable(path)} holds no ONNX graph", fix="name the folder of the portable model")
        return replace(layers.read(found.path, size=size), name=str(found.facts.get("model") or path.name))
    if path.suffix == ".onnx" or path.is_file():
        if artifact_of(path) is None:
            door.onnx_file(path)
        return layers.read(path, size=size)
    return known.network(model) or built(model)


def of_engine(engine: Artifact) -> Network:
    """The kernels of the portable graph that an engine was built from, which lies in a folder beside the engine's, as in a run.

    Raises UsageError when it is not there.
    """
    for path in sorted(engine.folder.absolute().parent.glob("*/*.onnx")):
        if path.parent != engine.folder.absolute() and digest_file(path) in engine.parents:
            return replace(layers.read(path), name=str(engine.facts.get("model") or path.stem))
    raise UsageError(
        f"the graph that {printable(engine.folder)} was built from is not beside it",
        why="kernels are counted in the portable graph, not in the engine",
        fix="name an engine in the folder of its run, or an ONNX file",
    )


def of_bundle(path: Path, label: str, size: int | None = None) -> Network:
    """The kernels of one graph of a bundle, such as onnxruntime-int8. Raises UsageError when it is not there."""
    with bundle.opened(path) as found:
        blob = found.manifest.portable.get(f"{bundle.MODELS}/{label}/{bundle.GRAPH}")
        if blob is None:
            raise UsageError(f"{printable(path)} holds no ONNX graph {printable(label)}".rstrip())
        content = b"".join(bundle.pieces(found, blob))
    with TemporaryDirectory() as folder:
        graph = Path(folder, f"{label}.onnx")
        graph.write_bytes(content)
        door.onnx_file(graph)
        return layers.read(graph, size=size)


def _of_bundle(path: Path, precision: str | None, size: int | None) -> Network:
    """The graph for TensorRT where there is one, in the precision that is asked for."""
    with bundle.opened(path) as found:
        names = sorted(found.manifest.models, key=lambda name: (not name.startswith("tensorrt"), not name.endswith("int8"), name))
    chosen = next((name for name in names if precision is None or name.endswith(f"-{precision}")), names[0] if names else "")
    return of_bundle(path, chosen, size)


def built(name: str) -> Network:
    """The kernels of a network by its name, as torch exports it now. Raises ModelError for an unknown one."""
    import numpy as np
    import onnx_ir as ir

    from deploykit import models
    from deploykit.export import exporters
    from deploykit.recipe import ExportTable, ModelTable

    found = models.load(ModelTable(name=name, weights="none"))
    settings = ExportTable(batch=1)
    inputs = np.zeros((1, *found.preprocess.shape), np.float32)
    graph = exporters.exported(found, inputs, settings, exporters.choice(name, settings)[0], outputs=found.outputs)
    return layers.of_model(ir.to_proto(graph), name=name)
