"""A target's TOML file -> Target: everything that is wrong with it is collected and told once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError, printable
from deploykit.targets import UNITS, Figure, PowerMode, Target, jetpack

_SIZE_LIMIT_BYTES = 1 << 20
_TEXTS, _LISTS = ("title", "kind", "compute_capability", "arch"), ("aliases", "features", "jetpack")
_KEYS = {*_TEXTS, *_LISTS, "figures", "sources", "modes"}
_WANTED = {
    "gpu": ("sm", "gpu_mhz", "fp16_tops", "fp32_tops", "bandwidth_gbs", "l2_kib"),
    "cpu": ("cores", "cpu_mhz", "int8_tops", "fp32_tops", "bandwidth_gbs", "l2_kib"),
}
_MODE = {"name": str, "id": int, "watts": float, "sm": int, "gpu_mhz": float, "bandwidth_gbs": float, "source": str}


def read(path: Path) -> Target:
    """The target in a TOML file. Raises UsageError with all problems at once: not there, syntax, keys, figures, sources."""
    import tomllib

    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise UsageError(f"{printable(path)} is not a target", why=f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content: dict[str, Any] = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"cannot read the target {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} is not valid TOML", why=str(error)) from error
    problems = list(_problems(content))
    if problems:
        raise UsageError(
            f"{printable(path)} does not describe a target",
            problems=problems,
            fix="compare it with a board of this package: deploykit targets NAME --toml",
        )
    return _target(path.stem, content)


def _target(name: str, content: Mapping[str, Any]) -> Target:
    sources = content["sources"]
    figures = {
        key: Figure(float(entry["value"]), entry.get("derived") or sources[entry["source"]], "derived" in entry)
        for key, entry in content["figures"].items()
    }
    modes = [
        PowerMode(**{key: kind(mode[key]) for key, kind in _MODE.items() if key != "source"}, source=sources[mode["source"]])
        for mode in content.get("modes", ())
    ]
    texts: dict[str, Any] = {key: content.get(key, "") for key in _TEXTS}
    lists: dict[str, Any] = {key: tuple(content.get(key, ())) for key in _LISTS}
    return Target(name=name, figures=figures, modes=tuple(modes), **texts, **lists)


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"unknown key {key!r}" for key in content if key not in _KEYS)
    for key in _TEXTS:
        if not isinstance(content.get(key, ""), str):
            yield f"{key} is not a text"
    for key in _LISTS:
        value = content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            yield f"{key} is not a list of texts"
    if not content.get("title"):
        yield "it has no title"
    kind = content.get("kind")
    if str(kind) not in _WANTED:
        yield f"kind is {kind!r}, not 'gpu' or 'cpu'"
    if kind == "gpu" and not _is_capability(content.get("compute_capability")):
        yield "compute_capability is not a number such as '8.7'"
    if kind == "cpu" and not content.get("arch"):
        yield "a cpu has no arch, such as 'x86_64' or 'aarch64'"
    releases = content.get("jetpack", [])
    if isinstance(releases, list):
        yield from (f"jetpack {release!r} is not known" for release in releases if str(release) not in jetpack.RELEASES)
    sources = content.get("sources", {})
    if not isinstance(sources, Mapping) or not all(isinstance(value, str) and value for value in sources.values()):
        yield "sources is not a table of texts"
        sources = {}
    yield from _figures(content.get("figures"), sources, _WANTED.get(str(kind), ()))
    yield from _modes(content.get("modes", []), sources, content.get("figures"))


def _is_capability(value: Any) -> bool:
    return isinstance(value, str) and all(part.isdecimal() for part in value.split(".")) and value.count(".") == 1


def _figures(figures: Any, sources: Mapping[str, str], wanted: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(figures, Mapping):
        yield "it has no table of figures"
        return
    yield from (f"figures.{key} is missing" for key in wanted if key not in figures)
    for key, entry in figures.items():
        if key not in UNITS:
            yield f"figures.{key} is not known; there are {', '.join(UNITS)}"
        elif not isinstance(entry, Mapping) or not _is_positive(entry.get("value"), zero=key in ("dla", "int8_tops")):
            yield f"figures.{key} has no positive value: {{ value = 1, source = 'spec' }}"
        elif set(entry) not in ({"value", "source"}, {"value", "derived"}):
            yield f"figures.{key} wants either a source or the rule it was derived by"
        elif "derived" in entry and not (isinstance(entry["derived"], str) and entry["derived"]):
            yield f"figures.{key}.derived is not a text"
        elif "source" in entry and str(entry["source"]) not in sources:
            yield f"figures.{key} names the source {entry['source']!r}, which the table sources does not have"


def _modes(modes: Any, sources: Mapping[str, str], figures: Any) -> Iterator[str]:
    if not isinstance(modes, list) or not all(isinstance(mode, Mapping) for mode in modes):
        yield "modes is not a list of tables"
        return
    seen: set[object] = set()
    for number, mode in enumerate(modes, 1):
        told = f"mode {number}"
        yield from (f"{told}: unknown key {key!r}" for key in mode if key not in _MODE)
        for key, kind in _MODE.items():
            value = mode.get(key)
            if not (isinstance(value, str) and value if kind is str else _is_positive(value, zero=key == "id")):
                yield f"{told}: {key} is missing or not {'a text' if kind is str else 'a positive number'}"
        if str(mode.get("source")) not in sources:
            yield f"{told}: names the source {mode.get('source')!r}, which the table sources does not have"
        for key in ("name", "id"):
            if (key, str(mode.get(key))) in seen:
                yield f"{told}: its {key} {mode.get(key)!r} is there twice"
            seen.add((key, str(mode.get(key))))
        yield from _above(told, mode, figures)


def _above(told: str, mode: Mapping[str, Any], figures: Any) -> Iterator[str]:
    """A mode lowers what the board has; rates would otherwise be scaled up from figures of a lower clock."""
    for key in ("sm", "gpu_mhz", "bandwidth_gbs"):
        entry = figures.get(key) if isinstance(figures, Mapping) else None
        most = entry.get("value") if isinstance(entry, Mapping) else None
        if _is_positive(most) and _is_positive(mode.get(key)) and mode[key] > most:
            yield f"{told}: {key} is {mode[key]}, more than the board's {most}"


def _is_positive(value: Any, *, zero: bool = False) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    return is_number and (value > 0 or (zero and value == 0))
