"""Bundle, device -> release: bring what the device lacks, build there, prove it there, then switch.

Nothing that has been done is done again, so a deployment that was cut goes on by being started again, and `deploy` itself does
so a few times. At most 12 commands run on the device when nothing is cut.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit import bundle, lease
from deploykit.bundle import DEVICE_HALF, Bundle, incoming
from deploykit.device import BUILD_SILENCE_S, ROOT, Device, Lease, sendable
from deploykit.errors import DeploykitError, LineError, StageError, UsageError, printable
from deploykit.progress import Progress, silent
from deploykit.remote import Connection

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
_ROUNDS = 3  # of sending what came damaged
_MOST_RUNS = 20_000  # of blocks, so that the line that names them stays below its limit
_DONE = 0
_IS_HELD = "is being changed by another process"
_GRACE_S = 60.0  # for a device's watchdog, which looks every 20 s, and for a line that is cut
_LOOKS, _LOOK_S = 20, (1.0, 10.0)  # how often a device on trial is asked while its time lasts, and the shortest and longest pause


@dataclass(frozen=True)
class How:
    """How to deploy.

    `root` is the folder on the device, by default one of the network's name below /opt/deploykit. `confirm_within_s` puts the
    release on trial for so many seconds, until somebody confirms it. `rebuild` lets the device build its engine again when an
    update there has made it stale; `allow_downgrade` takes a release that is lower than the one there.

    `model` is one graph of the bundle, `<runtime>-<precision>`, by default the only one that the device can build. `threads`
    are of its engine, 0 for all cores; `processes` and `queries` of the benchmark, where the bundle has rules of latency.
    """

    root: str | None = None
    python: str = "python3"
    confirm_within_s: float | None = None
    rebuild: bool = False
    allow_downgrade: bool = False
    model: str | None = None
    threads: int = 0
    processes: int = 10
    queries: int = 30


@dataclass(frozen=True)
class Deployed:
    """What became of a deployment. `stage` is the last one; `code` is 0, or 3 and 5 when a gate did not open there.

    `sent_bytes` of `total_bytes` of blobs went over the line, the beginnings of cut ones included; `commands` ran on the device.
    """

    device: str
    root: str
    id: str
    release: int
    stage: str
    code: int
    activated: bool
    sent_bytes: int
    sent_blobs: int
    total_bytes: int
    blobs: int
    commands: int
    attempts: int
    seconds: float
    answers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trial_s(self) -> float | None:
        """How many seconds there are, or were left, to confirm the release; None when it is not on trial."""
        said = self.answers.get("activate", {})
        found = said.get("confirm_within_s") if said.get("activated") else (said.get("trial") or {}).get("seconds_left")
        return None if found is None else float(found)

    @property
    def facts(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**{key: value for key, value in vars(self).items() if key != "answers"}, "answers": dict(self.answers)}


@dataclass
class _Count:
    """What all attempts of one deployment did together."""

    sent_bytes: int = 0
    commands: int = 0
    blobs: set[str] = field(default_factory=set)


def deploy(
    path: Path,
    connect: Callable[[], Connection],
    how: How,
    *,
    owner: str,
    signers: Path | None = None,
    progress: Progress = silent,
    pause: Callable[[float], None] = time.sleep,
) -> Deployed:
    """Make the bundle at `path` the current release of a device, unless a gate there says no.

    `owner` is who holds the device's lease meanwhile, as others are told. `signers` are checked on this host, too.
    When the line is cut it is tried again, a few times, with longer and longer pauses.
    Raises UsageError for a bundle that is not whole or not signed by `signers`, DeploykitError when the device refuses or
    somebody else is deploying, LineError when the line was cut for good.
    """
    bundle.require_whole(path, bundle.check(path, signers=signers))
    began, count = time.monotonic(), _Count()
    for attempt, rest in enumerate((*_PAUSES_S, None), start=1):
        try:
            connection = connect()
            try:
                with bundle.opened(path, signers=signers) as opened:
                    root = how.root or f"{ROOT}/{opened.manifest.name}"
                    device = Device(connection, root, python=how.python)
                    steps = _Steps(opened, device, how, count, progress, pause if attempt > 1 else None)
                    ended = steps.run(owner)
                    manifest = opened.manifest
            finally:
                count.commands += connection.commands
                connection.close()
            break
        except LineError:
            if rest is None:
                raise
            pause(rest)
    stage, code, answers = ended
    blobs = {blob.sha256: blob.size for blob in manifest.files.values()}
    return Deployed(
        device=device.name,
        root=root,
        id=manifest.id,
        release=manifest.release,
        stage=stage,
        code=code,
        activated=bool(answers.get("activate", {}).get("activated")),
        sent_bytes=count.sent_bytes,
        sent_blobs=len(count.blobs),
        total_bytes=sum(blobs.values()),
        blobs=len(blobs),
        commands=count.commands,
        attempts=attempt,
        seconds=time.monotonic() - began,
        answers=answers,
    )


def await_confirmation(
    connect: Callable[[], Connection], done: Deployed, how: How, *, pause: Callable[[float], None] = time.sleep
) -> None:
    """Wait until a release that is on trial is confirmed, by its application or by `deploykit device confirm`.

    A device that cannot be reached, or gives no answer, is asked again as long as its time lasts: it may be starting again, which
    ends the trial. Raises StageError when another release runs there, or when its time is over and nobody has confirmed.
    """
    if done.trial_s is None:
        return
    until = time.monotonic() + done.trial_s + _GRACE_S
    rest = min(max(done.trial_s / _LOOKS, _LOOK_S[0]), _LOOK_S[1])
    what = f"{done.device}: the release {done.id} was not confirmed within {done.trial_s:g} s"
    while True:
        try:
            said = _status(connect, done.root, how.python)
        except DeploykitError as error:  # also a name that is not known while the board is away, and a command that was cut off
            what_now = f"{done.device}: whether the release {done.id} was confirmed is not known"
            why, fix = f"it gives no answer: {error.what}", "look at it with deploykit status; the same command goes on with it"
        else:
            if said["current"] != done.id:
                raise StageError(
                    what,
                    why=f"{said['current']} runs there now: it went back, or somebody deployed another release",
                    fix="find out why the application did not confirm, and deploy a release that it does",
                )
            if said["trial"] is None:
                return
            if said["trial"]["seconds_left"] <= 0 and said["previous"] is None:
                raise StageError(
                    what,
                    why="it still runs: there is no release to go back to",
                    fix="deploykit device confirm, if it runs well, and the same command again",
                )
            what_now, why = what, "it still runs: nothing there looks after it"
            fix = "deploykit rollback, and run there now and then what `deploy` says of a watchdog"
        if time.monotonic() > until:
            raise StageError(what_now, why=why, fix=fix)
        pause(rest)


def _status(connect: Callable[[], Connection], root: str, python: str) -> dict[str, Any]:
    connection = connect()
    try:
        return Device(connection, root, python=python).ask("status")
    finally:
        connection.close()


@dataclass(frozen=True)
class _Sending:
    """A blob to send: how much of its beginning is there, or which runs of its blocks."""

    blob: bundle.Blob
    part: int
    keep: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        """How many bytes go over."""
        ends = (min(self.blob.size, (first + count) * incoming.BLOCK) for first, count in self.keep)
        kept = sum(end - first * incoming.BLOCK for end, (first, _) in zip(ends, self.keep, strict=True))
        return self.blob.size - self.part - kept


class _Steps:
    """One attempt, from whatever the one before has left."""

    def __init__(
        self,
        opened: Bundle,
        device: Device,
        how: How,
        count: _Count,
        progress: Progress,
        patient: Callable[[float], None] | None,
    ) -> None:
        self._opened, self._device, self._how, self._count = opened, device, how, count
        self._progress, self._patient = progress, patient
        self._id = opened.manifest.id
        self._halves: set[str | None] = set()  # the digests of device halves that are there

    def run(self, owner: str) -> tuple[str, int, dict[str, Any]]:
        """The last stage, its exit code, and every answer."""
        device, answers = self._device, {}
        found = device.survey(self._id)
        is_same = found.own_half is not None and found.release_sha256 == hashlib.sha256(self._opened.content).hexdigest()
        self._halves = {found.installed_sha256, found.came_sha256}
        if is_same:
            device.half = str(found.own_half)
        elif found.installed_sha256 is None:
            answers["bootstrap"] = self._bootstrap()
        with self._leased(owner) as held:
            if not is_same:
                if "bootstrap" not in answers:
                    answers["bootstrap"] = self._bootstrap()
                answers["receive"] = self._bring()
                answers["install"] = self._ask("install-received", self._id, *self._downgrade())
            device.half = f"releases/{self._id}"
            if is_same and self._how.confirm_within_s is not None and (trial := self._trial()) is not None:
                # It runs, and its application is deciding: a benchmark would disturb that, and keep `confirm` waiting.
                answers["activate"] = {"id": self._id, "activated": False, "trial": trial}
                return "activate", _DONE, answers
            for stage, words, silence_s in self._stages():
                held.require()
                self._progress(stage, 0, 1)
                answers[stage] = self._ask(stage, *words, silence_s=silence_s)
                self._progress(stage, 1, 1)
                if answers[stage]["exit_code"]:
                    return stage, answers[stage]["exit_code"], answers
        return "activate", _DONE, answers

    def _trial(self) -> dict[str, Any] | None:
        """The trial that this very release is on, as the device tells it."""
        found: dict[str, Any] | None = self._ask("status").get("trial")
        return found if found is not None and found.get("id") == self._id else None

    def _bootstrap(self) -> dict[str, Any]:
        blob = self._opened.manifest.portable.get(DEVICE_HALF)
        if blob is None:
            raise UsageError(f"{printable(self._opened.path)} holds no device half", fix="pack it again")
        is_there = blob.sha256 in self._halves
        half = b"" if is_there else b"".join(bundle.pieces(self._opened, blob))
        if not is_there:
            self._count.sent_bytes += len(half)
            self._count.blobs.add(blob.sha256)
        return self._device.bootstrap(self._id, self._opened.content, self._opened.signature, half, blob.sha256)

    def _bring(self) -> dict[str, Any]:
        """Send the blobs that the device lacks, each from where it was cut. Raises DeploykitError when they stay damaged."""
        answer: dict[str, Any] = {}
        for count in range(_ROUNDS):
            lacking = self._lacking(by_blocks=not count)
            if not lacking:
                return answer
            answer = self._ask("receive", self._id, stdin=self._pieces(lacking))
            if not answer["damaged"]:
                return answer
        raise DeploykitError(f"{self._device.name} keeps getting damaged blobs", problems=list(map(str, answer["damaged"]))[:20])

    def _lacking(self, *, by_blocks: bool) -> list[_Sending]:
        """The blobs that are not there, and what is there of each. What the device says is checked against the manifest."""
        known = {blob.sha256: blob for blob in self._opened.manifest.files.values()}
        answer = self._ask("missing", self._id, *self._downgrade())
        try:
            found = [(known[item["sha256"]], int(item["part"]), list(map(str, item["sums"]))) for item in answer["missing"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DeploykitError(f"{self._device.name} lacks blobs that the bundle has not") from error
        return [
            _Sending(blob, part if 0 <= part <= blob.size else 0, self._same(blob, sums) if by_blocks and not part else [])
            for blob, part, sums in found
        ]

    def _same(self, blob: bundle.Blob, sums: list[str]) -> list[tuple[int, int]]:
        """The runs of blocks, first and count, that a blob has in common with what it replaces there."""
        if not sums:
            return []
        runs: list[tuple[int, int]] = []
        for number, (ours, theirs) in enumerate(zip(incoming.sums(bundle.pieces(self._opened, blob)), sums, strict=False)):
            if ours == theirs and runs and sum(runs[-1]) == number:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            elif ours == theirs:
                runs.append((number, 1))
        return runs[:_MOST_RUNS]

    def _pieces(self, lacking: list[_Sending]) -> Iterator[bytes]:
        total = sum(sending.bytes for sending in lacking)
        done = 0
        for sending in lacking:
            header = {"sha256": sending.blob.sha256, "offset": sending.part, "keep": sending.keep}
            yield json.dumps(header).encode() + b"\n"
            self._count.blobs.add(sending.blob.sha256)
            pieces = sendable(bundle.pieces(self._opened, sending.blob), sending.part)
            for piece in _without(pieces, sending.keep):
                yield piece
                done += len(piece)
                self._count.sent_bytes += len(piece)
                self._progress("transfer", done, total)

    def _stages(self) -> Iterator[tuple[str, list[str], float]]:
        how, id = self._how, self._id
        model = [] if how.model is None else ["--model", how.model]
        yield "build", [id, "--threads", str(how.threads), *model], BUILD_SILENCE_S
        yield "parity", [id], BUILD_SILENCE_S
        if self._opened.manifest.gate:
            yield "benchmark", [id, "--processes", str(how.processes), "--queries", str(how.queries)], BUILD_SILENCE_S
        trial = []
        if how.confirm_within_s is not None:
            trial = ["--confirm-within", str(how.confirm_within_s)]
        if trial or how.rebuild:
            yield "watch", ["--rebuild"] if how.rebuild else [], 120.0
        yield "activate", [id, *trial, *self._downgrade()], 600.0

    def _downgrade(self) -> list[str]:
        return ["--allow-downgrade"] if self._how.allow_downgrade else []

    def _ask(self, verb: str, *words: str, **more: Any) -> dict[str, Any]:
        """Ask; after a cut, wait until the command that was running then has ended: it holds the root."""
        found: dict[str, Any] = self._patiently(lambda: self._device.ask(verb, *words, **more), _IS_HELD, 600)
        return found

    def _leased(self, owner: str) -> Lease:
        """The lease; after a cut, our own that has not run out yet is waited for."""
        found: Lease = self._patiently(lambda: self._device.lease(owner), owner, lease.SECONDS + 15)
        return found

    def _patiently(self, ask: Callable[[], Any], reason: str, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                return ask()
            except LineError:
                raise
            except DeploykitError as error:
                if self._patient is None or reason not in str(error) or time.monotonic() > until:
                    raise
                self._patient(1.0)


def _without(pieces: Iterator[bytes], keep: list[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes that are not in runs of blocks that are kept; with any, pieces are whole blocks but for the last."""
    if not keep:
        yield from pieces
        return
    kept = {number for first, count in keep for number in range(first, first + count)}
    number = 0
    for piece in pieces:
        for start in range(0, len(piece), incoming.BLOCK):
            if number not in kept:
                yield piece[start : start + incoming.BLOCK]
            number += 1
