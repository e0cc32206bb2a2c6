"""Commands that reach devices: deploy, rollback, status, and `device` for what is done to one of them."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli.options import json_option, progress_bars
from deploykit.errors import StageError, UsageError, printable

if TYPE_CHECKING:
    from deploykit.deploy import Deployed
    from deploykit.device import Device
    from deploykit.fleet import RollOut
    from deploykit.remote import Connection

_target = click.argument("target", required=False)
_root = click.option("--root", help="Folder of the network's releases on the device.  [default: /opt/deploykit/NAME]")
_python = click.option("--python", default="python3", show_default=True, help="The device's Python, 3.10 or newer.")
_ssh_config = click.option("--ssh-config", type=click.Path(path_type=Path), help="Instead of your own ssh_config(5).")
_fleet = click.option("--fleet", "fleet_file", type=click.Path(path_type=Path), help="All devices of this fleet.toml instead.")
_reaching = (_root, _python, _ssh_config)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command("deploy")
@click.argument("bundle", type=click.Path(path_type=Path))
@_target
@_options(*_reaching, _fleet)
@click.option("--signers", type=click.Path(path_type=Path), help="Allowed signers that this host asks for, before it sends.")
@click.option(
    "--confirm-within", "confirm_within_s", type=click.FloatRange(0), metavar="SECONDS", help="Go back unless confirmed."
)
@click.option("--rebuild", is_flag=True, help="The device may build the engine again when an update there made it stale.")
@click.option("--allow-downgrade", is_flag=True, help="Take a lower release number than runs there.")
@click.option("--model", help="Which graph, where several can be built there.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="Threads of a CPU engine; 0: all cores.")
@click.option(
    "--processes", type=click.IntRange(2), default=10, show_default=True, help="Of the benchmark, where there is a gate."
)
@click.option("--queries", type=click.IntRange(1), default=30, show_default=True, help="Of each process of the benchmark.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of a fleet's roll-out.  [default: BUNDLE-rollout]")
@json_option
def deploy_command(
    bundle: Path,
    target: str | None,
    root: str | None,
    python: str,
    ssh_config: Path | None,
    fleet_file: Path | None,
    signers: Path | None,
    output: Path | None,
    as_json: bool,
    **words: Any,
) -> int:
    """Bring a bundle to a device, build and prove it there, then switch to it.

    TARGET is `local`, ssh://[user@]host[:port], or emulated://FOLDER (see `deploykit device emulate`). Only what the device lacks
    is sent; a deployment that was cut goes on when it is started again. Exit code 3: a gate did not open there, 5: it cannot be
    decided; what ran before still runs.
    """
    from deploykit import deploy, fleet, remote

    _one_of(target, fleet_file)
    how = deploy.How(root=root, python=python, **words)
    if fleet_file is not None:
        devices = fleet.read(fleet_file, how, ssh_config=ssh_config)
        folder = output or Path(f"{bundle.name.removesuffix('.bundle')}-rollout")
        with _table() as show:
            rolled = fleet.roll_out(bundle, devices, folder, owner=owner(), signers=signers, show=show)
        click.echo(json.dumps(rolled.facts, indent=1) if as_json else _told_of(rolled, folder))
        return rolled.code
    assert target is not None
    with _transfer() as progress:
        connect = lambda: remote.connect(target, ssh_config=ssh_config)  # noqa: E731
        done = deploy.deploy(bundle, connect, how, owner=owner(), signers=signers, progress=progress)
    click.echo(json.dumps({**done.facts, "exit_code": done.code}, indent=1) if as_json else _told(done))
    return done.code


@click.command("rollback")
@_target
@_options(*_reaching, _fleet)
@click.option("--from", "id", metavar="ID", help="Only where this release runs; where another one does, nothing is done.")
@json_option
def rollback_command(
    target: str | None,
    root: str | None,
    python: str,
    ssh_config: Path | None,
    fleet_file: Path | None,
    id: str | None,
    as_json: bool,
) -> int:
    """Let a device, or a fleet, go back to the previous release. Refused where somebody is deploying."""

    def ask(device: Device) -> dict[str, Any]:
        with device.lease(owner()):
            if id is not None and (current := device.ask("status").get("current")) != id:
                return {"left": None, "current": current, "exit_code": 0}
            return device.ask("rollback")

    return _ask_all(
        target, root, python, ssh_config, fleet_file, as_json, ask, lambda said: f"runs {_short(said.get('current'))}"
    )


@click.command("status")
@_target
@_options(*_reaching, _fleet)
@json_option
def status_command(
    target: str | None, root: str | None, python: str, ssh_config: Path | None, fleet_file: Path | None, as_json: bool
) -> int:
    """What a device, or each one of a fleet, runs, what it can go back to, and who is deploying there."""
    return _ask_all(target, root, python, ssh_config, fleet_file, as_json, lambda device: device.ask("status"), _status_line)


@click.group("device")
def device_group() -> None:
    """What is done to one device apart from deploying."""


@device_group.command("trust")
@click.argument("target")
@click.option("--root", required=True, help="Folder of the network's releases on the device.")
@_ssh_config
@click.option("--signers", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="Allowed signers.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def trust_command(target: str, root: str, ssh_config: Path | None, signers: Path, yes: bool) -> None:
    """Say whose bundles a device takes: show the fingerprints there and here, ask, and put the allowed signers there.

    SIGNERS is OpenSSH's file (ssh-keygen(1), ALLOWED SIGNERS). From then on the device installs nothing else.
    """
    from deploykit import device, remote
    from deploykit.bundle import signature

    wanted = signature.fingerprints(signers.read_bytes())
    if not wanted:
        raise UsageError(f"{printable(signers)} names no key", fix="one line each: NAME KEYTYPE PUBLICKEY")
    connection = remote.connect(target, ssh_config=ssh_config)
    try:
        there = device.trusted(connection, root)
        known = [] if there is None else signature.fingerprints(there)
        click.echo(f"{connection.name}, {printable(root)}: trusts {'nobody yet' if there is None else 'now'}")
        for line in known:
            click.echo(f"  {printable(line)}")
        click.echo("is to trust")
        for line in wanted:
            click.echo(f"  {printable(line)}")
        if there == signers.read_bytes():
            click.echo("that is what it does; nothing was changed")
            return
        if not yes:
            click.confirm("put them there?", abort=True)
        device.trust(connection, root, signers)
        click.echo("done")
    finally:
        connection.close()


@device_group.command("probe")
@click.argument("target")
@_options(*_reaching)
def probe_command(target: str, root: str | None, python: str, ssh_config: Path | None) -> None:
    """What a device is, as JSON: machine, versions, and which runtimes load there. Wants an installed release."""
    with _device(target, root, python, ssh_config) as device:
        click.echo(json.dumps(device.ask("probe", has_root=False), indent=1))


@device_group.command("confirm")
@_target
@click.argument("id", required=False)
@_options(*_reaching, _fleet)
@json_option
def confirm_command(
    target: str | None,
    id: str | None,
    root: str | None,
    python: str,
    ssh_config: Path | None,
    fleet_file: Path | None,
    as_json: bool,
) -> int:
    """Keep the release that is on trial on a device, or on each of a fleet; exit code 1 where none is.

    With an ID, only where that release is on trial: `deploykit device confirm TARGET ID`, or `--fleet fleet.toml ID`.
    """
    if fleet_file is not None and id is None:
        target, id = None, target  # the one word that is there
    from deploykit.slots import is_id

    if id is not None and not is_id(id):
        raise UsageError(
            f"{printable(id)!r} is no identity of a release", fix="64 hex digits, as `deploykit status --json` has them"
        )
    return _ask_all(
        target,
        root,
        python,
        ssh_config,
        fleet_file,
        as_json,
        lambda device: device.ask("confirm", *([] if id is None else [id])),
        lambda said: f"keeps {_short(said.get('current'))}" if said.get("confirmed") else "nothing is on trial",
    )


@device_group.command("collect-garbage")
@click.argument("target")
@_options(*_reaching)
def collect_garbage_command(target: str, root: str | None, python: str, ssh_config: Path | None) -> None:
    """Remove releases of a device that are neither current nor previous nor in use, and what came only in part."""
    with _device(target, root, python, ssh_config) as device, device.lease(owner()):
        click.echo(json.dumps(device.ask("collect-garbage"), indent=1))


@contextmanager
def _device(target: str, root: str | None, python: str, ssh_config: Path | None) -> Iterator[Device]:
    from deploykit import device, remote

    connection: Connection = remote.connect(target, ssh_config=ssh_config)
    try:
        yield device.Device(connection, root or device.find_root(connection), python=python)
    finally:
        connection.close()


def _ask_all(
    target: str | None,
    root: str | None,
    python: str,
    ssh_config: Path | None,
    fleet_file: Path | None,
    as_json: bool,
    ask: Callable[[Device], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> int:
    """One question to a device or to each of a fleet, and the answers."""
    from deploykit import deploy, fleet

    _one_of(target, fleet_file)
    if target is not None:
        with _device(target, root, python, ssh_config) as device:
            said = ask(device)
        click.echo(json.dumps(said, indent=1) if as_json else f"{printable(device.name)}: {line(said)}")
        return int(said["exit_code"])
    assert fleet_file is not None
    answers = fleet.ask_each(fleet.read(fleet_file, deploy.How(root=root, python=python), ssh_config=ssh_config), ask)
    code = max((int(said["exit_code"]) for said in answers.values()), default=0)
    if as_json:
        click.echo(json.dumps({"devices": answers, "exit_code": code}, indent=1))
        return code
    for name, said in answers.items():
        click.echo(f"{printable(name)}: {said['error'] if 'error' in said else line(said)}")
    return code


def _one_of(target: str | None, fleet_file: Path | None) -> None:
    if (target is None) == (fleet_file is None):
        raise UsageError("name one device or one fleet", fix="ssh://[user@]host[:port], local, or --fleet fleet.toml")


def owner() -> str:
    """Who holds a device's lease while this command is at work, as others are told."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that no passwd file knows
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()} (process {os.getpid()})"


def _short(id: Any) -> str:
    return str(id)[:12] if id else "nothing"


def _status_line(said: dict[str, Any]) -> str:
    from deploykit.runtimes import LOADS

    numbers = said.get("release_numbers") or {}
    current, trial, held = said.get("current"), said.get("trial"), said.get("lease")
    words = [f"runs {_short(current)}" + (f" (release {numbers[current]})" if current in numbers else "")]
    words.append(f"can go back to {_short(said.get('previous'))}")
    engines = said.get("engines")
    why = engines.get(current) if isinstance(engines, dict) else None
    if why not in (None, LOADS):
        words.append(str(why))
    if trial:
        words.append(f"on trial for {trial.get('seconds_left')} s more")
    if held:
        age = held.get("age_s")
        words.append(f"{held.get('owner')} is deploying" + (f" for {age:.0f} s" if isinstance(age, float) else ""))
    return printable(", ".join(words))


def _told(done: Deployed) -> str:
    share = done.sent_bytes / done.total_bytes if done.total_bytes else 0.0
    moved = f"{done.sent_blobs} of {done.blobs} blobs sent ({done.sent_bytes:,} of {done.total_bytes:,} bytes, {share:.1%})"
    how = f"{done.commands} commands, {done.seconds:.1f} s" + (f", {done.attempts} attempts" if done.attempts > 1 else "")
    if done.code:
        verdict = f"did not pass {done.stage}; what ran before still runs"
    else:
        verdict = "runs there now" if done.activated else "ran there already"
    lines = [f"{printable(done.device)}: release {done.release} {verdict}", f"  {moved}; {how}", f"  id {done.id}"]
    latency = done.answers.get("activate", {}).get("latency")
    if isinstance(latency, str):
        lines.append(f"  {printable(latency)}")
    if not done.code and done.answers.get("bootstrap", {}).get("by") == "sha256sum":
        lines.append("  nobody was asked who signed it: `deploykit device trust` puts allowed signers there")
    watch = done.answers.get("watch")
    if watch is not None and not watch.get("unit"):
        lines.append(f"  no watchdog: {printable(watch.get('why_not', ''))}; run this at every start and every minute:")
        lines.append(f"    {printable(watch.get('command', ''))}")
        if watch.get("rebuild_command"):
            lines.append(f"  and this once after every start: {printable(watch['rebuild_command'])}")
    return "\n".join(lines)


def _told_of(rolled: RollOut, folder: Path) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in rolled.counts.items())
    failed = [f"  {printable(name)}: {row.text}" for name, row in rolled.rows.items() if row.outcome.value == "failed"]
    return "\n".join(
        [f"{counts}: {printable(folder)}/rollout.html", *failed, *([rolled.why_stopped] if rolled.why_stopped else [])]
    )


@contextmanager
def _transfer() -> Iterator[Callable[[str, int, int], None]]:
    """Bytes, bandwidth and the time that is left while blobs go over; names for the stages. Nothing when nobody watches."""
    import sys

    if not sys.stderr.isatty():
        with progress_bars() as silent:
            yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:12}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


@contextmanager
def _table() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A table of the fleet that changes while it is rolled out; nothing when nobody watches."""
    import sys

    if not sys.stderr.isatty():
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:

        def show(rows: dict[str, Any]) -> None:
            table = Table("device", "group", "", "what")
            for name, row in rows.items():
                table.add_row(escape(printable(name)), escape(row.group), row.outcome.value, escape(row.text)[:60])
            live.update(table)

        yield show


@device_group.command("emulate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cpu", default="cortex-a76", show_default=True, help="cortex-a76 (int8 dot product) or cortex-a72 (none).")
@json_option
def emulate_command(folder: Path, cpu: str, as_json: bool) -> None:
    """Make a 64-bit ARM device of files in FOLDER, run by qemu-user; its address is emulated://FOLDER.

    Debian 12, Python and ONNX Runtime, about 260 MB. What it answers is what an ARM CPU answers; how long it takes means
    nothing, and is refused as a gate. Wants root and the Debian packages mmdebstrap and qemu-user-static.
    """
    from deploykit import arm64
    from deploykit.remote import connect

    with progress_bars() as progress:
        versions = arm64.make(folder, cpu, progress=progress)
    address = f"emulated://{folder.absolute()}"
    found = connect(address).run(["python3", "-c", "import platform, numpy, onnxruntime; print(platform.machine())"])
    if found.code:
        raise StageError(f"{printable(address)} is there and cannot run its Python", why=found.words)
    facts = {"address": printable(address), "cpu": cpu, "arch": found.stdout.decode().strip(), "versions": versions}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        click.echo(f"{facts['address']}: {cpu}, {facts['arch']}, {said}")
