"""The commands of the device half that know of releases: one function each, and the options that they take.

This module runs on devices: standard library, numpy and one runtime, Python 3.10.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact, bundle, engines, infer, lease, publish, rebuild, slots, watchdog
from deploykit.agent.answer import Answer, probe
from deploykit.bundle import Manifest, archive, incoming
from deploykit.errors import UsageError, printable
from deploykit.gate import EXIT_CODES, Verdict, worst
from deploykit.slots import Moment

SIGNERS = "allowed_signers"
_REBUILD = "build engines again that an update of this device has made stale, and run with them where they pass the gates"
_TOP = 5


def check(asked: argparse.Namespace) -> Answer:
    """Check every file of a bundle, and its signature where signers are known."""
    found = bundle.check(asked.bundle, signers=_signers(asked))
    return Answer({**bundle.described(found), "is_whole": found.is_whole}, 0 if found.is_whole else 1)


def install(asked: argparse.Namespace) -> Answer:
    """Check a bundle and write its files as a release, which is not current yet."""
    return _install(asked, asked.bundle, None)


def install_received(asked: argparse.Namespace) -> Answer:
    """The same with a bundle that came over a connection, and what installed releases have of it."""
    root = asked.root
    with slots.exclusive(root):
        arrived = incoming.Arrived(root, asked.id)
        arrived.only(incoming.manifest(root, asked.id, _signers(asked)))
    answer = _install(asked, incoming.folder(root, asked.id), arrived)
    with slots.exclusive(root):
        incoming.clear(root, _manifest(root, asked.id))
    return answer


def _install(asked: argparse.Namespace, path: Path, files: archive.Files | None) -> Answer:
    root, signers = asked.root, _signers(asked)
    found = bundle.check(path, signers=signers, files=files)
    bundle.require_whole(path, found)
    with slots.exclusive(root), bundle.opened(path, signers=signers, files=files) as opened:
        recovered = slots.recover(root, Moment.now())
        manifest = opened.manifest
        _refuse_other(root, manifest, asked.allow_downgrade)
        publish.require_space(root, sum(blob.size for blob in manifest.files.values()))
        is_new = slots.install(root, manifest.id, lambda folder: _fill(folder, opened))
        if not is_new and manifest.release > _check_release(root, manifest.id).release:
            slots.note_number(root, manifest.id, manifest.release)
    facts = {"id": manifest.id, "release": manifest.release, "verdict": manifest.verdict}
    return Answer({**facts, "installed": is_new, "recovered": recovered})


def vouch(asked: argparse.Namespace) -> Answer:
    """Check the device half of a bundle that is coming, before it runs: who signed the manifest, and its digest there."""
    root, signers = asked.root, _signers(asked)
    place = incoming.folder(root, asked.id)
    with bundle.opened(place, signers=signers, files=incoming.Arrived(root, asked.id)) as opened:
        blob = opened.manifest.portable.get(bundle.DEVICE_HALF)
        if opened.manifest.id != asked.id or blob is None or artifact.digest_file(place / bundle.DEVICE_HALF) != blob.sha256:
            raise UsageError(f"{bundle.DEVICE_HALF} is not the one that the manifest names", fix="deploy again")
        signer = None if signers is None else bundle.signer_of(place, opened.content, opened.signature, signers)
    return Answer({"signer": signer, "by": "the installed device half"})


def missing(asked: argparse.Namespace) -> Answer:
    """Which blobs of a bundle that is coming are not there, and whether there is room for them."""
    root = asked.root
    with slots.exclusive(root):
        manifest = incoming.manifest(root, asked.id, _signers(asked))
        _refuse_other(root, manifest, asked.allow_downgrade)
        lacking = incoming.lacking(root, manifest)
        if not slots.release_folder(root, manifest.id).is_dir():
            coming = sum(blob.bytes - blob.part for blob in lacking)
            publish.require_space(root, coming + sum(blob.size for blob in manifest.files.values()))
    return Answer({"missing": lacking})


def receive(asked: argparse.Namespace) -> Answer:
    """Take blobs from standard input; each one is hashed before it counts as there."""
    root = asked.root
    with slots.exclusive(root):
        came, damaged = incoming.receive(root, incoming.manifest(root, asked.id, _signers(asked)), sys.stdin.buffer)
    return Answer({"received": came, "damaged": damaged})


def hold_lease(asked: argparse.Namespace) -> Answer:
    """Keep other deployers away while signs of life come on standard input."""
    slots.make_folder(asked.root)
    with lease.held(asked.root, asked.owner, Moment.now()):
        sys.stdout.write("leased\n")
        sys.stdout.flush()
        is_over = lease.wait_for_silence(sys.stdin.fileno(), asked.seconds)
    return Answer({"ended": "let go" if is_over else f"no sign of life for {asked.seconds:g} s"}, 0 if is_over else 1)


def watch(asked: argparse.Namespace) -> Answer:
    """Install the watchdog that goes back from a release which is not confirmed; where systemd is."""
    found = watchdog.install(asked.root, asked.root / slots.CURRENT / bundle.DEVICE_HALF, rebuild=asked.rebuild)
    return Answer(vars(found))


def build(asked: argparse.Namespace) -> Answer:
    """Build the engine of a release for this machine."""
    root, id = asked.root, asked.id
    with slots.exclusive(root):
        slots.recover(root, Moment.now())
        # An engine can take an hour, and the root is held meanwhile: nobody could confirm the release on trial or leave it.
        slots.refuse_during_trial(root, id)
        manifest = _check_release(root, id)
        engine, is_new = rebuild.built(root, id, rebuild.label(manifest, asked.model), asked.threads)
    facts = {"id": id, "engine": engine.folder.name, "built": is_new, "sha256": engine.sha256}
    return Answer({**facts, "bytes": engine.path.stat().st_size})


def check_parity(asked: argparse.Namespace) -> Answer:
    """Judge the engine's answers to the golden samples, and which layers really run in int8."""
    root, id = asked.root, asked.id
    with slots.exclusive(root):
        slots.recover(root, Moment.now())
        publish.require_space(root, 0)
        engine = engines.find(root, id, asked.engine)
        found = engines.judge(root, id, engine)
    verdicts = [Verdict(found[part]["verdict"]) for part in ("parity", "precision")]
    return Answer({"id": id, "engine": engine.folder.name, **found}, EXIT_CODES[worst(verdicts)])


def measure(asked: argparse.Namespace) -> Answer:
    """Latency in fresh processes, judged by the rules that the bundle brings."""
    root, id = asked.root, asked.id
    with slots.exclusive(root):
        slots.recover(root, Moment.now())
        slots.refuse_during_trial(root, id)
        manifest, engine = _check_release(root, id), engines.find(root, id, asked.engine)
        publish.require_space(root, 0)
        found, verdict = engines.measure(root, id, engine, manifest.gate, processes=asked.processes, queries=asked.queries)
    return Answer({"id": id, "engine": engine.folder.name, **found}, EXIT_CODES[verdict])


def activate(asked: argparse.Namespace) -> Answer:
    """Make a release that passed its gates here the current one, with the engine that passed them."""
    root, id = asked.root, asked.id
    with slots.exclusive(root):
        slots.recover(root, Moment.now())
        manifest, before = _check_release(root, id), slots.current(root)
        if before == id and engines.is_running(root, id, asked.engine):
            return Answer({"id": id, "activated": False, "trial": slots.status(root, Moment.now())["trial"]})
        _refuse_other(root, manifest, asked.allow_downgrade)
        slots.refuse_during_trial(root, id)
        publish.require_space(root, 0)
        engine = engines.checked(root, id, asked.engine)
        found = engines.proven(root, id, engine)
        verdicts = engines.verdicts(id, found, manifest)
        if (verdict := worst(verdicts.values())) is not Verdict.PASS:
            why = {part: found[part] for part, said in verdicts.items() if said is not Verdict.PASS}
            return Answer({"id": id, "activated": False, "current": before, "refused": why}, EXIT_CODES[verdict])
        engines.run_with(root, id, engine, verdicts, is_trial=asked.confirm_within is not None)
        note = f"downgrade to release {manifest.release} ({id})" if _is_downgrade(root, manifest) else ""
        slots.activate(root, id, within_s=asked.confirm_within, now=Moment.now(), note=note)
    gate = "kept" if manifest.gate else "the bundle has no latency budget, so none was checked"
    facts = {"id": id, "engine": engine.folder.name, "activated": True, "previous": slots.previous(root)}
    return Answer({**facts, "latency": gate, "confirm_within_s": asked.confirm_within})


def rollback(asked: argparse.Namespace) -> Answer:
    """Go back to the previous release."""
    with slots.exclusive(asked.root):
        slots.recover(asked.root, Moment.now())
        left = slots.current(asked.root)
        return Answer({"current": slots.rollback(asked.root), "left": left})


def confirm(asked: argparse.Namespace) -> Answer:
    """Keep the release that is on trial; exit code 1 when none is, such as when its time was over."""
    with slots.exclusive(asked.root):
        recovered = slots.recover(asked.root, Moment.now())
        trial = slots.read_state(asked.root).trial
        if trial is not None and asked.id not in (None, trial.id):
            raise UsageError(f"{printable(asked.id)} is not on trial", why=f"the release {trial.id} is")
        confirmed = slots.confirm(asked.root)
        facts = {"confirmed": confirmed, "current": slots.current(asked.root), "recovered": recovered}
    return Answer(facts, 0 if confirmed else 1)


def status(asked: argparse.Namespace) -> Answer:
    """What is current, previous, installed and on trial."""
    root = asked.root
    found = slots.status(root, Moment.now())
    ids = [id for id in (found["current"], found["previous"]) if id is not None]
    numbers = {id: _manifest(root, id).release for id in ids}
    told = {"release_numbers": numbers, "engines": {id: rebuild.preflight(root, id) for id in ids}}
    return Answer({**found, **told, "lease": lease.holder(root, Moment.now())})


def recover(asked: argparse.Namespace) -> Answer:
    """Finish or undo what was interrupted; go back where a trial was not confirmed in time; --rebuild: build stale engines."""
    root = asked.root
    with slots.exclusive(root):
        done, ids = slots.recover(root, Moment.now()), [slots.current(root), slots.previous(root)]
        answer: dict[str, Any] = {"done": done, "current": ids[0]}
        if not asked.rebuild:
            return Answer(answer)
        stale = rebuild.stale(root, [id for id in ids if id is not None])
        rebuilt = {id: rebuild.rebuilt(root, _check_release(root, id)) for id in stale}
    told = [{"id": id, "why": stale[id], **facts} for id, (facts, _) in rebuilt.items()]
    return Answer({**answer, "rebuilt": told}, EXIT_CODES[worst(verdict for _, verdict in rebuilt.values() if verdict)])


def collect_garbage(asked: argparse.Namespace) -> Answer:
    """Remove releases that are neither current nor previous nor in use."""
    with slots.exclusive(asked.root):
        slots.recover(asked.root, Moment.now())
        return Answer({"removed": slots.collect_garbage(asked.root), "incoming": incoming.clear_all(asked.root)})


def infer_file(asked: argparse.Namespace) -> Answer:
    """The current release's answer to one file."""
    opened = infer.open_current(asked.root)
    try:
        found = infer.answer(opened, infer.read_input(asked.file, opened.engine))
    finally:
        opened.close()
    classes = opened.engine.classes
    if not isinstance(found, np.ndarray) or found.ndim > 2 or found.shape[-1:] != (len(classes),):
        return Answer({"release": opened.id, "answer": found})
    rows = np.atleast_2d(found)
    best = np.argsort(-rows, axis=1, kind="stable")[:, :_TOP]
    top = [
        [{"class": classes[i], "value": row[i]} for i in order] for row, order in zip(rows.tolist(), best.tolist(), strict=True)
    ]
    return Answer({"release": opened.id, "top": top})


def _fill(folder: Path, opened: bundle.Bundle) -> None:
    """A release's files by their names; every blob is hashed while it is written."""
    for name, blob in opened.manifest.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in bundle.pieces(opened, blob):
                file.write(piece)
    (folder / bundle.MANIFEST).write_bytes(opened.content)
    if opened.signature is not None:
        (folder / bundle.SIGNATURE).write_bytes(opened.signature)


def _manifest(root: Path, id: str) -> Manifest:
    """The manifest of an installed release, with the highest number it came under; the identity does not depend on that."""
    path = slots.release_folder(root, id) / bundle.MANIFEST
    if not path.is_file():
        raise UsageError(f"{printable(root)} has no release {id}", fix="install it first")
    manifest = bundle.parse(path.read_bytes(), printable(path))
    if manifest.id != id:
        raise UsageError(f"{printable(path)} is damaged", why="it is the manifest of another release")
    return replace(manifest, release=slots.number(root, id, manifest.release))


def _check_release(root: Path, id: str) -> Manifest:
    """The manifest of an installed release whose files are all as they were installed."""
    manifest, folder = _manifest(root, id), slots.release_folder(root, id)
    problems = [
        name
        for name, blob in manifest.files.items()
        if not (folder / name).is_file() or artifact.digest_file(folder / name) != blob.sha256
    ]
    if problems:
        fix = "go back to another release, collect garbage, and install it again"
        raise UsageError(f"the release {id} is damaged", problems=problems[:20], fix=fix)
    return manifest


def _refuse_other(root: Path, manifest: Manifest, allow_downgrade: bool) -> None:
    """Raise UsageError for another network than runs here, or an older release of it that nobody asked for."""
    running = slots.current(root)
    if running is None:
        return
    name = _manifest(root, running).name
    if name != manifest.name:
        raise UsageError(
            f"{printable(root)} is of the network {name}", why=f"the bundle is of {manifest.name}", fix="another --root"
        )
    if _is_downgrade(root, manifest) and not allow_downgrade:
        number = _manifest(root, running).release
        why = f"it is release {manifest.release}, and release {number} runs here"
        raise UsageError("the bundle is older than what runs here", why=why, fix="--allow-downgrade, when that is meant")


def _is_downgrade(root: Path, manifest: Manifest) -> bool:
    running = slots.current(root)
    return running is not None and manifest.release < _manifest(root, running).release


def _signers(asked: argparse.Namespace) -> Path | None:
    """Whose signatures are taken: the file that was named, or the one that lies in the root; None: nobody is asked for."""
    named: Path | None = asked.signers
    root: Path | None = getattr(asked, "root", None)
    # A link that leads nowhere (yet) is no permission to take anything: who laid it there wanted somebody to be asked.
    if named is None and root is not None and os.path.lexists(root / SIGNERS):
        return root / SIGNERS
    return named


def _seconds(text: str) -> float:
    """A span of time for argparse: finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands; `does` of what it has parsed is the function that gives the answer."""
    found = argparse.ArgumentParser(prog="device.pyz", description="The device half of deploykit; answers are JSON.")
    verbs = found.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, does: Any, *, id: bool = False, root: bool = True) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=does.__doc__.partition("\n")[0])
        command.set_defaults(does=does)
        if id:
            command.add_argument("id", help="identity of the release")
        if root:
            command.add_argument("--root", type=Path, required=True, help="folder of one network's releases")
        return command

    verb("probe", probe, root=False)
    for name, does in (("verify", check), ("install", install)):
        command = verb(name, does, root=name == "install")
        command.add_argument("bundle", type=Path)
        command.add_argument(
            "--signers", type=Path, help=f"allowed signers; by default {SIGNERS} in the root, where there is one"
        )
        if name == "install":
            command.add_argument("--allow-downgrade", action="store_true", help="take a lower release number than runs here")
    downgrade = "take a lower release number than runs here"
    for name, does in (("vouch", vouch), ("missing", missing), ("receive", receive), ("install-received", install_received)):
        command = verb(name, does, id=True)
        command.add_argument("--allow-downgrade", action="store_true", help=downgrade)
        command.set_defaults(signers=None)
    command = verb("lease", hold_lease)
    command.add_argument("--owner", required=True, help="who deploys, as others are told")
    command.add_argument("--seconds", type=_seconds, default=lease.SECONDS, help="longest time without a sign of life")
    verb("watch", watch).add_argument("--rebuild", action="store_true", help=f"after every start, {_REBUILD}")
    command = verb("build", build, id=True)
    command.add_argument("--model", help="which graph, where several can be built here")
    command.add_argument("--threads", type=_natural, default=0, help="threads of a CPU engine; 0 takes all cores")
    verb("parity", check_parity, id=True).add_argument("--engine", help="which engine, where there are several")
    command = verb("benchmark", measure, id=True)
    command.add_argument("--engine", help="which engine, where there are several")
    for name, usual in rebuild.MEASURED.items():
        command.add_argument(f"--{name}", type=_natural, default=usual)
    command = verb("activate", activate, id=True)
    command.add_argument("--engine", help="which engine, where there are several")
    command.add_argument("--confirm-within", type=_seconds, metavar="SECONDS", help="go back unless it is confirmed in time")
    command.add_argument("--allow-downgrade", action="store_true", help="take a lower release number than runs here")
    verb("confirm", confirm).add_argument("id", nargs="?", help="identity of the release that is to be on trial")
    for name, does in (("rollback", rollback), ("status", status)):
        verb(name, does)
    verb("recover", recover).add_argument("--rebuild", action="store_true", help=_REBUILD)
    verb("collect-garbage", collect_garbage)
    verb("infer", infer_file).add_argument("file", type=Path, help="a .npy array, or a picture where Pillow is installed")
    return found


def _natural(text: str) -> int:
    """A whole number for argparse: 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)
