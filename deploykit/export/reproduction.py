"""A small folder that shows on any machine what neither exporter could do: for a report to their authors, or to us."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from deploykit.errors import StageError
from deploykit.jsonable import to_json
from deploykit.machine import installed_version
from deploykit.models import Model, user
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable

_PACKAGES = ("deploykit", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
# Weights above this are named and not copied: the folder is to fit into a message.
_SMALL_BYTES = 32 << 20
_SCRIPT = '''"""Run both exporters of torch on the network and the input beside this file, and compare with PyTorch."""

import json
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file

from deploykit import models
from deploykit.recipe import ModelTable, PreprocessTable

here = Path(__file__).parent
said = json.loads((here / "network.json").read_text())
preprocess = {key: tuple(value) if isinstance(value, list) else value for key, value in said["preprocess"].items()}
table = said["model"]
if said["is_file"]:
    table["name"] = str(here / "code" / table["name"])
if table["weights"] not in ("default", "none"):
    table["weights"] = str(here / table["weights"])
model = models.load(ModelTable(**table), PreprocessTable(**preprocess))
module = model.module
if (here / "weights.safetensors").is_file():
    module.load_state_dict(load_file(here / "weights.safetensors"))
image = torch.from_numpy(np.load(here / "input.npy"))
with torch.inference_mode():
    wanted = module(image).numpy()
warnings.simplefilter("ignore")
for name, dynamo in (("new", True), ("legacy", False)):
    path = here / f"{name}.onnx"
    try:
        names = {"input_names": ["image"], "output_names": list(model.outputs), "verbose": False}
        torch.onnx.export(module, (image,), str(path), dynamo=dynamo, opset_version=said["opset"], **names)
        answer = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image.numpy()})[0]
        print(f"{name}: max|d| / max|y| {abs(answer - wanted).max() / abs(wanted).max():.3g}")
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
'''


class NoExporterError(StageError):
    """Neither exporter wrote a file that answers like PyTorch. `findings` says by exporter what went wrong."""

    def __init__(self, name: str, findings: Mapping[str, str], *, fix: str = "") -> None:
        super().__init__(
            f"neither of torch's exporters can do {name}",
            problems=[f"{exporter}: {finding}" for exporter, finding in findings.items()],
            fix=fix,
        )
        self.name, self.findings = name, findings


def reproduce(
    error: NoExporterError,
    model: Model,
    image: NDArray[np.float32],
    tables: tuple[ModelTable, PreprocessTable],
    settings: ExportTable,
    folder: Path,
) -> NoExporterError:
    """Write what shows `error` into `folder`, and give the same error with the folder's name.

    `image` is one preprocessed input (1, C, H, W); `tables` say which network it is. Weights up to 32 MiB are copied, and so is a
    user's FILE.py with what it imported from its own folder. No path of this machine is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.clone().contiguous() for name, value in model.module.state_dict().items()}
    has_weights = sum(value.numel() * value.element_size() for value in state.values()) <= _SMALL_BYTES
    if has_weights:
        save_file(state, folder / "weights.safetensors")
    network, preprocess = tables
    _copy_code(network, folder / "code")
    said: dict[str, Any] = {
        "opset": settings.opset,
        "is_file": _is_file(network),
        "model": _given(_portable(network, model, has_weights=has_weights)),
        "preprocess": _given(preprocess),
    }
    (folder / "network.json").write_text(json.dumps(said, indent=1) + "\n")
    (folder / "reproduce.py").write_text(_SCRIPT)
    np.save(folder / "input.npy", image)
    readme = _readme(error, model, network, has_weights=has_weights)
    (folder / "README.md").write_text(_without_paths(readme, network))
    return NoExporterError(error.name, error.findings, fix=f"python {folder / 'reproduce.py'} shows it again")


def _is_file(table: ModelTable) -> bool:
    """Whether the network is FILE.py:factory."""
    return table.is_user_code and table.name.rpartition(":")[0].endswith(".py")


def _copy_code(table: ModelTable, folder: Path) -> None:
    """Copy FILE.py and what it imported from its own folder; nothing for a network that a name is enough for."""
    if not _is_file(table):
        return
    root = Path(table.name.rpartition(":")[0]).absolute().parent
    for path in user.source_files(table.name):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _portable(table: ModelTable, model: Model, *, has_weights: bool) -> ModelTable:
    """The table as another machine can read it: names of files instead of paths, and no weights where these are copied."""
    name = Path(table.name).name if _is_file(table) else table.name
    if has_weights:
        # Random weights are replaced by the copied ones, and these say how many classes there are.
        return replace(table, name=name, weights="none", weights_key=None, trust=False, classes=model.num_classes)
    return replace(table, name=name, weights=Path(table.weights).name)


def _given(table: ModelTable | PreprocessTable) -> dict[str, Any]:
    return {key: value for key, value in dict(to_json(table)).items() if value is not None}  # type: ignore[arg-type]


def _without_paths(text: str, table: ModelTable) -> str:
    """What was said about a network of the user's, without the folder that its file lies in."""
    if not _is_file(table):
        return text
    parent = Path(table.name.rpartition(":")[0]).parent
    for folder in (parent.absolute(), parent):
        text = text.replace(f"{folder}/", "")
    return text


def _readme(error: NoExporterError, model: Model, table: ModelTable, *, has_weights: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := installed_version(name)))
    is_file = table.weights not in ("default", "none")
    too_large = "too large to be copied" + "; put the file into this folder" * is_file
    weights = "in `weights.safetensors`" if has_weights else f"{model.weights}; {too_large}"
    lines = [f"# {error.what}", "", "`python reproduce.py` runs both exporters again.", "", f"Weights: {weights}."]
    lines += [f"With {versions}.", "", *(f"- {exporter}: {finding}" for exporter, finding in error.findings.items())]
    return "\n".join(lines) + "\n"
