"""Measurements for the predictor, taken on a device over a connection: releases that are installed there, timed there.

What the device is comes from its own files, the same ones that `deploykit.targets.here` reads on this machine.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploykit import bundle
from deploykit.artifact import Precision
from deploykit.bundle import Manifest
from deploykit.device import ROOT, Device
from deploykit.errors import DeploykitError, UsageError, printable
from deploykit.forecast import graphs, measured
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.recipe import BenchmarkTable
from deploykit.remote import Connection
from deploykit.targets import Target, here

# Below "/": what `here` looks at. A name with a star may be several files, or none.
FILES = (
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "var/lib/nvpmodel/status",
    "proc/cpuinfo",
    "proc/device-tree/model",
    "sys/class/devfreq/*/max_freq",
    "sys/class/devfreq/*/cur_freq",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
    "sys/devices/system/cpu/cpu0/cache/index*/size",
)
_MOST_BYTES = 64 << 10  # of one file; /proc/cpuinfo of 24 cores has 30 KB
# One line for each file: its name and what is in it. sysfs tells no true sizes, so nothing is asked for them.
_READ = (
    'cd / || exit 1; for file in $1; do [ -r "$file" ] && printf "%s " "$file" && '
    f'head -c {_MOST_BYTES} -- "$file" 2> /dev/null | base64 | tr -d "\\n" && echo; done; exit 0'
)


@dataclass(frozen=True)
class _Release:
    """A bundle and the device half that answers for it."""

    path: Path
    manifest: Manifest
    device: Device


def measure(
    connection: Connection,
    bundles: Sequence[Path],
    settings: BenchmarkTable,
    file: measured.File,
    *,
    owner: str,
    python: str = "python3",
    roots: str = ROOT,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time the engine of each bundle's release on the device, alone, and write `file`; the facts of each, as JSON values.

    A release lies in the folder `roots`/NAME there, where `deploykit deploy` puts it. The device's lease is held meanwhile.
    Raises UsageError for bundles that are not installed there, all at once, and for a run that something disturbed, and
    DeploykitError when the device refuses.
    """
    file.refuse_unwritable()
    releases, problems = [], []
    for path in bundles:
        with bundle.opened(path) as opened:
            manifest = opened.manifest
        device = Device(connection, f"{roots}/{manifest.name}", python=python)
        there = device.survey(manifest.id).own_half
        if there is None:
            problems.append(f"deploykit deploy {printable(path)} {connection.name} --root {roots}/{manifest.name}")
        else:
            device.half = there
            releases.append(_Release(path, manifest, device))
    if problems:
        why = "what is measured is a release that is installed there"
        raise UsageError(f"{connection.name} lacks {len(problems)} of the bundles", why=why, problems=problems)
    if not releases:
        raise UsageError("no bundle is named to be measured", fix="deploykit benchmark ssh://HOST A.bundle B.bundle")
    machine = _machine(releases[0].device)
    target = target_of(connection, machine)
    rows = []
    for number, release in enumerate(releases):
        progress("benchmark", number, len(releases))
        rows.append(_row(release, settings, owner))
    progress("benchmark", len(releases), len(releases))
    file.write(target, machine, rows)
    return {
        **{"metric": "calibration", "device": connection.name, "target": target.name, "mode": target.mode},
        **{"file": printable(file.path), "machine": to_json(machine), "gates": [], "exit_code": 0},
        "measured": [{key: value for key, value in row.items() if key != "kernels"} for row in rows],
    }


def target_of(connection: Connection, machine: Machine) -> Target:
    """What the device is, by `here`'s rules. Raises DeploykitError when its files cannot be read."""
    done = connection.run(["sh", "-c", _READ, "files", " ".join(FILES)])
    if done.code:
        raise DeploykitError(f"cannot read what {connection.name} is", why=done.words)
    asked = [re.escape(name).replace(r"\*", "[A-Za-z0-9][A-Za-z0-9._:-]*") for name in FILES]
    with TemporaryDirectory() as folder:
        for line in done.stdout.splitlines():
            name, _, content = line.decode("utf-8", "replace").partition(" ")
            path = Path(folder, name)
            # What a device says is data: no other file than one that was asked for is written.
            if not any(re.fullmatch(pattern, name) for pattern in asked):
                raise DeploykitError(f"{connection.name} tells of {printable(name)}, which it was not asked for")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(base64.b64decode(content, validate=True))
            except binascii.Error as error:
                raise DeploykitError(f"{connection.name} gives no base64 of {printable(name)}", why=str(error)) from error
        return here.of_machine(machine, Path(folder))


def _machine(device: Device) -> Machine:
    told = device.ask("probe", has_root=False).get("machine")
    try:
        machine = Machine.from_json(told)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise DeploykitError(f"{device.name} does not say what it is", why=f"{type(error).__name__}: {error}") from error
    if machine.is_emulated:
        why = "how long an emulated CPU takes says nothing about a real one"
        raise UsageError(f"{device.name} cannot calibrate the predictor", why=why, fix="name a real device")
    return machine


def _row(release: _Release, settings: BenchmarkTable, owner: str) -> dict[str, Any]:
    """One measurement, as `measured` reads it."""
    path, manifest, device = release.path, release.manifest, release.device
    counts = ("--processes", str(settings.processes), "--queries", str(settings.queries))
    with device.lease(owner):
        said = device.ask("benchmark", manifest.id, *counts)
    try:
        label, latency = str(said["engine"]).rsplit("-", 2)[0], said["latency"]
        precision = measured.precision_of(Precision(label.partition("-")[2]))
        median_ns, doubts = float(latency["median_ns"]), list(map(str, latency["doubts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DeploykitError(
            f"{device.name} gave no latency of {manifest.name}", why=f"it said {printable(str(said))}"
        ) from error
    if label not in manifest.models or not 0 < median_ns < 1e15:
        raise DeploykitError(f"{device.name} measured {printable(label)} in {median_ns} ns, which is not in {printable(path)}")
    if doubts:
        raise measured.not_valid(doubts)
    network = graphs.of_bundle(path, label)
    return {
        **{"model": manifest.name, "precision": precision, "batch": 1, "latency_ms": median_ns / 1e6},
        "kernels": measured.kernels(network),
    }
