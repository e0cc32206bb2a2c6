"""One run as its stages see it: what they read, where they write, and that what is there from the same is not made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from deploykit import artifact
from deploykit.artifact import Artifact
from deploykit.jsonable import digest, to_json
from deploykit.machine import installed_version
from deploykit.progress import Progress
from deploykit.recipe import Recipe
from deploykit.report.result import Stage
from deploykit.sources import Sources

_TOOLS = (
    *("numpy", "pillow", "scikit-learn", "safetensors", "torch", "torchvision", "timm"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
)


@dataclass
class Work:
    """One run: what its stages read, where they write, and what became of each."""

    recipe: Recipe
    out: Path
    sources: Sources
    progress: Progress
    clock: Callable[[], float]
    stages: list[Stage] = field(default_factory=list)
    made: dict[str, Artifact] = field(default_factory=dict)

    @cached_property
    def tools(self) -> Mapping[str, str | None]:
        """What makes the stages: versions, and the digest of this package's own code, which changes between versions."""
        package = Path(__file__).parent
        code = [artifact.digest_file(path) for path in sorted(package.rglob("*.py"))]
        return {"code": digest(code), **{tool: installed_version(tool) for tool in _TOOLS}}

    def stage(
        self,
        name: str,
        make: Callable[[Path], Artifact],
        *,
        settings: object = None,
        parents: Sequence[str],
        summary: Callable[[Artifact], str],
    ) -> Artifact:
        """The artifact of one stage: the finished one if it was made from the same, else one made now."""
        start = self.clock()
        key = digest({"stage": name, "settings": to_json(settings), "parents": list(parents), "tools": self.tools})
        final = self.out / name
        found = artifact.find(final, key)
        made = self.made[name] = found if found is not None else artifact.make(final, key, make)
        status = "done" if found is None else "skipped"
        self.stages.append(Stage(name, status, self.clock() - start, name, summary(made)))
        return made
