"""Manifests and archives with anything anywhere: each is refused with a reason or read as what it is; nothing else may happen.

usage: python benchmarks/bundle_fuzz.py [--cases 20000] [--seed 0] [--output DIR]

Hypothesis makes the cases: bytes, JSON of any shape, a good manifest with values exchanged, a good archive with bytes changed,
cut, moved and doubled, directory entries with any field changed, and the state files of a device. A crash is every exception
but UsageError; what is read has to be canonical, and an archive that is whole has to hold the content of the good one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _results import write
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from deploykit import bundle, slots
from deploykit.bundle import Manifest, archive, pack
from deploykit.errors import UsageError

SLOWEST_S = 5.0
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)

_NUMBERS = JSON | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)
_STATES = JSON | st.fixed_dictionaries(
    {"schema": st.just(1), "doing": st.none() | JSON, "trial": st.none() | JSON, "log": st.just([]) | JSON, "numbers": _NUMBERS}
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    tests = importlib.import_module("test_bundle")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        good = pack.pack(tests.tiny_run(folder / "run"), folder / "good.bundle", release=3).path
        for name, (strategy, check) in _kinds(good, folder).items():
            found[name] = _run(name, strategy, check, arguments.cases, arguments.seed)
            print(f"{name}: {found[name]}", flush=True)
    total, seconds = sum(kind["cases"] for kind in found.values()), sum(kind["seconds"] for kind in found.values())
    print(f"{total} cases in {seconds:.0f} s, no crash, slowest {max(kind['slowest_s'] for kind in found.values()):.3f} s")
    write("bundle_fuzz", {"kinds": found, "seed": arguments.seed}, arguments.output)


def _run(name: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], str], cases: int, number: int) -> dict[str, Any]:
    """Feed `check` with that many cases; it raises for what must not happen."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(strategy)
    def cases_of(case: Any) -> None:
        nonlocal slowest
        began = time.monotonic()
        outcomes[check(case)] += 1
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < SLOWEST_S, f"{name} took {slowest:.1f} s"

    began = time.monotonic()
    cases_of()
    told = {"outcomes": dict(outcomes), "slowest_s": round(slowest, 3)}
    return {"cases": sum(outcomes.values()), "seconds": round(time.monotonic() - began, 1), **told}


def _kinds(good: Path, folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str]]]:
    content = good.read_bytes()
    manifest = json.loads(bundle.dump(bundle.check(good).manifest))
    texts = st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode())
    return {
        "manifest: bytes and JSON": (texts, _parsed),
        "manifest: values exchanged": (_exchanged(manifest), _parsed),
        "archive: bytes": (st.binary(max_size=400), lambda case: _opened(case, folder, good)),
        "archive: pieces changed, cut, moved, doubled": (_edits(content), lambda case: _opened(case, folder, good)),
        "archive: fields of headers": (_fields(content, _marks(content)), lambda case: _opened(case, folder, good)),
        "names": (st.text(max_size=60) | st.from_regex(r"[a-zA-Z0-9_./+\\-]{1,40}"), _named),
        "state.json": (_STATES, lambda case: _state(case, folder)),
    }


def _parsed(content: bytes) -> str:
    try:
        found = bundle.parse(content, "it")
    except UsageError:
        return "refused"
    assert bundle.dump(found) == content
    return "read"


@st.composite
def _exchanged(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        blob = value["portable"]["classes.json"] if isinstance(value.get("portable"), dict) else None
        places = [
            place for place in (value, value.get("portable"), value.get("beside"), blob) if isinstance(place, dict) and place
        ]
        place = draw(st.sampled_from(places))
        key = draw(st.sampled_from([*place]) | st.text(max_size=8))
        if draw(st.booleans()):
            place.pop(key, None)
        else:
            place[key] = draw(JSON)
        if not isinstance(value.get("portable"), dict) or not isinstance(value["portable"].get("classes.json"), dict):
            break
    if draw(st.booleans()):
        return json.dumps(value).encode()
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


@st.composite
def _edits(draw: st.DrawFn, good: bytes) -> bytes:
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        # The ends hold the headers, and the middle of a large blob is one case.
        place = draw(st.integers(0, min(3000, size)) | st.integers(max(0, size - 1500), size) | st.integers(0, size))
        length = draw(st.integers(0, 8) | st.integers(0, size))
        piece = draw(st.binary(max_size=8) | st.just(bytes(content[place : place + length])))
        if draw(st.booleans()):
            content[place : place + length] = piece
        else:
            content[place:place] = piece[:5000]
    return bytes(content)


def _marks(good: bytes) -> list[int]:
    """Where the headers of an archive begin."""
    return [found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", good)]


@st.composite
def _fields(draw: st.DrawFn, good: bytes, marks: list[int]) -> bytes:
    """Any 1, 2 or 4 bytes of any header, in the archive's own places."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from(marks)) + draw(st.integers(0, 46))
        form = draw(st.sampled_from(["<B", "<H", "<L"]))
        size = struct.calcsize(form)
        if at + size <= len(content):
            edges = st.sampled_from([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)])
            struct.pack_into(form, content, at, draw(edges | st.integers(0, 2 ** (8 * size) - 1)))
    return bytes(content)


def _opened(content: bytes, folder: Path, good: Path) -> str:
    path = folder / "case.bundle"
    path.write_bytes(content)
    try:
        found = bundle.check(path)
    except UsageError:
        return "refused"
    if not found.is_whole:
        return "not whole"
    # Dates in the directory and checksums that nobody reads may differ; content may not.
    assert found.manifest == _manifest(good)
    return "whole"


def _manifest(good: Path) -> Manifest:
    with bundle.opened(good) as opened:
        return opened.manifest


def _named(name: str) -> str:
    if archive.objection(name):
        return "refused"
    path = Path(name)
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert name == path.as_posix()
    return "read"


def _state(value: Any, folder: Path) -> str:
    (folder / slots.STATE).write_text(json.dumps(value))
    try:
        slots.read_state(folder)
    except UsageError:
        return "refused"
    return "read"


if __name__ == "__main__":
    main()
