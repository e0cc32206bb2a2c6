"""Many devices: groups one after another, canaries first, several at a time, and a stop after so many failures.

What became of each device is on the disk before the next one starts, so a roll-out that was interrupted goes on with those that
are not done. A device that has not been reached keeps what it runs.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from deploykit import bundle, deploy, publish, remote
from deploykit.bundle import Manifest
from deploykit.deploy import Deployed, How
from deploykit.device import Device, find_root
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors
from deploykit.remote import Connection
from deploykit.report import junit, rollout

STATE, PAGE, JUNIT = "rollout.json", "rollout.html", "junit.xml"
_SCHEMA = 1
_TOP_KEYS = {"root", "python", "parallel", "stop_after", "groups", "devices"}
_GROUP_KEYS, _DEVICE_KEYS = {"canary"}, {"address", "group", "root", "python", "host_key"}
_MOST_PARALLEL = 256


class Outcome(Enum):
    """What became of a device in a roll-out."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Member:
    """A device of a fleet: its name in the file, where it is reached, and how it is deployed to."""

    name: str
    group: str
    address: str
    how: How
    host_key: str | None = None

    def connect(self, ssh_config: Path | None) -> Connection:
        """A connection to it. Raises as `remote.connect`."""
        return remote.connect(self.address, ssh_config=ssh_config, host_key=self.host_key)


@dataclass(frozen=True)
class Fleet:
    """What a fleet.toml says. `canaries` is the share, 0 to 1, of each group that goes first; `parallel` devices are deployed to
    at a time, and `stop_after` failures end it."""

    members: tuple[Member, ...]
    canaries: Mapping[str, float]
    parallel: int
    stop_after: int
    ssh_config: Path | None = None


@dataclass(frozen=True)
class Row:
    """A device in a roll-out: what became of it, in words, and the figures of its deployment."""

    group: str
    outcome: Outcome = Outcome.WAITING
    text: str = ""
    code: int = 0
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RollOut:
    """How a roll-out ended: a row for each device, and why it stopped before the end (empty: it did not)."""

    id: str
    release: int
    rows: Mapping[str, Row]
    why_stopped: str

    @property
    def counts(self) -> dict[str, int]:
        """How many devices came to which end."""
        found = Counter(row.outcome for row in self.rows.values())
        return {outcome.value: found[outcome] for outcome in Outcome if found[outcome]}

    @property
    def code(self) -> int:
        """0 when every device is done; else the code of the first that failed, or 1."""
        failed = [row.code for row in self.rows.values() if row.outcome is Outcome.FAILED]
        return next(iter(failed), 0 if all(row.outcome is Outcome.DONE for row in self.rows.values()) else 1)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = {name: _row_json(row) for name, row in self.rows.items()}
        head = {"id": self.id, "release": self.release, "why_stopped": self.why_stopped, "counts": self.counts}
        return {**head, "devices": rows, "exit_code": self.code}


def read(path: Path, how: How, *, ssh_config: Path | None = None) -> Fleet:
    """The fleet that a TOML file describes; `how` is how every device is deployed to, where the file says nothing else.

    Raises UsageError with every problem of the file.
    """
    import tomllib

    try:
        with translating_os_errors("read", path):
            value = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no fleet {printable(path)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UsageError(f"{printable(path)} is no TOML file", why=str(error)) from error
    problems: list[str] = _unknown(value, _TOP_KEYS, "")
    groups, devices = _tables(value, "groups", problems), _tables(value, "devices", problems)
    canaries = {name: _canary(name, table, problems) for name, table in groups.items()}
    base = _how(value, how, "", problems)
    members = [_member(name, table, base, groups, problems) for name, table in devices.items()]
    parallel, stop_after = (_count(value, key, fallback, problems) for key, fallback in (("parallel", 8), ("stop_after", 1)))
    if not devices:
        problems.append("devices: there is none; [devices.NAME] with an address is one")
    places = Counter((member.address, member.how.root) for member in members if member.address)
    problems += [f"devices: {address} is there {count} times" for (address, _), count in places.items() if count > 1]
    if problems:
        raise UsageError(f"{printable(path)} is no fleet", problems=problems[:20])
    return Fleet(tuple(members), canaries, parallel, stop_after, ssh_config)


def waves(fleet: Fleet) -> list[tuple[bool, tuple[Member, ...]]]:
    """Devices that go at the same time, in order, and whether they are canaries: for each group first its canaries, if any,
    then the others. Groups come in the order of their first device."""
    found: list[tuple[bool, tuple[Member, ...]]] = []
    for group in dict.fromkeys(member.group for member in fleet.members):
        members = tuple(member for member in fleet.members if member.group == group)
        # A share such as 0.07 of 100 is 7, and not the 8 that its binary form would make of it.
        first = math.ceil(round(fleet.canaries.get(group, 0.0) * len(members), 9))
        found += [(True, members[:first]), (False, members[first:])]
    return [(is_canary, members) for is_canary, members in found if members]


def roll_out(
    path: Path,
    fleet: Fleet,
    folder: Path,
    *,
    owner: str,
    signers: Path | None = None,
    show: Callable[[dict[str, Row]], None] = lambda rows: None,
    deploy_one: Callable[[Member], Deployed] | None = None,
    confirm_one: Callable[[Member, Deployed], None] | None = None,
) -> RollOut:
    """Deploy the bundle at `path` to every device of `fleet` that is not done; what becomes of each is kept in `folder`.

    A canary that fails stops it, and so do `fleet.stop_after` failures together: what is running is finished, nothing more is
    started. A device that has its release on trial is done when that is confirmed, and has failed when it went back. A page and
    JUnit are written at the end, also of a roll-out that stopped.
    Raises UsageError when `folder` holds the roll-out of another bundle, or the bundle is none.
    """
    found = bundle.check(path, signers=signers)
    bundle.require_whole(path, found)
    manifest = found.manifest

    def by_hand(member: Member) -> Deployed:
        return deploy.deploy(path, lambda: member.connect(fleet.ssh_config), member.how, owner=owner, signers=signers)

    def until_confirmed(member: Member, done: Deployed) -> None:
        deploy.await_confirmation(lambda: member.connect(fleet.ssh_config), done, member.how)

    with publish.lock(folder):
        rows = _resumed(folder / STATE, manifest, fleet)
        rolling = _Rolling(fleet, rows, folder / STATE, manifest, show, deploy_one or by_hand, confirm_one or until_confirmed)
        try:
            why = rolling.run()
        except BaseException as error:
            why = f"interrupted: {type(error).__name__}"
            _report(folder, manifest, RollOut(manifest.id, manifest.release, rolling.rows, why))
            raise
        ended = RollOut(manifest.id, manifest.release, rolling.rows, why)
        _report(folder, manifest, ended)
    return ended


def ask_each(fleet: Fleet, ask: Callable[[Device], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The answer of every device, several asked at a time; `error` in it where there is none."""
    from concurrent.futures import ThreadPoolExecutor

    def one(member: Member) -> dict[str, Any]:
        try:
            connection = member.connect(fleet.ssh_config)
            try:
                return ask(Device(connection, member.how.root or find_root(connection), python=member.how.python))
            finally:
                connection.close()
        except DeploykitError as error:
            return {"error": str(error), "exit_code": error.exit_code}

    with ThreadPoolExecutor(fleet.parallel) as pool:
        return dict(zip((member.name for member in fleet.members), pool.map(one, fleet.members), strict=True))


class _Rolling:
    """A roll-out that runs. Threads deploy; this one alone writes down and shows what became of them."""

    def __init__(
        self,
        fleet: Fleet,
        rows: dict[str, Row],
        state: Path,
        manifest: Manifest,
        show: Callable[[dict[str, Row]], None],
        deploy_one: Callable[[Member], Deployed],
        confirm_one: Callable[[Member, Deployed], None],
    ) -> None:
        self.rows, self.why_stopped = rows, ""
        self._fleet, self._state, self._manifest, self._show = fleet, state, manifest, show
        self._deploy, self._confirm = deploy_one, confirm_one
        self._said: queue.Queue[tuple[str, Row]] = queue.Queue()

    def run(self) -> str:
        """All waves; why it stopped before the end."""
        for is_canary, members in waves(self._fleet):
            left = [member for member in members if self.rows[member.name].outcome is not Outcome.DONE]
            running = 0
            while left or running:
                while left and running < self._fleet.parallel and not self._stop(is_canary, members):
                    self._start(left.pop(0))
                    running += 1
                if not running:
                    break
                name, row = self._said.get()
                running -= row.outcome is not Outcome.RUNNING
                self._keep(name, row)
            self.why_stopped = self._stop(is_canary, members)
            if self.why_stopped:
                break
        return self.why_stopped

    def _stop(self, is_canary: bool, wave: Sequence[Member]) -> str:
        failed = [name for name, row in self.rows.items() if row.outcome is Outcome.FAILED]
        canaries = [member.name for member in wave if is_canary and member.name in failed]
        if canaries:
            return f"stopped: the canary {canaries[0]} failed"
        return f"stopped: {len(failed)} failed" if len(failed) >= self._fleet.stop_after else ""

    def _start(self, member: Member) -> None:
        self._keep(member.name, Row(member.group, Outcome.RUNNING, "deploying"))
        threading.Thread(target=self._one, args=(member,), name=member.name, daemon=True).start()

    def _one(self, member: Member) -> None:
        began = time.monotonic()
        facts: dict[str, Any] = {}
        try:
            done = self._deploy(member)
            facts = {**done.facts, "answers": {}}
            is_on_trial = not done.code and done.trial_s is not None
            if is_on_trial:
                self._said.put((member.name, Row(member.group, Outcome.RUNNING, "on trial", 0, done.seconds, facts)))
                self._confirm(member, done)
            outcome = Outcome.FAILED if done.code else Outcome.DONE
            runs = f"runs {done.id[:12]}, {done.sent_bytes:,} bytes sent" + ", confirmed" * is_on_trial
            text, code = (f"did not pass {done.stage}", done.code) if done.code else (runs, 0)
        except DeploykitError as error:
            outcome, text, code = Outcome.FAILED, str(error), error.exit_code
        except BaseException as error:
            outcome, text, code = Outcome.FAILED, f"{type(error).__name__}: {error}", 1
        row = Row(member.group, outcome, text, code, time.monotonic() - began, facts)
        self._said.put((member.name, row))

    def _keep(self, name: str, row: Row) -> None:
        self.rows[name] = row
        value = {"schema": _SCHEMA, "id": self._manifest.id, "release": self._manifest.release}
        rows = {name: _row_json(row) for name, row in self.rows.items()}
        publish.write_file(self._state, (json.dumps({**value, "devices": rows}, indent=1) + "\n").encode())
        self._show(self.rows)


def _resumed(path: Path, manifest: Manifest, fleet: Fleet) -> dict[str, Row]:
    """A row for each device: done where it was done before, waiting otherwise."""
    rows = {member.name: Row(member.group) for member in fleet.members}
    if not path.exists():
        return rows
    try:
        value = json.loads(path.read_text())
        if (value["id"], value["release"]) != (manifest.id, manifest.release):
            why = f"it is of release {value['release']}, id {value['id']}"
            raise UsageError(f"{printable(path)} is of another bundle", why=why, fix="another --output")
        known = {str(name): _row(row) for name, row in value["devices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{printable(path)} is damaged", why=str(error), fix="remove it: devices that are done say so"
        ) from error
    return {name: known[name] if name in known and known[name].outcome is Outcome.DONE else row for name, row in rows.items()}


def _row(value: Mapping[str, Any]) -> Row:
    return Row(**{**value, "outcome": Outcome(value["outcome"])})


def _row_json(row: Row) -> dict[str, Any]:
    return {**vars(row), "outcome": row.outcome.value, "facts": dict(row.facts)}


def _report(folder: Path, manifest: Manifest, ended: RollOut) -> None:
    told = {name: _row_json(row) for name, row in ended.rows.items()}
    head = {"network": manifest.name, "release": str(manifest.release), "id": manifest.id, "stopped": ended.why_stopped or "no"}
    publish.write_file(folder / PAGE, rollout.page(head, told).encode())
    publish.write_file(folder / JUNIT, junit.render(rollout.summary(head, told)))


def _tables(value: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, dict[str, Any]]:
    found = value.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        problems.append(f"{key}: not tables, such as [{key}.NAME]")
        return {}
    return found


def _canary(name: str, table: Mapping[str, Any], problems: list[str]) -> float:
    problems += _unknown(table, _GROUP_KEYS, f"groups.{name}.")
    share = table.get("canary", 0.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        problems.append(f"groups.{name}.canary: {share!r} is no share between 0 and 1")
        return 0.0
    return float(share)


def _member(name: str, table: Mapping[str, Any], base: How, groups: Mapping[str, Any], problems: list[str]) -> Member:
    problems += _unknown(table, _DEVICE_KEYS, f"devices.{name}.")
    how = _how(table, base, f"devices.{name}.", problems)
    address, group, host_key = (_text(table, key, f"devices.{name}.", problems) for key in ("address", "group", "host_key"))
    if "address" not in table:
        problems.append(f"devices.{name}.address: it is missing")
    elif address and (why := remote.objection(address)):
        problems.append(f"devices.{name}.address: {why}")
    if group and group not in groups:
        problems.append(f"devices.{name}.group: there is no [groups.{group}]")
    return Member(name, group or "", address or "", how, host_key)


def _how(table: Mapping[str, Any], base: How, where: str, problems: list[str]) -> How:
    """`base`, with the root and the Python that a table names."""
    root, python = (_text(table, key, where, problems) for key in ("root", "python"))
    return replace(base, root=root or base.root, python=python or base.python)


def _text(table: Mapping[str, Any], key: str, where: str, problems: list[str]) -> str | None:
    """A text that may be there; None where it is not."""
    found = table.get(key)
    if found is not None and (not isinstance(found, str) or not found):
        problems.append(f"{where}{key}: {found!r} is no text")
        return None
    return found


def _count(value: Mapping[str, Any], key: str, fallback: int, problems: list[str]) -> int:
    number = value.get(key, fallback)
    if type(number) is not int or not 1 <= number <= _MOST_PARALLEL:
        problems.append(f"{key}: {number!r} is no whole number from 1 to {_MOST_PARALLEL}")
        return fallback
    return number


def _unknown(table: Mapping[str, Any], known: set[str], where: str) -> list[str]:
    return [f"{where}{key}: there is no such key; there are {', '.join(sorted(known))}" for key in table if key not in known]
