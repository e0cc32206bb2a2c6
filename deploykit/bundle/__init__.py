"""A bundle: blobs named by their SHA-256, and a manifest that says what each is called; the boundary to a device.

The identity covers what decides about answers: the graphs, their golden samples, preprocessing, class names, the recipe, the
ranges of calibration, and the device half. Reports, timing caches and the SBOM ride beside it: they have digests in the
manifest, so that a signature covers them, and are no part of the identity. Neither is the release number, which orders
bundles: the same inputs have the same identity whenever they are packed.

Nothing of a bundle is executed here, and nothing is written. The order of what is believed: the signature over the
manifest's bytes, then the manifest, then the digest of each blob, then what stands in the graphs.

This package's reading half runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit import artifact
from deploykit.artifact import SAMPLES
from deploykit.bundle import archive, signature
from deploykit.bundle.archive import Files
from deploykit.errors import UsageError, printable
from deploykit.gate import Verdict, parse_rule
from deploykit.jsonable import JSON, digest
from deploykit.runtimes import onnx_nodes

SCHEMA = 1
MANIFEST, SIGNATURE, BLOBS = "bundle.json", "bundle.json.sig", "blobs"
MODELS, GRAPH, DEVICE_HALF, CLASSES, PREPROCESS, RECIPE = (
    "models",
    "model.onnx",
    "device.pyz",
    "classes.json",
    "preprocess.json",
    "recipe.toml",
)
_MANIFEST_LIMIT_BYTES = 4 << 20
_LARGEST_BYTES = 1 << 40
_LARGEST_RELEASE = 2**53
_MODEL_FILES = (GRAPH, SAMPLES, artifact.MANIFEST)
# Nothing else, so that no graph hides under a name whose constants are not looked at.
_MODEL_FILE = re.compile(rf"{MODELS}/[a-z]+-[a-z0-9]+/({'|'.join(map(re.escape, _MODEL_FILES))})")
_VERDICTS = ("", *(verdict.value for verdict in Verdict))
_SHA256, _PLAIN = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Blob:
    """The content of one file: its SHA-256 (hex) and its size in bytes."""

    sha256: str
    size: int

    @property
    def entry(self) -> str:
        """Where it lies in the bundle."""
        return f"{BLOBS}/{self.sha256}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. `portable` and `beside` are files by their canonical relative paths; the first make the identity.

    `release` orders the bundles of one `name`. `gate` are the rules of latency that a device has to keep. `verdict` is what all
    rules of the run said on the host, empty where it had none; no part of the identity, for another measurement may differ.
    """

    name: str
    release: int
    gate: tuple[str, ...]
    portable: Mapping[str, Blob]
    beside: Mapping[str, Blob] = field(default_factory=dict)
    verdict: str = ""

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the portable parts; the same inputs have the same."""
        return digest({"schema": SCHEMA, "name": self.name, "gate": self.gate, "portable": _blobs_json(self.portable)})

    @property
    def files(self) -> dict[str, Blob]:
        """All files by path."""
        return {**self.portable, **self.beside}

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the graphs, `<runtime>-<precision>`, sorted."""
        return tuple(sorted({path.split("/")[1] for path in self.portable if path.startswith(f"{MODELS}/")}))


@dataclass(frozen=True)
class Verification:
    """What became of checking a bundle's files: entries that nobody asked for, and files that are missing or changed, by path.

    `signer` is who signed it, None when that was not asked for; `is_signed`, whether there is a signature, by whomever.
    """

    manifest: Manifest
    signer: str | None
    is_signed: bool
    extra: tuple[str, ...]
    missing: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every file is there, as it was packed, and nothing else."""
        return not (self.extra or self.missing or self.changed)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest, the manifest's bytes and signature (None: there is none), and its files."""

    path: Path
    manifest: Manifest
    content: bytes
    signature: bytes | None
    files: Files


def is_bundle(path: Path) -> bool:
    """Whether a file or folder means to be a bundle, by what it starts with; whether it is a good one, `check` says."""
    if path.is_dir():
        return (path / MANIFEST).is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(30)[:4] == b"PK\x03\x04" and file.read(len(MANIFEST)) == MANIFEST.encode()


@contextmanager
def opened(path: Path, *, signers: Path | None = None, files: Files | None = None) -> Iterator[Bundle]:
    """Open a bundle, packed or a folder; with `signers`, an OpenSSH allowed-signers file, only one that these have signed.

    Where its files do not lie in one place, `files` has them, and `path` only names it.

    The signature is checked before the manifest is parsed. Files are not read yet: see `check`.
    Raises UsageError when it is not a bundle, is damaged, or is not signed by one of `signers`.
    """
    with archive.opened(path) if files is None else nullcontext(files) as files:
        content = _small(files, MANIFEST, _MANIFEST_LIMIT_BYTES, path)
        signed = _small(files, SIGNATURE, signature.LIMIT_BYTES, path) if SIGNATURE in files.sizes else None
        if signers is not None:
            signer_of(path, content, signed, signers)
        yield Bundle(path, parse(content, printable(path)), content, signed, files)


def signer_of(path: Path, content: bytes, signed: bytes | None, signers: Path) -> str:
    """Who of `signers` signed this manifest. Raises UsageError when nobody did."""
    if signed is None:
        raise UsageError(f"{printable(path)} is not signed", fix="pack it with --sign KEY")
    return signature.signer(content, signed, signers)


def check(path: Path, *, signers: Path | None = None, files: Files | None = None) -> Verification:
    """Check every file of a bundle against its manifest, and with `signers` who signed that; `files` as in `opened`.

    What is extra, missing or changed is in the answer; `require_whole` raises it. `signers` is an OpenSSH allowed-signers file.
    Raises UsageError when it is no bundle, is not signed by one of them, or one of its graphs reads files outside of it.
    """
    with opened(path, signers=signers, files=files) as bundle:
        signer = None if signers is None else signer_of(path, bundle.content, bundle.signature, signers)
        wanted = {blob.entry: blob for blob in bundle.manifest.files.values()}
        names: dict[str, list[str]] = {}
        for name, blob in bundle.manifest.files.items():
            names.setdefault(blob.entry, []).append(name)
        present = bundle.files.sizes
        missing = [name for entry in wanted if entry not in present for name in names[entry]]
        bad = {entry for entry, blob in wanted.items() if entry in present and not _is(bundle, blob)}
        changed = [name for entry in wanted if entry in bad for name in names[entry]]
        extra = sorted(present.keys() - wanted.keys() - {MANIFEST, SIGNATURE})
        is_signed = bundle.signature is not None
        found = Verification(bundle.manifest, signer, is_signed, tuple(extra), tuple(sorted(missing)), tuple(sorted(changed)))
        if found.is_whole:
            refuse_outside_data(bundle)
    return found


def described(found: Verification) -> dict[str, Any]:
    """What was found out about a bundle, as plain JSON values."""
    manifest = found.manifest
    return {
        "id": manifest.id,
        "name": manifest.name,
        "release": manifest.release,
        "verdict": manifest.verdict,
        "signer": found.signer,
        "models": list(manifest.models),
        "files": len(manifest.files),
        "extra": list(found.extra),
        "missing": list(found.missing),
        "changed": list(found.changed),
    }


def require_whole(path: Path, found: Verification) -> None:
    """Raise UsageError that names every file that is extra, missing or changed."""
    kinds = {"extra": found.extra, "missing": found.missing, "changed": found.changed}
    problems = [f"{kind}: {name}" for kind, names in kinds.items() for name in names]
    if problems:
        raise UsageError(
            f"{printable(path)} is not the bundle that was packed", problems=problems[:20], fix="copy or pack it again"
        )


def pieces(bundle: Bundle, blob: Blob) -> Iterator[bytes]:
    """The bytes of one blob, whose size and digest are checked as they pass; raises UsageError at the end when they differ."""
    sha, size = hashlib.sha256(), 0
    if bundle.files.sizes.get(blob.entry) != blob.size:
        raise UsageError(f"{blob.entry} is missing, or has not the size that the manifest says")
    for piece in bundle.files.pieces(blob.entry):
        sha.update(piece)
        size += len(piece)
        yield piece
    if size != blob.size or sha.hexdigest() != blob.sha256:
        raise UsageError(f"{blob.entry} is not what its name says")


def refuse_outside_data(bundle: Bundle) -> None:
    """Raise UsageError when a graph keeps constants in other files: by that a model reads what is not in the bundle.

    Reads the graphs, whose digests have been checked; the runtime is handed bytes and refuses such files once more.
    """
    problems = []
    for name, blob in bundle.manifest.files.items():
        if name.lower().endswith(".onnx"):
            problems += [f"{name}: {why}" for why in _outside(b"".join(pieces(bundle, blob)), name)]
    if problems:
        raise UsageError(f"{printable(bundle.path)} holds graphs that cannot be used", problems=problems[:20])


def parse(content: bytes, source: str) -> Manifest:
    """A manifest from its canonical bytes; `source` names it in messages.

    Raises UsageError with every problem. Another order of keys, a key twice, a key that is not known or a space too many is
    refused: there is one way to write a manifest, so two readers cannot understand the same bytes differently.
    """
    try:
        value = json.loads(content.decode("ascii"), parse_constant=_refuse_constant)
        problems = list(_problems(value))
        if not problems:
            found = _manifest(value)
            if dump(found) == content:
                return found
            problems = [
                "it is not in canonical form: keys in order and once, none that is not known, and the identity of its files"
            ]
    except (ValueError, RecursionError) as error:
        problems = [f"it is no JSON: {type(error).__name__}: {str(error)[:200]}"]
    raise UsageError(f"the manifest of {source} is damaged", problems=[printable(problem)[:300] for problem in problems[:20]])


def dump(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest: what is signed, and the only form that `parse` reads."""
    value = {
        "schema": SCHEMA,
        "id": manifest.id,
        "name": manifest.name,
        "release": manifest.release,
        "gate": list(manifest.gate),
        "verdict": manifest.verdict,
        "portable": _blobs_json(manifest.portable),
        "beside": _blobs_json(manifest.beside),
    }
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()


def _problems(value: Any) -> Iterator[str]:
    """What is wrong with the types and ranges of a manifest's values."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        yield f"this deploykit reads bundles of schema {SCHEMA}, and its schema is not that"
        return
    if not isinstance(value.get("name"), str) or not _PLAIN.fullmatch(value["name"]):
        yield "name: not a plain name"
    release = value.get("release")
    if type(release) is not int or not 0 <= release < _LARGEST_RELEASE:
        yield "release: not a whole number"
    if value.get("verdict") not in _VERDICTS:
        yield "verdict: not what gates say"
    gate = value.get("gate")
    if not isinstance(gate, list) or not all(isinstance(rule, str) for rule in gate):
        yield "gate: not a list of rules"
    else:
        yield from _rule_problems(gate)
    for kind in ("portable", "beside"):
        yield from _file_problems(kind, value.get(kind))
    if all(isinstance(value.get(kind), dict) for kind in ("portable", "beside")):
        yield from archive.twins([*value["portable"], *value["beside"]])
        yield from _size_problems([*value["portable"].values(), *value["beside"].values()])


def _rule_problems(gate: list[str]) -> Iterator[str]:
    for text in gate:
        try:
            rule = parse_rule(text)
        except ValueError as error:
            yield f"gate: {error}"
            continue
        if rule.metric != "latency":
            yield f"gate: {text!r} is no rule of latency, and nothing else can be judged on a device"


def _file_problems(kind: str, files: Any) -> Iterator[str]:
    if not isinstance(files, dict) or len(files) > archive.MOST_ENTRIES // 2:
        yield f"{kind}: not an object of at most {archive.MOST_ENTRIES // 2} files"
        return
    for name, blob in files.items():
        if why := archive.objection(name):
            yield f"{kind}: {why}"
        elif name.startswith(f"{MODELS}/") and not _MODEL_FILE.fullmatch(name):
            yield f"{kind}: {name} is no file of a model: a folder of {MODELS} has {', '.join(_MODEL_FILES)}"
        elif not isinstance(blob, dict) or not isinstance(blob.get("sha256"), str) or not _SHA256.fullmatch(blob["sha256"]):
            yield f"{kind}: {name} has no SHA-256"
        elif type(blob.get("bytes")) is not int or not 0 <= blob["bytes"] < _LARGEST_BYTES:
            yield f"{kind}: {name} has no size"


def _size_problems(blobs: list[Any]) -> Iterator[str]:
    """The same content has one size."""
    sizes: dict[Any, Any] = {}
    for blob in blobs:
        if isinstance(blob, dict) and sizes.setdefault(str(blob.get("sha256")), blob.get("bytes")) != blob.get("bytes"):
            yield f"{blob.get('sha256')} has two sizes"


def _manifest(value: Mapping[str, Any]) -> Manifest:
    files = {
        kind: {name: Blob(blob["sha256"], blob["bytes"]) for name, blob in value[kind].items()} for kind in ("portable", "beside")
    }
    return Manifest(value["name"], value["release"], tuple(value["gate"]), files["portable"], files["beside"], value["verdict"])


def _blobs_json(files: Mapping[str, Blob]) -> dict[str, JSON]:
    return {name: {"sha256": blob.sha256, "bytes": blob.size} for name, blob in files.items()}


def _small(files: Files, name: str, limit: int, path: Path) -> bytes:
    size = files.sizes.get(name)
    if size is None:
        raise UsageError(f"{printable(path)} is not a bundle", why=f"it has no {name}")
    if size > limit:
        raise UsageError(f"{printable(path)} is not a bundle", why=f"its {name} has {size} bytes; one has at most {limit}")
    return b"".join(files.pieces(name))


def _is(bundle: Bundle, blob: Blob) -> bool:
    if bundle.files.sizes[blob.entry] != blob.size:
        return False
    sha = hashlib.sha256()
    for piece in bundle.files.pieces(blob.entry):
        sha.update(piece)
    return sha.hexdigest() == blob.sha256


def _outside(content: bytes, name: str) -> list[str]:
    """What is wrong with a graph's constants; a file that is no graph is wrong as a whole."""
    try:
        return [
            f"{printable(item.tensor)} lies in {printable(item.location)!r}" for item in onnx_nodes.external(Path(name), content)
        ]
    except UsageError as error:
        return [error.why or error.what]
    except RecursionError:
        return ["its graphs are nested too deep"]


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
