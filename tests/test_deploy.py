"""Deploying: what moves, what is checked before it runs, what a cut line leaves, who may deploy at the same time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sshd import Sshd, sshd
from test_agent import NO_GATE, packed
from test_bundle import allowed, expect_wrong_answers, ssh_key, tiny_run

from deploykit import agent, bundle, deploy, lease, slots, watchdog
from deploykit.bundle import incoming, pack
from deploykit.deploy import How
from deploykit.device import Device, trusted
from deploykit.errors import DeploykitError, LineError, StageError, UsageError
from deploykit.remote import Done, connect
from deploykit.remote.process import Local
from deploykit.slots import Moment


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    return ssh_key(tmp_path_factory.mktemp("keys") / "builder")


@pytest.fixture(scope="module")
def bundles(key, tmp_path_factory) -> dict[str, Path]:
    """Release 1 adds, release 2 multiplies: two networks of one shape; both are signed."""
    folder = tmp_path_factory.mktemp("bundles")
    return {"adds": packed(folder, release=1, key=key), "multiplies": packed(folder, release=2, op="Mul", key=key)}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "device"


@pytest.fixture
def how(root) -> How:
    return How(root=str(root), python=sys.executable)


def to_local(path: Path, how: How, connection: Callable[[], Local] = Local, **more: Any) -> deploy.Deployed:
    return deploy.deploy(path, connection, how, owner="me", pause=lambda seconds: None, **more)


def manifest_of(path: Path) -> bundle.Manifest:
    with bundle.opened(path) as opened:
        return opened.manifest


def written(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name[0] != "."}


class TestDeployingOverSsh:
    def test_from_nothing_again_two_at_once_another_and_back(self, bundles, server, root, how, deploykit):
        def to_device(path: Path) -> deploy.Deployed:
            return deploy.deploy(path, lambda: connect(server.address, ssh_config=server.config), how, owner="me")

        words = ["--root", str(root), "--python", sys.executable, "--ssh-config", str(server.config), "--json"]
        first = to_device(bundles["adds"])
        assert (first.code, first.activated, first.sent_blobs) == (0, True, first.blobs)
        assert first.sent_bytes == first.total_bytes
        assert first.commands <= 12

        before = written(root)
        again = to_device(bundles["adds"])
        assert (again.code, again.activated, again.sent_bytes, again.sent_blobs) == (0, False, 0, 0)
        assert written(root) == before
        np.save(root.parent / "pixels.npy", np.ones((1, 2, 2), np.float32))
        there = Device(Local(), str(root), python=sys.executable)
        assert np.all(np.array(there.ask("infer", str(root.parent / "pixels.npy"))["answer"]) == 2.0)

        with there.lease("alice@desk") as held:
            with pytest.raises(DeploykitError, match="alice@desk has been deploying there for"):
                to_device(bundles["multiplies"])
            refused = deploykit("rollback", server.address, *words)
            assert (refused.code, "alice@desk has been deploying there for" in refused.err) == (1, True)
            held.require()
        other = to_device(bundles["multiplies"])
        known = {blob.sha256 for blob in manifest_of(bundles["adds"]).files.values()}
        new = {blob.sha256: blob.size for blob in manifest_of(bundles["multiplies"]).files.values() if blob.sha256 not in known}
        assert other.answers["bootstrap"]["by"] == "the installed device half"
        assert (other.sent_blobs, other.sent_bytes) == (len(new), sum(new.values()))
        assert other.sent_bytes < other.total_bytes / 10

        said = json.loads(deploykit("status", server.address, *words).out)
        assert (said["current"], said["previous"], said["lease"]) == (other.id, first.id, None)
        assert json.loads(deploykit("rollback", server.address, *words).out)["current"] == first.id
        assert slots.current(root) == first.id


class TestATrial:
    """What a roll-out waits for after it has put a release on trial."""

    @pytest.fixture
    def on_trial(self, bundles, how) -> deploy.Deployed:
        to_local(bundles["adds"], how)
        done = to_local(bundles["multiplies"], replace(how, confirm_within_s=300.0))
        assert done.code == 0
        return done

    def wait(self, done: deploy.Deployed, how: How, *, meanwhile: Callable[[], None], connection: Any = Local) -> list[float]:
        """The pauses that were made; `meanwhile` happens in the first."""
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            if not pauses:
                meanwhile()
            pauses.append(seconds)
            assert len(pauses) < 5

        deploy.await_confirmation(connection, done, how, pause=pause)
        return pauses

    def test_is_over_when_the_application_confirms(self, on_trial, how, root):
        there = Device(Local(), str(root), python=sys.executable)

        assert self.wait(on_trial, how, meanwhile=lambda: there.ask("confirm")) == [10.0]

    def test_has_failed_when_the_device_went_back(self, on_trial, how, root, bundles):
        there = Device(Local(), str(root), python=sys.executable)

        with pytest.raises(StageError, match=rf"not confirmed within 300 s(.|\n)*{manifest_of(bundles['adds']).id} runs there"):
            self.wait(on_trial, how, meanwhile=lambda: there.ask("rollback"))

    @pytest.mark.parametrize("error", [LineError("no route to host"), UsageError("could not resolve hostname"),
                                       DeploykitError("gave no answer that can be read")], ids=str)  # fmt: skip
    def test_a_device_that_cannot_be_reached_is_asked_again(self, on_trial, how, root, error):
        there, cuts = Device(Local(), str(root), python=sys.executable), iter([True, False])

        def connection() -> Local:
            if next(cuts):
                raise error
            return Local()

        assert self.wait(on_trial, how, meanwhile=lambda: there.ask("confirm"), connection=connection) == [10.0]

    def test_whose_end_nobody_can_see_is_not_called_unconfirmed(self, on_trial, how, monkeypatch):
        monkeypatch.setattr(deploy, "_GRACE_S", -300.0)

        def away() -> Local:
            raise LineError("no route to host")

        with pytest.raises(StageError, match=r"confirmed is not known(.|\n)*no route to host"):
            self.wait(on_trial, how, meanwhile=lambda: None, connection=away)

    def test_is_left_alone_by_the_same_command_which_then_goes_on_waiting(self, on_trial, bundles, how, monkeypatch):
        monkeypatch.setattr(deploy._Steps, "_stages", lambda self: pytest.fail("the device was asked to prove it again"))

        again = to_local(bundles["multiplies"], replace(how, confirm_within_s=300.0))

        assert (again.code, again.activated) == (0, False)
        assert again.trial_s is not None
        assert 0 < again.trial_s <= 300.0

    def test_is_told_by_a_deployment_that_asked_for_none(self, on_trial, bundles, how):
        again = to_local(bundles["multiplies"], how)

        assert (again.activated, again.trial_s is None) == (False, False)
        assert to_local(bundles["adds"], replace(how, root=f"{how.root}-other")).trial_s is None

    def test_that_nobody_ends_is_a_failure_when_its_time_is_over(self, on_trial, how, monkeypatch):
        monkeypatch.setattr(deploy, "_GRACE_S", -300.0)

        with pytest.raises(StageError, match=r"not confirmed within 300 s(.|\n)*nothing there looks after it"):
            self.wait(on_trial, how, meanwhile=lambda: None)

    def test_is_confirmed_for_a_fleet_by_one_command_and_once(self, on_trial, root, deploykit, tmp_path):
        (tmp_path / "fleet.toml").write_text(
            f"""
            root = "{root}"
            python = "{sys.executable}"
            [devices.here]
            address = "local"
            """
        )
        words = ["device", "confirm", "--fleet", str(tmp_path / "fleet.toml")]

        other = deploykit(*words, "f" * 64)
        first, second = deploykit(*words, on_trial.id), deploykit(*words)

        assert (other.code, "is not on trial" in other.out) == (2, True)
        assert deploykit(*words, "ssh://jetson").code == 2
        assert (first.code, first.out.strip()) == (0, f"here: keeps {on_trial.id[:12]}")
        assert (second.code, second.out.strip()) == (1, "here: nothing is on trial")

    def test_of_a_first_release_that_is_not_confirmed_says_that_it_still_runs(self, bundles, how):
        done = to_local(bundles["adds"], replace(how, confirm_within_s=0.0))

        with pytest.raises(StageError, match="there is no release to go back to"):
            self.wait(done, how, meanwhile=lambda: None)


class TestTrust:
    """Nothing of ours runs on a device before the device's own tools, or what is installed there, have checked it."""

    @pytest.fixture
    def trusting(self, root, key) -> Path:
        root.mkdir()
        (root / "allowed_signers").write_bytes(allowed(key).read_bytes())
        return root

    def refused(self, path: Path, how: How, root: Path) -> str:
        """What the device says, whose Python must not have been started."""
        never = root.parent / "python"
        never.write_text(f"#!/bin/sh\ntouch {root.parent}/ran\n")
        never.chmod(0o755)
        with pytest.raises(DeploykitError) as error:
            to_local(path, How(root=how.root, python=str(never)))
        assert not (root.parent / "ran").exists()
        return str(error.value)

    def test_an_unsigned_bundle_is_refused_by_the_devices_own_tools(self, trusting, how, tmp_path):
        assert "the bundle is not signed, and the device wants" in self.refused(packed(tmp_path, release=1), how, trusting)

    def test_a_list_of_signers_that_cannot_be_opened_lets_nobody_in(self, trusting, bundles, how):
        (trusting / "allowed_signers").unlink()
        (trusting / "allowed_signers").symlink_to("/nonexistent/signers")

        assert "not signed by an allowed signer" in self.refused(bundles["adds"], how, trusting)
        assert trusted(Local(), str(trusting.parent)) is None
        with pytest.raises(DeploykitError, match=r"cannot read .*allowed_signers on local"):
            trusted(Local(), str(trusting))

    def test_a_bundle_that_somebody_else_signed_is_refused(self, trusting, how, tmp_path):
        path = packed(tmp_path, release=1, key=ssh_key(tmp_path / "stranger"))

        said = self.refused(path, how, trusting)

        assert "not signed by an allowed signer" in said
        assert "deploykit device trust local --signers FILE" in said

    def test_a_signature_of_another_manifest_is_refused(self, trusting, bundles, how):
        with bundle.opened(bundles["adds"]) as one, bundle.opened(bundles["multiplies"]) as other:
            half = b"".join(bundle.pieces(one, one.manifest.portable["device.pyz"]))
            device = Device(Local(), str(trusting), python="/nonexistent")

            with pytest.raises(DeploykitError, match="signature of the bundle is wrong"):
                device.bootstrap(one.manifest.id, one.content, other.signature, half, hashlib.sha256(half).hexdigest())

    def test_a_device_half_that_was_changed_is_refused(self, trusting, bundles, how):
        with bundle.opened(bundles["adds"]) as opened:
            sha = opened.manifest.portable["device.pyz"].sha256
            device = Device(Local(), str(trusting), python="/nonexistent")

            with pytest.raises(DeploykitError, match=r"device\.pyz is not what was sent"):
                device.bootstrap(opened.manifest.id, opened.content, opened.signature, b"import os", sha)
            other = hashlib.sha256(b"import os").hexdigest()
            with pytest.raises(DeploykitError, match=r"the manifest does not name this device\.pyz"):
                device.bootstrap(opened.manifest.id, opened.content, opened.signature, b"import os", other)

    def test_an_installed_device_half_verifies_its_successor(self, trusting, bundles, how, tmp_path):
        first = to_local(bundles["adds"], how)
        assert first.answers["bootstrap"]["by"] == "ssh-keygen and sha256sum"

        with pytest.raises(UsageError, match="is not signed by anybody"):
            to_local(packed(tmp_path, release=3, op="Sub", key=ssh_key(tmp_path / "stranger")), how)

        assert slots.current(trusting) == first.id

    def test_a_root_by_a_relative_path_is_the_same_one_for_every_release(self, bundles, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        how = How(root=root.name, python=sys.executable)
        to_local(bundles["adds"], how)

        with bundle.opened(bundles["multiplies"]) as opened:
            half = b"".join(bundle.pieces(opened, opened.manifest.portable["device.pyz"]))
            sha = opened.manifest.portable["device.pyz"].sha256
            device = Device(Local(), root.name, python=sys.executable)
            said = device.bootstrap(opened.manifest.id, opened.content, opened.signature, half, sha)

        assert said["by"] == "the installed device half"

    def test_trust_shows_fingerprints_asks_and_puts_the_signers_there(self, root, key, deploykit):
        words = ["device", "trust", "local", "--root", str(root), "--signers", str(allowed(key))]

        said = deploykit(*words, "--yes").out

        assert "trusts nobody yet" in said
        assert "builder@example.org: SHA256:" in said
        assert (root / "allowed_signers").read_bytes() == allowed(key).read_bytes()
        assert "nothing was changed" in deploykit(*words).out


class Cut(Local):
    """A line that is cut once at each of the commands `at`: before its last byte goes over, or after it was done there."""

    def __init__(self, at: dict[str, str]) -> None:
        super().__init__()
        self.at = at

    def run(self, words: Sequence[str], *, stdin: bytes | Iterable[bytes] = b"", silence_s: float = 120.0) -> Done:
        verb = next((word for word in words if word in self.at), None)
        when = self.at.pop(verb) if verb else ""
        if when == "in the middle":
            content = b"".join([stdin] if isinstance(stdin, bytes) else stdin)
            super().run(words, stdin=content[: len(content) - 100], silence_s=silence_s)
        elif when == "after":
            super().run(words, stdin=stdin, silence_s=silence_s)
        if when:
            raise LineError(f"cut {when}: {verb}")
        return super().run(words, stdin=stdin, silence_s=silence_s)


class TestACutLine:
    def test_is_mended_by_trying_again_and_nothing_that_came_is_sent_twice(self, bundles, how, root):
        cuts = {"receive": "in the middle", "install-received": "after", "build": "before", "activate": "after"}

        done = to_local(bundles["adds"], how, lambda: Cut(cuts))

        assert (done.code, done.attempts, cuts) == (0, 5, {})
        assert slots.current(root) == done.id
        assert done.sent_bytes < 1.2 * done.total_bytes

    def test_for_good_is_an_error_after_a_few_pauses_and_what_ran_still_runs(self, bundles, how):
        pauses: list[float] = []

        class Dead(Local):
            def run(self, *words: Any, **more: Any) -> Done:
                raise LineError("no route")

        with pytest.raises(LineError, match="no route"):
            deploy.deploy(bundles["adds"], Dead, how, owner="me", pause=pauses.append)

        assert pauses == sorted(pauses)
        assert len(pauses) == 5


class TestGates:
    def test_a_release_that_fails_there_is_not_switched_to(self, how, root, tmp_path):
        run = tiny_run(tmp_path / "run", op="Add", recipe=NO_GATE)
        expect_wrong_answers(run)
        bad = pack.pack(run, tmp_path / "bad.bundle", release=9).path

        done = to_local(bad, how)

        assert (done.code, done.stage, done.activated) == (3, "parity", False)
        assert slots.current(root) is None


class TestTheLease:
    def test_a_second_deployer_is_told_who_holds_it_and_for_how_long(self, root):
        root.mkdir()
        then = Moment("boot", 100.0)

        with lease.held(root, "alice@desk (process 7)", then):
            assert lease.holder(root, Moment("boot", 134.0)) == lease.Holder("alice@desk (process 7)", 34.0)
            with pytest.raises(DeploykitError, match=r"alice@desk \(process 7\) has been deploying there for 34 s"):
                lease.held(root, "bob", Moment("boot", 134.0)).__enter__()
        assert lease.holder(root, then) is None

    def test_it_ends_when_no_sign_of_life_comes(self):
        read, write = os.pipe()
        os.write(write, b"\n")

        assert lease.wait_for_silence(read, 0.05) is False
        os.close(write)
        assert lease.wait_for_silence(read, 60) is True
        os.close(read)


class TestWhatComes:
    """Blobs on a device: `incoming`."""

    @pytest.fixture
    def coming(self, bundles, root) -> tuple[Path, bundle.Manifest, dict[str, bytes]]:
        """A root where the manifest is, and the bytes of each blob."""
        with bundle.opened(bundles["adds"]) as opened:
            place = incoming.folder(root, opened.manifest.id)
            place.mkdir(parents=True)
            (place / bundle.MANIFEST).write_bytes(opened.content)
            blobs = {blob.sha256: b"".join(bundle.pieces(opened, blob)) for blob in opened.manifest.files.values()}
            return root, opened.manifest, blobs

    def stream(self, blobs: dict[str, bytes], offset: int = 0) -> io.BytesIO:
        headers = {sha: json.dumps({"sha256": sha, "offset": offset}).encode() + b"\n" for sha in blobs}
        return io.BytesIO(b"".join(headers[sha] + content[offset:] for sha, content in blobs.items()))

    def test_nothing_is_lacking_when_all_has_come(self, coming):
        root, manifest, blobs = coming

        came, damaged = incoming.receive(root, manifest, self.stream(blobs))

        assert (set(came), damaged, incoming.lacking(root, manifest)) == (set(blobs), [], [])

    def test_a_blob_that_was_cut_goes_on_where_it_was_cut(self, coming):
        root, manifest, blobs = coming
        sha, content = max(blobs.items(), key=lambda item: len(item[1]))
        with pytest.raises(DeploykitError, match="the line was cut"):
            incoming.receive(root, manifest, io.BytesIO(self.stream({sha: content}).read()[:-1000]))

        (part,) = [blob.part for blob in incoming.lacking(root, manifest) if blob.sha256 == sha]

        assert part == len(content) - 1000
        assert incoming.receive(root, manifest, self.stream({sha: content}, offset=part)) == ([sha], [])

    def test_a_beginning_that_was_damaged_is_thrown_away_and_not_believed(self, coming):
        root, manifest, blobs = coming
        sha, content = max(blobs.items(), key=lambda item: len(item[1]))
        part = root / "incoming/blobs" / f"{sha}.part"
        part.parent.mkdir()
        part.write_bytes(b"x" + content[1:500])

        assert incoming.receive(root, manifest, self.stream({sha: content}, offset=500)) == ([], [sha])
        assert not part.exists()
        assert sha in {blob.sha256 for blob in incoming.lacking(root, manifest)}

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.integers(0, 9), max_size=6), st.integers(-40_000, 40_000), st.booleans())
    def test_blocks_that_are_the_same_in_what_runs_do_not_come_again(self, tmp_path_factory, changed, longer, is_damaged):
        """Whatever blocks changed and however the length did, the blob is right afterwards, or thrown away."""
        place = tmp_path_factory.mktemp("blocks")
        old = bytearray(np.random.default_rng(0).bytes(10 * incoming.BLOCK + 77))
        new = bytearray(old[: len(old) + min(longer, 0)] + bytes(max(longer, 0)))
        for block in changed:
            new[block * incoming.BLOCK : block * incoming.BLOCK + 3] = b"new"
        (place / "old").write_bytes(old)
        wanted = hashlib.sha256(new).hexdigest()
        manifest = bundle.Manifest("net", 1, (), {"graph": bundle.Blob(wanted, len(new))})
        files = type("Files", (), {"sizes": {f"blobs/{wanted}": len(new)}, "pieces": lambda self, name: iter([bytes(new)])})()
        opened = bundle.Bundle(place, manifest, b"", None, files)
        steps = deploy._Steps(opened, None, How(), deploy._Count(), lambda *words: None, None)
        blob = manifest.portable["graph"]
        keep = steps._same(blob, list(incoming.sums([bytes(old)])))
        stream = b"".join(steps._pieces([deploy._Sending(blob, 0, keep)]))
        if is_damaged:
            (place / "old").write_bytes(bytes(len(old)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(incoming, "_replaced", lambda root, manifest, blob: place / "old")
            came, damaged = incoming.receive(place, manifest, io.BytesIO(stream))

        assert (came, damaged) == (([], [wanted]) if is_damaged and keep else ([wanted], []))
        assert len(stream) < (len(set(changed)) + 4) * incoming.BLOCK + max(longer, 0) + 400

    def test_what_lies_there_damaged_is_lacking(self, coming):
        root, manifest, blobs = coming
        incoming.receive(root, manifest, self.stream(blobs))
        sha = next(iter(blobs))
        (root / "incoming/blobs" / sha).write_bytes(blobs[sha][:-1] + b"?")

        assert [blob.sha256 for blob in incoming.lacking(root, manifest)] == [sha]

    @pytest.mark.parametrize(
        "header", [b"{}\n", b"[]\n", b"no json\n", b'{"sha256": "../../x", "offset": 0}\n', b"\xff\n", b"x" * 1000]
    )
    def test_a_stream_that_is_none_writes_nothing(self, coming, header):
        root, manifest, _ = coming

        with pytest.raises(UsageError, match="is no blob of this bundle"):
            incoming.receive(root, manifest, io.BytesIO(header))
        assert list((root / "incoming/blobs").iterdir()) == []

    @pytest.mark.parametrize("offset", [-1, 1])
    def test_a_blob_cannot_go_on_after_what_is_not_there(self, coming, offset):
        root, manifest, blobs = coming
        sha = next(iter(blobs))

        with pytest.raises(UsageError, match="cannot go on"):
            incoming.receive(root, manifest, self.stream({sha: blobs[sha]}, offset=offset))

    def test_too_little_space_is_told_before_anything_is_sent(self, coming, monkeypatch, capsys):
        root, manifest, _ = coming
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))

        code = agent.run(["missing", manifest.id, "--root", str(root)])

        assert code == 1
        assert "there is too little space" in json.loads(capsys.readouterr().out)["error"]["what"]


class TestTheWatchdog:
    def test_is_a_timer_that_recovers(self, root, tmp_path, monkeypatch):
        if os.geteuid() != 0:
            pytest.skip("wants to be root")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
        (tmp_path / "systemctl").chmod(0o755)
        (tmp_path / "units").mkdir()

        for _ in range(2):
            found = watchdog.install(root / "50% $x", root / "device.pyz", running=tmp_path, system=tmp_path / "units")

        assert found.unit is not None
        service = (tmp_path / "units" / found.unit.replace(".timer", ".service")).read_text()
        assert f'"recover" "--root" "{root}/50%% $$x"' in service
        assert "Description=deploykit: go back from a release of " + f"{root}/50%% $x" in service
        assert "OnBootSec=" in (tmp_path / "units" / found.unit).read_text()
        assert (tmp_path / "asked").read_text().splitlines().count("daemon-reload") == 1

    def test_each_root_has_a_timer_of_its_own_with_a_name_that_systemd_takes(self, tmp_path, monkeypatch):
        if os.geteuid() != 0:
            pytest.skip("wants to be root")
        monkeypatch.setattr(watchdog, "_systemctl", lambda words: None)

        units = [
            watchdog.install(Path(root), Path(root, "device.pyz"), running=tmp_path, system=tmp_path).unit
            for root in ("/opt/a-b", "/opt/a/b", "/opt/ä b")
        ]

        assert units == [r"deploykit-opt-a\x2db.timer", "deploykit-opt-a-b.timer", r"deploykit-opt-\xc3\xa4\x20b.timer"]

    def test_what_builds_stale_engines_again_is_another_one_that_runs_once_after_every_start(self, tmp_path, monkeypatch):
        if os.geteuid() != 0:
            pytest.skip("wants to be root")
        monkeypatch.setattr(watchdog, "_systemctl", lambda words: None)

        found = watchdog.install(Path("/opt/a b"), Path("/opt/device.pyz"), rebuild=True, running=tmp_path, system=tmp_path)

        assert (found.unit, found.rebuild_unit) == (r"deploykit-opt-a\x20b.timer", r"deploykit_rebuild-opt-a\x20b.timer")
        assert found.rebuild_command is not None
        assert found.rebuild_command.endswith('"recover" "--rebuild" "--root" "/opt/a b"')
        service = (tmp_path / r"deploykit_rebuild-opt-a\x20b.service").read_text()
        assert f"ExecStart={found.rebuild_command}\n" in service
        assert "OnUnitActiveSec" not in (tmp_path / found.rebuild_unit).read_text()
        assert watchdog.install(Path("/opt/a b"), Path("/opt/device.pyz"), running=tmp_path, system=tmp_path).rebuild_unit is None
        assert (tmp_path / found.rebuild_unit).is_file()

    def test_without_systemd_it_says_what_to_run_instead(self, root, tmp_path):
        found = watchdog.install(root, root / "device.pyz", running=tmp_path / "nothing")

        assert (found.unit, found.why_not) == (None, "systemd does not run here")
        assert "recover" in found.command
        assert found.rebuild_command is None

    def test_deploying_can_ask_for_the_one_that_builds_without_a_trial(self, bundles, how):
        done = to_local(bundles["adds"], replace(how, rebuild=True))

        assert done.activated
        assert "--rebuild" in done.answers["watch"]["rebuild_command"]


class TestWhatADeviceSays:
    @pytest.mark.parametrize("said", ["", "no json", "[]", "{}", '{"exit_code": "0"}', "[" * 100_000, '{"exit_code": 77}'])
    def test_that_is_no_answer_is_an_error(self, said, root, tmp_path):
        class Strange(Local):
            def run(self, *words: Any, **more: Any) -> Done:
                return Done(0, said.encode(), b"\x1b[31mred")

        with pytest.raises(DeploykitError) as error:
            Device(Strange(), str(root)).ask("status")
        assert "\x1b" not in str(error.value)
