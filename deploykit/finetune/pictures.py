"""What a network sees: the maps of named layers on one picture, and the weights of those that read the picture itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from deploykit.data import Images
from deploykit.models import Model

_MAPS = 64  # the first so many of a layer
_SIDE = 512  # pixels of a sheet, about


def draw(model: Model, layers: list[str], images: Images, folder: Path) -> list[dict[str, str]]:
    """Write PNG sheets of these layers into `folder`; the first of `images` is what they see.

    Returns, in order, each sheet's layer, what it shows and its file. A layer whose answer is not one tensor of maps (N, C, H, W)
    or of numbers (N, C) has no sheet of activations.
    """
    if not layers:
        return []
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, answer: object) -> None:
            if isinstance(answer, torch.Tensor):
                seen[name] = answer.detach()[0].float().cpu()

        hooks.append(model.module.get_submodule(name).register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    model.module.eval()
    try:
        for name in layers:
            keep(name)
        device = next(model.module.parameters()).device
        with torch.inference_mode():
            model.module(torch.from_numpy(images.array(0, model.preprocess)[None]).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    sheets = []
    for name in layers:
        part = model.module.get_submodule(name)
        if isinstance(part, nn.Conv2d) and part.in_channels == len(model.preprocess.channels) and part.groups == 1:
            kernels = part.weight.detach().float().cpu().numpy()
            sheets.append(_written(folder, name, "weights", _sheet(kernels)))
        if name in seen and seen[name].dim() in (1, 3):
            maps = seen[name].reshape(len(seen[name]), 1, *(seen[name].shape[1:] or (1, 1))).numpy()
            sheets.append(_written(folder, name, "activations", _sheet(maps)))
    return sheets


def _written(folder: Path, layer: str, what: str, png: bytes) -> dict[str, str]:
    file = f"{what}-{layer}.png"
    (folder / file).write_bytes(png)
    return {"layer": layer, "what": what, "file": file}


def _sheet(maps: NDArray[np.float32]) -> bytes:
    """A PNG of maps (N, 1 or 3, H, W) side by side, each from its least value (black) to its largest (white)."""
    maps = maps[:_MAPS]
    low, high = (getattr(maps, which)(axis=(1, 2, 3), keepdims=True) for which in ("min", "max"))
    pixels = (255 * (maps - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).astype(np.uint8)
    columns = int(np.ceil(np.sqrt(len(pixels))))
    height, width = pixels.shape[2:]
    scale = max(1, _SIDE // (columns * (max(height, width) + 1)))
    tile_height, tile_width = height * scale + 1, width * scale + 1
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * tile_width + 1, rows * tile_height + 1), (128, 128, 128))
    for index, picture in enumerate(pixels.transpose(0, 2, 3, 1)):
        tile = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).convert("RGB")
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (index % columns * tile_width + 1, index // columns * tile_height + 1))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
