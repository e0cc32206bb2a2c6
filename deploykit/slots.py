"""Releases on a device, and the crash-safe switch between them.

    releases/<bundle id>/      a bundle's files, by digest and by name; never changed once it has this name
    current, previous          links to two of them
    state.json                 what is being done, which release waits to be confirmed, and under which numbers releases came
    reserve                    space that is given up when the disk is full, so that a way back can be written down
    health/<bundle id>.json    what was said of each engine of a release, and which one runs

What is going to be done is on the disk before it is done, so `recover` knows without guessing what a power cut left. A link is
switched by a rename, and the order is the one that survived simulated power cuts on ext4 and xfs: every file, its folder, the
folder's parent, then the rename of the link, then the parent again. Until the rename of `current` the old release is the
current one, afterwards the new one. Order comes from release numbers and time from the boot and its clock: a device may
believe that it is 1970.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors
from deploykit.gate import Verdict
from deploykit.jsonable import to_json

RELEASES, ENGINES, HEALTH, CURRENT, PREVIOUS, STATE = "releases", "engines", "health", "current", "previous", "state.json"
RESERVE = "reserve"
_SCHEMA = 1
_RESERVE_BYTES = 1 << 20  # of 128 KiB that are free xfs does not make one small file: it asks for room for a chunk of inodes
_ID = re.compile(r"[0-9a-f]{64}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Moment:
    """A point in time that no wall clock is needed for: which boot, and the seconds since it, sleep included."""

    boot: str
    seconds: float

    @classmethod
    def now(cls) -> Moment:
        """This boot, now."""
        return cls(_BOOT_ID.read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME))


@dataclass(frozen=True)
class Trial:
    """A current release that its application has to confirm: within so many seconds after `since`, and in the same boot."""

    id: str
    since: Moment
    within_s: float

    def is_over(self, now: Moment) -> bool:
        """Whether the time has run out, or the device has started again."""
        return now.boot != self.since.boot or now.seconds - self.since.seconds > self.within_s


@dataclass(frozen=True)
class Doing:
    """A switch that was begun: to which release, from which links, and the trial that starts with it."""

    verb: str
    id: str
    current: str | None
    previous: str | None
    trial: Trial | None = None


@dataclass(frozen=True)
class State:
    """What a device knows beyond its two links."""

    doing: Doing | None = None
    trial: Trial | None = None
    log: tuple[str, ...] = field(default=())  # the last decisions, newest last: downgrades and automatic rollbacks
    # The highest number that a release came under after it was installed: its files keep the manifest of the first time.
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """The engine that a release runs with, by the name of its folder, and what was said of it when it was activated.

    It stands apart from `Health.checked`: what is found later about this engine or another one does not stop what runs.
    """

    engine: str
    identity: str
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class Health:
    """How a release does on this device: for each engine its identity and its parts, each with a verdict, and which one runs.

    The parts are `parity`, `precision`, and where it was measured `latency`: plain JSON values.
    """

    checked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    running: Running | None = None


@contextmanager
def exclusive(root: Path, *, patience_s: float = 5.0) -> Iterator[None]:
    """Hold `root` for this process, so that one at a time changes it; a root that is not there is made.

    A process that is through in a moment is waited for: the watchdog runs every few seconds, and an application that confirms
    its release just then, or a deployment, is not to fail because of it.
    Raises UsageError when `root` is a file, or is held for longer than `patience_s` seconds, naming the other process.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{printable(root)} is a file, not a folder", fix="choose another folder with --root")
    missing = [folder for folder in (root.absolute(), *root.absolute().parents) if not folder.exists()]
    until = time.monotonic() + patience_s
    while True:
        try:
            lock = publish.lock(root)
            lock.__enter__()
            break
        except UsageError as error:
            if time.monotonic() >= until:
                what = f"{printable(root)} is being changed by another process"
                raise UsageError(what, why=error.what, fix="wait for it") from error
            time.sleep(0.05)
    try:
        for folder in reversed(missing):
            _fsync(folder.parent)  # those above were there before, and who made them may not let us read them
        yield
    finally:
        lock.__exit__(None, None, None)


def current(root: Path) -> str | None:
    """The identity of the release that runs; None when there is none."""
    return _target(root / CURRENT)


def previous(root: Path) -> str | None:
    """The identity of the release to go back to; None when there is none."""
    return _target(root / PREVIOUS)


def is_id(text: str) -> bool:
    """Whether a text is the identity of a release: 64 hex digits."""
    return _ID.fullmatch(text) is not None


def release_folder(root: Path, id: str) -> Path:
    """Where the files of a release lie. Raises UsageError for what is no identity: it becomes part of a path."""
    if not is_id(id):
        raise UsageError(f"{printable(id)[:80]!r} is no identity of a bundle", why="one has 64 hexadecimal digits")
    return root / RELEASES / id


def install(root: Path, id: str, fill: Callable[[Path], None]) -> bool:
    """Let `fill` write the files of release `id` into an empty folder, and publish it; False when it is there already.

    Raises what `fill` raises; then nothing is left behind.
    """
    final = release_folder(root, id)
    if final.is_dir():
        _fsync(final.parent)  # whoever gave it this name may have been killed before the name was on the disk
        return False
    make_folder(root / RELEASES)
    if not (root / RESERVE).is_file() or (root / RESERVE).stat().st_size < _RESERVE_BYTES:
        publish.write_file(root / RESERVE, bytes(_RESERVE_BYTES))
    with publish.directory(final) as folder:
        fill(folder)
    return True


def activate(root: Path, id: str, *, within_s: float | None, now: Moment, note: str = "") -> bool:
    """Make `id` the current release and the current one the previous; False, and nothing changes, when it is current already.

    With `within_s` the release is on trial: `recover` goes back to the previous one unless `confirm` is called within so many
    seconds and before the device starts again. `note` is kept in the log.
    Raises UsageError when there is no such release, or while another one is on trial.
    """
    if not release_folder(root, id).is_dir():
        raise UsageError(f"{printable(root)} has no release {id}", fix="install it first")
    refuse_during_trial(root, id)
    before, state = current(root), read_state(root)
    if before == id:
        return False
    trial = None if within_s is None else Trial(id, now, within_s)
    log = (*state.log, note) if note else state.log
    doing = Doing("activate", id, before, previous(root), trial)
    _write_state(root, replace(state, doing=doing, log=log[-20:]))
    _finish(root, doing)
    return True


def refuse_during_trial(root: Path, id: str) -> None:
    """Raise UsageError while another release than `id` is on trial: it would become the way back, and nobody has said that it
    is good, while the last one that was would be collected. A first release has no such one, and is no obstacle to a better."""
    trial = read_state(root).trial
    if trial is not None and trial.id != id and previous(root) is not None:
        why = "whether it is good is not known, and it would be the only way back"
        raise UsageError(f"the release {trial.id} is on trial", why=why, fix="confirm it, or roll back, and activate then")


def rollback(root: Path, *, note: str = "") -> str:
    """Make the previous release the current one again; its identity. There is no previous one then, and nothing on trial.

    The release that was left is no way back: it stays until it is collected, and can be activated by name.
    Raises UsageError when there is no previous release.
    """
    to, state = previous(root), read_state(root)
    if to is None:
        raise UsageError(
            f"{printable(root)} has no previous release to go back to", fix="activate another release by its identity"
        )
    doing = Doing("rollback", to, current(root), to)
    log = (*state.log, note) if note else state.log
    _write_state(root, replace(state, doing=doing, log=log[-20:]))
    _finish(root, doing)
    return to


def confirm(root: Path) -> bool:
    """The application runs well: the release on trial stays. False when nothing is on trial."""
    state = read_state(root)
    if state.trial is None:
        return False
    _write_state(root, replace(state, trial=None))
    return True


def recover(root: Path, now: Moment) -> list[str]:
    """Finish or undo what was begun, go back where a trial was not confirmed, remove left-overs; what was done, in words.

    To be run when the device starts, and now and then while something is on trial. Doing it again does nothing.
    """
    done = [f"removed {path.name}" for folder in (root, root / RELEASES, root / HEALTH) for path in _remove_leftovers(folder)]
    for engines in _folders(root / ENGINES):
        done += [f"removed {path.name}" for path in _remove_leftovers(engines)]
    state = read_state(root)
    if state.doing is not None:
        doing = state.doing
        if doing.verb == "activate" and current(root) != doing.id:
            # `current` was not switched: nothing has happened yet but, maybe, to `previous`.
            _point(root, PREVIOUS, doing.previous)
            _write_state(root, replace(state, doing=None))
            done.append(f"undid activating {doing.id}")
        else:
            _finish(root, doing)
            done.append(f"finished {doing.verb} to {doing.id}")
    state = read_state(root)
    if state.trial is not None and state.trial.is_over(now) and previous(root) is not None:
        failed = state.trial.id
        rollback(root, note=f"went back from {failed}: not confirmed within {state.trial.within_s:g} s and before the next start")
        done.append(f"went back from {failed}, which was not confirmed")
    return done


def collect_garbage(root: Path) -> list[str]:
    """Remove releases, their engines and verdicts that are neither current nor previous, nor opened by a process.

    Returns the identities that were removed.
    """
    doing = read_state(root).doing
    kept = {current(root), previous(root)} | ({doing.id, doing.current, doing.previous} if doing else set())
    names = {path.name for folder in (RELEASES, ENGINES) for path in _folders(root / folder)}
    names |= {path.stem for path in (root / HEALTH).glob("*.json")} if (root / HEALTH).is_dir() else set()
    removed = [name for name in sorted(names - kept) if _ID.fullmatch(name) and _remove_release(root, name)]
    state = read_state(root)
    if state.numbers.keys() & set(removed):
        _write_state(root, replace(state, numbers={id: state.numbers[id] for id in state.numbers.keys() - set(removed)}))
    return removed


def hold(root: Path, id: str) -> int:
    """An open descriptor that keeps the release from being collected until it is closed.

    Raises UsageError when there is no such release.
    """
    folder = release_folder(root, id)
    try:
        with translating_os_errors("open", folder):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise UsageError(f"{printable(root)} has no release {id}") from error
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
        os.close(descriptor)  # collected between the two
        raise UsageError(f"{printable(root)} has no release {id} any more")
    return descriptor


def number(root: Path, id: str, first: int) -> int:
    """The release number of `id`: the highest it came under, `first` being the one in its own manifest."""
    return max(first, read_state(root).numbers.get(id, first))


def note_number(root: Path, id: str, number: int) -> None:
    """Keep that the installed release `id` came once more, under the higher `number`."""
    state = read_state(root)
    _write_state(root, replace(state, numbers={**state.numbers, id: number}))


def read_health(root: Path, id: str) -> Health:
    """What is known of how a release does on this device; empty when nothing is. Raises UsageError when it is damaged."""
    path = root / HEALTH / f"{release_folder(root, id).name}.json"
    try:
        value = _object(json.loads(path.read_text()))
        checked = {str(name): _checked(found) for name, found in _object(value["checked"]).items()}
        return Health(checked, None if value["running"] is None else _running(_object(value["running"])))
    except FileNotFoundError:
        return Health()
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{printable(path)} is damaged", why=why, fix="remove it, then run parity and activate again") from error


def write_health(root: Path, id: str, health: Health) -> None:
    """Replace what is known of how a release does here."""
    make_folder(root / HEALTH)
    path = root / HEALTH / f"{release_folder(root, id).name}.json"
    publish.write_file(path, (json.dumps(to_json(health), indent=1) + "\n").encode())


def _checked(value: Any) -> dict[str, Any]:
    """What was said of one engine, if it has the parts that every check leaves."""
    found = dict(_object(value))
    _text(found["identity"])
    for part in {"parity", "precision", *found} - {"identity"}:
        Verdict(_object(found[part])["verdict"])
    return found


def _running(value: Mapping[str, Any]) -> Running:
    engine, verdicts = _text(value["engine"]), _object(value["verdicts"])
    if Path(engine).name != engine:
        raise ValueError(f"{engine[:80]!r} is no name of an engine")
    return Running(engine, _text(value["identity"]), {part: Verdict(said) for part, said in verdicts.items()})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:80]!r} is no text")
    return value


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each one on the disk in the folder that names it when this returns.

    Otherwise a release that is complete could lie in a folder that a power cut takes away.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        make_folder(folder.parent)
        with translating_os_errors("write", folder):
            folder.mkdir(exist_ok=True)
            _fsync(folder.parent)


def status(root: Path, now: Moment) -> dict[str, Any]:
    """What is current, previous, installed, being done and on trial, as plain JSON values."""
    state = read_state(root)
    trial = None
    if state.trial is not None:
        left = 0.0 if state.trial.is_over(now) else state.trial.within_s - (now.seconds - state.trial.since.seconds)
        trial = {"id": state.trial.id, "seconds_left": round(left, 1)}
    return {
        "current": current(root),
        "previous": previous(root),
        "releases": [path.name for path in _folders(root / RELEASES) if _ID.fullmatch(path.name)],
        "interrupted": None if state.doing is None else state.doing.verb,
        "trial": trial,
        "log": list(state.log),
    }


def read_state(root: Path) -> State:
    """What `state.json` says; the empty state where there is none. Raises UsageError when it is damaged."""
    path = root / STATE
    try:
        value = json.loads(path.read_text())
        if value["schema"] != _SCHEMA:
            raise ValueError(f"it has schema {value['schema']!r}")
        doing = value["doing"]
        known = None if doing is None else Doing(**{**doing, "trial": _trial(doing["trial"])})
        numbers = {id: int(number) for id, number in _object(value["numbers"]).items()}
        return State(known, _trial(value["trial"]), tuple(map(str, value["log"])), numbers)
    except FileNotFoundError:
        return State()
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{printable(path)} is damaged",
            why=f"{type(error).__name__}: {error}",
            fix="remove it: the links current and previous are right whatever it says",
        ) from error


def _trial(value: Any) -> Trial | None:
    return None if value is None else Trial(value["id"], Moment(**value["since"]), float(value["within_s"]))


def _write_state(root: Path, state: State) -> None:
    """Replace `state.json`. On a full disk the reserve is given up first: going back is what such a device may need most."""
    value: Mapping[str, Any] = {"schema": _SCHEMA, **_object(to_json(state))}
    content = (json.dumps(value, indent=1) + "\n").encode()
    try:
        publish.write_file(root / STATE, content)
    except DeploykitError as error:
        is_full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full or not (root / RESERVE).exists():
            raise
        publish.remove(root / RESERVE)
        publish.write_file(root / STATE, content)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:80]!r} is no object")
    return value


def _finish(root: Path, doing: Doing) -> None:
    """Everything that a switch consists of after its intention is on the disk; doing it again changes nothing.

    The way back is made first: there is no moment in which the new release runs and nothing leads back.
    """
    if doing.verb == "activate":
        _point(root, PREVIOUS, doing.current)
        _point(root, CURRENT, doing.id)
    else:
        _point(root, CURRENT, doing.id)
        _point(root, PREVIOUS, None)
    _write_state(root, replace(read_state(root), doing=None, trial=doing.trial))


def _point(root: Path, name: str, id: str | None) -> None:
    """Let the link `name` lead to release `id`, or to nothing, in one step; on the disk when this returns."""
    link = root / name
    if _target(link) == id:
        return
    with translating_os_errors("switch", link):
        if id is None:
            link.unlink()
        else:
            aside = root / (name + publish.PARTIAL)
            aside.unlink(missing_ok=True)
            aside.symlink_to(f"{RELEASES}/{id}")
            aside.rename(link)
        _fsync(root)


def _target(link: Path) -> str | None:
    if not link.is_symlink():
        return None
    name = link.readlink().name
    return name if _ID.fullmatch(name) else None


def _remove_leftovers(folder: Path) -> list[Path]:
    found = publish.leftovers(folder)
    for path in found:
        with translating_os_errors("remove", path):
            publish.remove(path)
    return found


def _remove_release(root: Path, id: str) -> bool:
    """Remove what belongs to `id`, unless a process holds it. It loses its name first, so that no half of it is ever found."""
    folder = root / RELEASES / id
    with translating_os_errors("remove", folder):
        if folder.is_dir():
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale = folder.with_name(id + publish.STALE)
                publish.remove(stale)
                folder.rename(stale)
            except BlockingIOError:
                return False
            finally:
                os.close(descriptor)
            publish.remove(stale)
        publish.remove(root / HEALTH / f"{id}.json")
        publish.remove(root / ENGINES / id)
    return True


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _fsync(folder: Path) -> None:
    with translating_os_errors("sync", folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
