"""Deploying over real sshd on loopback: a fleet in network namespaces, canaries, two at once, cut, lossy and slow lines.

usage: python benchmarks/deploy_shows.py [--devices 4] [--only NAME ...] [--output DIR]

Wants root, sshd, ip, tc and nft. Every device is an sshd in a network namespace of its own, reached through a veth pair. What the
kernel lacks (tc netem) is said and not replaced: loss comes from nft, the rate from tbf, the cut from taking the link down.
Counts and bytes only; nothing here is a speed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from _results import write

from deploykit import artifact, bundle, deploy, fleet, slots
from deploykit.bundle import pack
from deploykit.deploy import Deployed, How
from deploykit.device import Device
from deploykit.errors import DeploykitError, LineError
from deploykit.remote import Done, connect
from deploykit.remote.process import Local

TESTS = Path(__file__).parents[1] / "tests"
LOSS_PER_MILLE, RATE = 30, "1mbit"
BIG_BYTES = 2_000_000
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Place:
    """A device: its sshd, its namespace, its end of the line here, and the root of its releases."""

    name: str
    namespace: str
    link: str
    server: Any
    root: Path

    @property
    def how(self) -> How:
        return How(root=str(self.root), python=sys.executable)

    @property
    def member(self) -> fleet.Member:
        return fleet.Member(self.name, "all", self.server.address, self.how, self.server.host_key)

    def connect(self) -> Any:
        return connect(
            self.server.address, ssh_config=self.server.config.parents[1] / "dkd0" / "ssh_config", host_key=self.server.host_key
        )


@contextmanager
def places(count: int, folder: Path) -> Iterator[list[Place]]:
    sshd = importlib.import_module("sshd").sshd
    with ExitStack() as stack:
        found: list[Place] = []
        for number in range(count):
            name, link, here, there = f"dkd{number}", f"dkl{number}", f"10.91.{number}.1", f"10.91.{number}.2"
            stack.callback(leave, name, link)  # before there is anything to take away: a signal may come at any time
            ip("netns", "add", name)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("addr", "add", f"{here}/24", "dev", link)
            ip("link", "set", link, "up")
            ip("-n", name, "addr", "add", f"{there}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            server = stack.enter_context(sshd(folder / name, within=("ip", "netns", "exec", name), address=there))
            if found:  # one key for the whole fleet
                (folder / name / "authorized_keys").write_text((folder / "dkd0" / "authorized_keys").read_text())
            found.append(Place(f"device-{number}", name, link, server, folder / name / "root"))
        yield found


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ip {' '.join(words)}: {done.stderr.strip()}; what a killed run has left goes by: ip netns del, ip link del")


def leave(name: str, link: str) -> None:
    """End what runs in a namespace, such as a device half that a session of sshd has started, and take both away."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for words in (["netns", "del", name], ["link", "del", link]):
        subprocess.run(["ip", *words], capture_output=True)


def stop(number: int, _frame: object) -> NoReturn:
    """A signal that ends this unwinds like an exception, so that namespaces, links and rules are taken away; once is enough."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def bundles(folder: Path) -> dict[str, Path]:
    """Two releases, one that no gate lets through, and a large one."""
    tests = importlib.import_module("test_agent")
    no_gate, packed, tiny_run = tests.NO_GATE, tests.packed, tests.tiny_run
    run = tiny_run(folder / "bad", op="Add", recipe=no_gate)
    tests.expect_wrong_answers(run)
    (folder / "big.cache").write_bytes(os.urandom(BIG_BYTES))
    big = tiny_run(folder / "big", op="Sub", recipe=no_gate)
    return {
        "one": packed(folder, release=1),
        "two": packed(folder, release=2, op="Mul"),
        "bad": pack.pack(run, folder / "bad.bundle", release=3).path,
        "big": pack.pack(big, folder / "big.bundle", release=4, timing_caches=[folder / "big.cache"]).path,
    }


def told(done: Deployed) -> dict[str, Any]:
    keys = ("code", "stage", "activated", "sent_bytes", "total_bytes", "sent_blobs", "blobs", "commands", "attempts")
    return {key: getattr(done, key) for key in keys}


def to(place: Place, path: Path, owner: str = "show", **more: Any) -> Deployed:
    return deploy.deploy(path, place.connect, place.how, owner=owner, **more)


def as_fleet(found: Sequence[Place], packed: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A roll-out, the same again, a bad bundle that its canary stops, and back."""
    planned = fleet.Fleet(tuple(place.member for place in found), {"all": 0.25}, 2, 1, found[0].server.config)
    one = fleet.roll_out(packed["one"], planned, folder / "one", owner="show")
    again = fleet.roll_out(packed["one"], planned, folder / "again", owner="show")
    two = fleet.roll_out(packed["two"], planned, folder / "two", owner="show")
    bad = fleet.roll_out(packed["bad"], planned, folder / "bad-rollout", owner="show")
    ids = [slots.current(place.root) for place in found]
    assert ids == [two.id] * len(found), (one.facts, two.facts, bad.facts)
    back = fleet.ask_each(planned, roll_back)
    assert [slots.current(place.root) for place in found] == [one.id] * len(found), "a device did not go back"
    return {
        "roll-out": {"counts": one.counts, "code": one.code, "commands": [row.facts["commands"] for row in one.rows.values()]},
        "again": {"counts": again.counts, "bytes": [row.facts["sent_bytes"] for row in again.rows.values()]},
        "another": {"counts": two.counts, "bytes": [row.facts["sent_bytes"] for row in two.rows.values()]},
        "bad bundle": {"counts": bad.counts, "code": bad.code, "why": bad.why_stopped},
        "rollback": [said["exit_code"] for said in back.values()],
    }


def roll_back(device: Device) -> dict[str, Any]:
    with device.lease("show"):
        return device.ask("rollback")


def at_once(found: Sequence[Place], packed: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Two deployers of two bundles on one device at the same moment."""
    place = found[0]
    ended: dict[str, Any] = {}
    to(place, packed["one"])

    def one(owner: str, path: Path) -> None:
        try:
            ended[owner] = told(to(place, path, owner))
        except DeploykitError as error:
            ended[owner] = str(error).replace(str(place.how.root), "ROOT")

    threads = [
        threading.Thread(target=one, args=words, daemon=True) for words in (("alice", packed["two"]), ("bob", packed["big"]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [said for said in ended.values() if isinstance(said, str)]
    assert len(refused) == 1, ended
    assert "is leased" in refused[0], ended
    return {"ended": ended}


def slow_and_lossy(found: Sequence[Place], packed: dict[str, Path], folder: Path) -> dict[str, Any]:
    """1 Mbit/s by tbf on one line, 3 % loss by nft at both ends of another."""
    slow, lossy = replace(found[0], root=folder / "slow"), replace(found[1], root=folder / "lossy")
    subprocess.run(
        ["tc", "qdisc", "add", "dev", slow.link, "root", "tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms"], check=True
    )
    rules = f"""table inet dkloss {{ chain in {{ type filter hook input priority 0;
      iifname "LINK" numgen random mod 1000 < {LOSS_PER_MILLE} counter drop; }}; }};"""
    nft = ["nft", "-f", "-"]
    inside = ["ip", "netns", "exec", lossy.namespace]
    try:
        subprocess.run([*inside, *nft], input=rules.replace("LINK", "eth0").encode(), check=True)
        subprocess.run(nft, input=rules.replace("LINK", lossy.link).encode(), check=True)
        done = {"1 Mbit/s": told(to(slow, packed["big"])), "3 % loss": told(to(lossy, packed["big"]))}
        listed = [
            subprocess.run([*words, "nft", "list", "ruleset"], capture_output=True, text=True).stdout for words in ([], inside)
        ]
        dropped = [int(text.partition("packets ")[2].split()[0]) for text in listed]
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", slow.link, "root"])
        subprocess.run(["nft", "delete", "table", "inet", "dkloss"], capture_output=True)
    assert all(place_ok(place, packed["big"]) for place in (slow, lossy))
    netem = subprocess.run(["tc", "qdisc", "add", "dev", found[0].link, "root", "netem", "loss", "3%"], capture_output=True)
    subprocess.run(["tc", "qdisc", "del", "dev", found[0].link, "root"], capture_output=True)
    return {**done, "dropped packets": dropped, "netem": "there" if netem.returncode == 0 else "not in this kernel"}


def cable_pulled(found: Sequence[Place], packed: dict[str, Path], folder: Path) -> dict[str, Any]:
    """The link goes down in the middle of the transfer, at 1 Mbit/s, and comes back 25 s later."""
    place = replace(found[0], root=folder / "pulled")
    subprocess.run(
        ["tc", "qdisc", "add", "dev", place.link, "root", "tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms"], check=True
    )
    pulled = threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        if what == "transfer" and done > total * 0.6 and not pulled.is_set():
            pulled.set()
            ip("link", "set", place.link, "down")
            back = threading.Timer(25, ip, ["link", "set", place.link, "up"])
            back.daemon = True
            back.start()

    try:
        done = to(place, packed["big"], progress=progress)
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", place.link, "root"], capture_output=True)
    assert pulled.is_set()
    assert done.attempts > 1
    assert place_ok(place, packed["big"])
    return {**told(done), "sent again": round(done.sent_bytes / done.total_bytes, 3)}


class Cut(Local):
    """A line that is cut at command `at`: before it ran there, or after."""

    count = 0

    def __init__(self, at: int, when: str) -> None:
        super().__init__()
        self.at, self.when = at, when

    def run(self, words: Sequence[str], **more: Any) -> Done:
        Cut.count += 1
        if Cut.count != self.at:
            return super().run(words, **more)
        if self.when == "after":
            super().run(words, **more)
        raise LineError("cut")


def cut_everywhere(found: Sequence[Place], packed: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A deployment over a running release, cut once at each command, before and after it ran there."""
    outcomes: list[str] = []
    for when in ("before", "after"):
        at = 1
        while True:
            root = folder / f"cut-{when}-{at}"
            how = How(root=str(root), python=sys.executable)
            deploy.deploy(packed["one"], Local, how, owner="show")
            Cut.count = 0
            done = deploy.deploy(packed["two"], lambda: Cut(at, when), how, owner="show", pause=lambda seconds: None)  # noqa: B023
            if done.attempts == 1:
                break
            outcomes.append("new" if done.code == 0 and slots.current(root) == done.id else "other")
            at += 1
    assert set(outcomes) == {"new"}, outcomes
    return {"cuts": len(outcomes), "ended with the new release": outcomes.count("new")}


def place_ok(place: Place, path: Path) -> bool:
    with bundle.opened(path) as opened:
        manifest = opened.manifest
    folder = place.root / "releases" / manifest.id
    right = all(artifact.digest_file(folder / name) == blob.sha256 for name, blob in manifest.files.items())
    return right and slots.current(place.root) == manifest.id


SHOWS: dict[str, Callable[[Sequence[Place], dict[str, Path], Path], dict[str, Any]]] = {
    "fleet": as_fleet,
    "two-at-once": at_once,
    "slow-and-lossy": slow_and_lossy,
    "cable-pulled": cable_pulled,
    "cut-everywhere": cut_everywhere,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=SHOWS, default=list(SHOWS))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    for each in ENDING:
        signal.signal(each, stop)
    # What a signal stopped may still be writing while its folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        packed = bundles(Path(scratch, "bundles"))
        with places(asked.devices, Path(scratch)) as found:
            for name in asked.only:
                said = SHOWS[name](found, packed, Path(scratch))
                print(name, said, flush=True)
                write(f"deploy-{name}", {"devices": asked.devices, **said}, asked.output)


if __name__ == "__main__":
    main()
