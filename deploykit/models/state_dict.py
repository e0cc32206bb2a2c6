"""Names to tensors, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class StateDict(dict[str, torch.Tensor]):
    """Names to tensors, with the module versions that PyTorch keeps beside them (None: the file had none)."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.versions = versions
        if versions is not None:
            # Where nn.Module.load_state_dict looks for them: MNASNet and others read old layouts by version.
            self._metadata = dict(versions)

    @classmethod
    def of(cls, content: Mapping[str, torch.Tensor]) -> StateDict:
        """A mapping as `torch.load` gives it, apart from any computation that its tensors belonged to."""
        versions = getattr(content, "_metadata", None)
        tensors = {name: tensor.detach() for name, tensor in content.items()}
        return cls(tensors, versions if isinstance(versions, Mapping) else None)

    def below(self, prefix: str) -> StateDict:
        """What is named `prefix`... , without it; `prefix` ends in a dot, as that of a module does, or is empty."""
        versions = self.versions
        if versions is not None:
            versions = {name[len(prefix) :]: value for name, value in versions.items() if f"{name}.".startswith(prefix)}
        return StateDict({name[len(prefix) :]: value for name, value in self.items() if name.startswith(prefix)}, versions)
