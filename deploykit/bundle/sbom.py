"""What a bundle is made of, as a CycloneDX 1.6 document (cyclonedx.org/docs/1.6/json)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from deploykit.bundle import Manifest

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/deploykit/deploykit/bundle")


def cyclonedx(manifest: Manifest, tools: Mapping[str, str]) -> bytes:
    """The document for the portable files of `manifest` and the packages, by version, that made them.

    It has no date and a serial number that follows from the identity, so that the same bundle has the same document.
    """
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, manifest.id)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "bom-ref": manifest.id,
                "name": manifest.name,
                "version": str(manifest.release),
                "hashes": [{"alg": "SHA-256", "content": manifest.id}],
            },
        },
        "components": [*_files(manifest), *(_library(name, version) for name, version in sorted(tools.items()))],
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "type": "machine-learning-model" if name.endswith(".onnx") else "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": blob.sha256}],
        }
        for name, blob in sorted(manifest.portable.items())
    ]


def _library(name: str, version: str) -> dict[str, Any]:
    package = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": package, "name": name, "version": version, "purl": package}
