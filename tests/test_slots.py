"""Releases and the switch between them: old or new, never between, whatever happens; and the way back."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit import slots
from deploykit.errors import DeploykitError, UsageError
from deploykit.slots import Health, Moment

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
NOW = Moment("boot one", 100.0)


def installed(root: Path, *ids: str) -> Path:
    for id in ids:
        slots.install(root, id, lambda folder, id=id: (folder / "engine").write_text(id) and None)
    return root


def activate(root: Path, id: str, *, within_s: float | None = None, now: Moment = NOW) -> bool:
    return slots.activate(root, id, within_s=within_s, now=now)


def running(root: Path) -> str:
    """What a program finds that opens the current release."""
    return (root / "current" / "engine").read_text()


def links(root: Path) -> tuple[str | None, str | None]:
    return slots.current(root), slots.previous(root)


class TestSwitching:
    def test_the_first_release_has_nothing_to_go_back_to(self, tmp_path):
        activate(installed(tmp_path, A), A)

        assert links(tmp_path) == (A, None)
        with pytest.raises(UsageError, match="has no previous release to go back to"):
            slots.rollback(tmp_path)

    def test_the_next_one_keeps_the_way_back_and_going_back_keeps_none(self, tmp_path):
        activate(installed(tmp_path, A, B), A)
        activate(tmp_path, B)

        assert (running(tmp_path), *links(tmp_path)) == (B, B, A)
        assert slots.rollback(tmp_path) == A
        assert (running(tmp_path), *links(tmp_path)) == (A, A, None)

    def test_the_current_release_again_changes_nothing(self, tmp_path):
        activate(installed(tmp_path, A, B), A)
        activate(tmp_path, B)
        before = (tmp_path / "state.json").stat()

        assert activate(tmp_path, B) is False

        assert (tmp_path / "state.json").stat() == before
        assert links(tmp_path) == (B, A)

    def test_an_installed_release_is_not_written_again(self, tmp_path):
        installed(tmp_path, A)

        assert slots.install(tmp_path, A, lambda folder: pytest.fail("was filled again")) is False

    def test_a_release_that_fails_to_be_written_is_not_there(self, tmp_path):
        def fill(folder: Path) -> None:
            (folder / "engine").write_text("half")
            raise UsageError("damaged")

        with pytest.raises(UsageError, match="damaged"):
            slots.install(tmp_path, A, fill)

        assert list((tmp_path / "releases").iterdir()) == []

    @pytest.mark.parametrize("id", ["", "..", "../" + "a" * 64, "A" * 64, "a" * 63, "a" * 64 + "\n"])
    def test_what_is_no_identity_becomes_no_path(self, tmp_path, id):
        with pytest.raises(UsageError, match="is no identity of a bundle"):
            slots.release_folder(tmp_path, id)

    def test_a_release_that_is_not_installed_cannot_be_activated(self, tmp_path):
        with pytest.raises(UsageError, match="has no release"):
            activate(tmp_path, A)

    def test_one_process_at_a_time(self, tmp_path):
        script = f"""
import sys; from pathlib import Path; from deploykit import slots
try:
    with slots.exclusive(Path({str(tmp_path)!r}), patience_s=0.0): print("in")
except Exception as error: print(error)
"""
        with slots.exclusive(tmp_path):
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

        assert "is being changed by another process\n  why: " in done.stdout

    def test_who_is_through_in_a_moment_is_waited_for(self, tmp_path, monkeypatch):
        held = slots.exclusive(tmp_path)
        held.__enter__()
        monkeypatch.setattr("deploykit.slots.time.sleep", lambda seconds: held.__exit__(None, None, None))

        with slots.exclusive(tmp_path):
            pass

    def test_a_root_that_is_a_file_is_not_called_busy(self, tmp_path):
        (tmp_path / "file").write_text("")

        with pytest.raises(UsageError, match=r"\A\S+ is a file, not a folder\n"), slots.exclusive(tmp_path / "file"):
            pass

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_parent_that_may_not_be_listed_is_no_obstacle_unless_something_was_made_in_it(self, is_there):
        script = f"""
import os, sys; from pathlib import Path; from deploykit import slots
from deploykit.errors import DeploykitError
root = Path(sys.argv[1], "parent", "root")
if os.getuid() == 0: os.chown(root.parent, 65534, 65534); os.setgroups([]); os.setgid(65534); os.setuid(65534)
if {is_there}: root.mkdir()
root.parent.chmod(0o311)
try:
    with slots.exclusive(root): print(slots.install(root, {A!r}, lambda folder: None))
except DeploykitError as error: print(error)
"""
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch).chmod(0o711)
            Path(scratch, "parent").mkdir()
            done = subprocess.run([sys.executable, "-c", script, scratch], capture_output=True, text=True, check=False)

        said = {True: "True\n", False: f"cannot sync: {scratch}/parent\n"}[is_there]
        assert done.stdout.startswith(said), done.stdout + done.stderr

    def test_a_switch_that_stopped_before_it_happened_leaves_the_way_back_as_it_was(self, tmp_path, monkeypatch):
        activate(installed(tmp_path, A, B, C), A)
        activate(tmp_path, B)
        rename = Path.rename

        def stops(path: Path, target: Path) -> Path:
            if Path(target).name == "current":
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", stops)
        with pytest.raises(KeyboardInterrupt):
            activate(tmp_path, C)
        monkeypatch.undo()
        assert links(tmp_path) == (B, B)

        assert slots.recover(tmp_path, NOW)[-1] == f"undid activating {C}"

        assert links(tmp_path) == (B, A)


class TestAFullDisk:
    @pytest.fixture
    def root(self, tmp_path):
        """A device on a file system of 2 MiB, with a release to go back to and not one byte left."""
        root = tmp_path / "full"
        root.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("wants the right to mount a small tmpfs (root, or CAP_SYS_ADMIN)")
        activate(installed(root, A, B), A)
        activate(root, B, within_s=60)
        with (root / "log").open("wb", buffering=0) as log, suppress(OSError):
            while True:
                log.write(bytes(4096))
        yield root
        subprocess.run(["umount", root], check=True)

    def test_going_back_needs_no_space(self, root):
        assert slots.rollback(root) == A
        assert (running(root), slots.read_state(root).doing) == (A, None)

    def test_a_trial_that_runs_out_still_goes_back(self, root):
        assert slots.recover(root, Moment("boot two", 0.0)) == [f"went back from {B}, which was not confirmed"]
        assert running(root) == A

    def test_on_xfs_which_wants_room_for_inodes_it_goes_back_too(self, tmp_path):
        if shutil.which("mkfs.xfs") is None:
            pytest.skip("wants the Debian package xfsprogs")
        image, root = tmp_path / "image", tmp_path / "disk"
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(320 << 20)  # the least that mkfs.xfs takes
        subprocess.run(["mkfs.xfs", "-q", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, root], capture_output=True, check=False).returncode:
            pytest.skip("wants the right to mount a loop device with xfs (root, or CAP_SYS_ADMIN)")
        try:
            activate(installed(root, A, B), A)
            activate(root, B)
            with (root / "log").open("wb") as log:
                for size in (64 << 20, 1 << 20, 1 << 12):
                    with suppress(OSError):
                        while True:
                            os.posix_fallocate(log.fileno(), os.fstat(log.fileno()).st_size, size)

            assert slots.rollback(root) == A
        finally:
            subprocess.run(["umount", root], check=True)

    def test_the_reserve_is_there_again_after_the_next_install(self, root):
        slots.rollback(root)
        assert not (root / "reserve").exists()
        (root / "log").unlink()

        installed(root, C)

        assert (root / "reserve").stat().st_size == 1 << 20

    def test_without_the_reserve_the_old_state_stays_and_the_reason_is_told(self, root):
        (root / "reserve").unlink()
        (root / "log").write_bytes(bytes(300 << 10))
        with (root / "log").open("ab", buffering=0) as log, suppress(OSError):
            while True:
                log.write(bytes(4096))

        with pytest.raises(DeploykitError, match="no space left on device"):
            slots.rollback(root)

        assert running(root) == B


class TestTrials:
    @pytest.fixture
    def root(self, tmp_path):
        activate(installed(tmp_path, A, B), A)
        activate(tmp_path, B, within_s=60)
        return tmp_path

    def test_before_the_time_is_up_nothing_happens(self, root):
        assert slots.recover(root, Moment("boot one", 159.0)) == []
        assert links(root) == (B, A)
        assert slots.status(root, Moment("boot one", 130.0))["trial"] == {"id": B, "seconds_left": 30.0}

    @pytest.mark.parametrize("later", [Moment("boot one", 161.0), Moment("boot two", 3.0)], ids=["time is up", "started again"])
    def test_what_is_not_confirmed_goes_back_by_itself(self, root, later):
        assert slots.recover(root, later) == [f"went back from {B}, which was not confirmed"]

        assert links(root) == (A, None)
        assert slots.recover(root, later) == []
        assert "not confirmed within 60 s" in slots.status(root, later)["log"][-1]

    def test_what_is_confirmed_stays(self, root):
        assert slots.confirm(root) is True

        assert slots.recover(root, Moment("boot two", 10_000.0)) == []
        assert links(root) == (B, A)
        assert slots.confirm(root) is False

    def test_another_one_waits_until_it_is_confirmed_or_left(self, root):
        installed(root, C)

        with pytest.raises(UsageError, match=f"the release {B} is on trial(.|\n)*confirm it, or roll back"):
            activate(root, C)

        assert (links(root), slots.read_state(root).trial.id) == ((B, A), B)
        slots.rollback(root)
        assert activate(root, C) is True
        assert links(root) == (C, A)

    def test_a_first_release_stays_for_there_is_nothing_else(self, tmp_path):
        activate(installed(tmp_path, A), A, within_s=60)

        assert slots.recover(tmp_path, Moment("boot two", 0.0)) == []
        assert links(tmp_path) == (A, None)

    def test_a_first_release_that_nobody_confirms_can_be_replaced(self, tmp_path):
        activate(installed(tmp_path, A, B), A, within_s=60)

        assert activate(tmp_path, B, within_s=60) is True

        assert (links(tmp_path), slots.read_state(tmp_path).trial.id) == ((B, A), B)


class TestGarbage:
    def test_current_previous_and_what_a_process_has_opened_stay(self, tmp_path):
        activate(installed(tmp_path, A, B, C, "d" * 64), A)
        activate(tmp_path, B)
        (tmp_path / "engines" / C).mkdir(parents=True)
        slots.write_health(tmp_path, "d" * 64, Health())

        held = slots.hold(tmp_path, C)
        assert slots.collect_garbage(tmp_path) == ["d" * 64]
        os.close(held)
        assert slots.collect_garbage(tmp_path) == [C]

        assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == [A, B]
        assert list((tmp_path / "engines").iterdir()) == list((tmp_path / "health").iterdir()) == []

    def test_a_number_is_forgotten_with_its_release(self, tmp_path):
        activate(installed(tmp_path, A, B), A)
        slots.note_number(tmp_path, A, 5)
        slots.note_number(tmp_path, B, 7)

        slots.collect_garbage(tmp_path)

        assert (slots.number(tmp_path, A, 1), slots.number(tmp_path, B, 1), slots.number(tmp_path, A, 6)) == (5, 1, 6)

    def test_what_may_not_be_removed_is_an_error_that_says_so(self, tmp_path, monkeypatch):
        activate(installed(tmp_path, A, B), A)

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(slots.publish, "remove", refuse)

        with pytest.raises(DeploykitError, match="cannot remove: "):
            slots.collect_garbage(tmp_path)

    def test_a_release_that_is_gone_cannot_be_held(self, tmp_path):
        with pytest.raises(UsageError, match="has no release"):
            slots.hold(tmp_path, A)


class TestState:
    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "doing": 5, "trial": null, "log": []}'])
    def test_a_damaged_one_is_refused_with_what_to_do(self, tmp_path, content):
        (tmp_path / "state.json").write_text(content)

        with pytest.raises(UsageError, match=r"state\.json is damaged(.|\n)*remove it"):
            slots.read_state(tmp_path)

    @settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_health_with_any_value_anywhere_is_refused_or_read_and_nothing_worse(self, tmp_path, data):
        said = {"verdict": "pass"}
        engine = {"identity": "0", "parity": said, "precision": said}
        value = {"checked": {"net": engine}, "running": {"engine": "net", "identity": "0", "verdicts": {"parity": "pass"}}}
        place = data.draw(st.sampled_from([value, value["checked"], engine, said, value["running"]]))
        key = data.draw(st.sampled_from([*place]))
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(st.none() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({"net": 1}))
        (tmp_path / "health").mkdir(exist_ok=True)
        (tmp_path / "health" / f"{A}.json").write_text(json.dumps(value))

        try:
            found = slots.read_health(tmp_path, A)
        except UsageError:
            return
        assert all({"identity", "parity", "precision"} <= parts.keys() for parts in found.checked.values())
        slots.write_health(tmp_path, A, found)
        assert slots.read_health(tmp_path, A) == found

    @settings(deadline=None, max_examples=25)
    @given(
        st.lists(
            st.sampled_from(["activate A", "activate B", "activate C", "rollback", "confirm", "later", "collect"]), max_size=8
        )
    )
    def test_whatever_is_done_the_current_release_is_there_and_another_one_is_the_way_back(self, tmp_path_factory, words):
        root, now = tmp_path_factory.mktemp("root"), NOW
        for word in words:
            verb, _, letter = word.partition(" ")
            if verb == "activate":
                id = 64 * letter.lower()
                trial, is_first = slots.read_state(root).trial, slots.previous(root) is None
                may = trial is None or trial.id == id or is_first
                with nullcontext() if may else pytest.raises(UsageError, match="is on trial"):
                    activate(installed(root, id), id, within_s=10, now=now)
            elif verb == "rollback" and slots.previous(root):
                slots.rollback(root)
            elif verb == "confirm":
                slots.confirm(root)
            elif verb == "later":
                now = Moment(now.boot, now.seconds + 20)
                slots.recover(root, now)
            elif verb == "collect":
                slots.collect_garbage(root)
            one, other = links(root)
            assert one is None or running(root) == one
            assert other is None or (other != one and (root / "previous" / "engine").read_text() == other)
            assert slots.read_state(root).doing is None


WORK = f"""
import sys; from pathlib import Path; from deploykit import slots
root, now = Path(sys.argv[1]), slots.Moment("boot one", 1.0)
slots.recover(root, now)
slots.install(root, {B!r}, lambda folder: (folder / "engine").write_text({B!r}) and None)
slots.activate(root, {B!r}, within_s=60, now=now)
slots.rollback(root)
"""
CALLS = ("mkdir", "openat", "write", "fsync", "rename", "symlink", "unlink", "rmdir")


def traced(root: Path, *options: str, log: Path) -> int:
    command = ["strace", "-qq", "-y", "-s", "0", "-e", f"trace={','.join(CALLS)}", *options, "-o", str(log)]
    return subprocess.run([*command, sys.executable, "-B", "-c", WORK, str(root)], capture_output=True, check=False).returncode


def changing(log: Path, root: Path) -> list[tuple[str, int]]:
    """Every call that changes something below `root`: its name, and how many of that name came before, counted from 1."""
    counts: Counter[str] = Counter()
    found = []
    for line in log.read_text().splitlines():
        name = line.partition("(")[0]
        counts[name] += 1
        if str(root) in line and (name != "openat" or "O_CREAT" in line):
            found.append((name, counts[name]))
    return found


class TestKills:
    def test_killed_at_any_call_that_changes_something_it_is_the_old_release_or_the_new_one(self, tmp_path, capsys):
        if shutil.which("strace") is None:
            pytest.skip("wants strace (Debian package strace)")
        start, root, log = tmp_path / "start", tmp_path / "root", tmp_path / "log"
        activate(installed(start, A), A)
        shutil.copytree(start, root, symlinks=True)
        if traced(root, log=log) != 0:
            pytest.skip("wants the right to trace a process (CAP_SYS_PTRACE)")
        points, outcomes = changing(log, root), Counter[str]()

        for name, number in points[::2] + points[-1:]:  # every second one here; all in benchmarks/deploy_faults.py
            shutil.rmtree(root)
            shutil.copytree(start, root, symlinks=True)
            code = traced(root, "-e", f"inject={name}:signal=KILL:when={number}", log=log)
            assert code != 0, f"{name} {number} was not reached"
            outcomes[running(root)] += 1
            slots.recover(root, NOW)
            state = json.loads((root / "state.json").read_text())
            assert (running(root), state["doing"]) in ((A, None), (B, None))
            assert slots.recover(root, NOW) == []
            assert not [path for path in root.rglob("*") if path.name.endswith((".partial", ".stale"))]

        with capsys.disabled():
            sys.stdout.write(f" {sum(outcomes.values())} kills ")
        assert len(points) > 40
        assert set(outcomes) == {A, B}

    def test_what_is_meant_is_on_the_disk_before_it_is_done_and_each_link_before_the_next(self, tmp_path):
        if shutil.which("strace") is None:
            pytest.skip("wants strace (Debian package strace)")
        root, log = tmp_path / "root", tmp_path / "log"
        activate(installed(root, A), A)
        if traced(root, log=log) != 0:
            pytest.skip("wants the right to trace a process (CAP_SYS_PTRACE)")

        steps = []
        for line in log.read_text().splitlines():
            if match := re.match(r'rename\("(.*?)", "(.*?)"\)', line):
                steps.append(f"rename {Path(match[2]).name}")
            elif match := re.match(r"fsync\(\d+<(.*)>\)", line):
                steps.append(f"fsync {Path(match[1]).name}")
        state, parent = ["fsync state.json.partial", "rename state.json", "fsync root"], "fsync root"
        release = ["fsync engine", f"fsync {B}.partial", f"rename {B}", "fsync releases"]
        forth = [*state, "rename previous", parent, "rename current", parent, *state]
        back = [*state, "rename current", parent, parent, *state]
        assert steps == [*release, *forth, *back]
