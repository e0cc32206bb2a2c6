"""Files and directories that appear complete or not at all: after exceptions, Ctrl-C, kill -9 and a full disk."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError

FILES = ("a", "b", "sub/c", "sub/sub/d")


def fill(folder: Path, content: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def content(folder: Path) -> set[str]:
    """The contents of all files of a complete directory: one, when all are of the same version."""
    return {(folder / name).read_text() for name in FILES}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture
def full(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("wants the right to mount a small tmpfs (root, or CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", folder], check=True)


class TestWritingAFile:
    def test_the_content_is_there_and_nothing_else(self, tmp_path):
        publish.write_file(tmp_path / "result.json", b"{}")

        assert names(tmp_path) == ["result.json"]
        assert (tmp_path / "result.json").read_bytes() == b"{}"

    def test_it_replaces_what_was_there(self, tmp_path):
        (tmp_path / "result.json").write_bytes(b"a longer old content")

        publish.write_file(tmp_path / "result.json", b"new")

        assert (tmp_path / "result.json").read_bytes() == b"new"

    def test_what_a_killed_run_left_is_no_obstacle(self, tmp_path):
        (tmp_path / "result.json.partial").write_bytes(b"a longer half-written content")

        publish.write_file(tmp_path / "result.json", b"new")

        assert names(tmp_path) == ["result.json"]
        assert (tmp_path / "result.json").read_bytes() == b"new"

    def test_a_full_disk_leaves_the_old_content_and_says_what_to_do(self, full):
        publish.write_file(full / "result.json", b"old")

        with pytest.raises(DeploykitError, match=r"cannot write: .*result\.json\.partial|no space left") as caught:
            publish.write_file(full / "result.json", b"x" * 100_000)

        assert "why: no space left on device\n  try: free some space, or choose another place with --output" in str(caught.value)
        assert names(full) == ["result.json"]
        assert (full / "result.json").read_bytes() == b"old"

    def test_a_device_that_takes_no_byte_is_reported_and_nothing_is_left(self, tmp_path):
        (tmp_path / "result.json").write_bytes(b"old")
        (tmp_path / "result.json.partial").symlink_to("/dev/full")

        with pytest.raises(DeploykitError, match="why: no space left on device"):
            publish.write_file(tmp_path / "result.json", b"new")

        assert names(tmp_path) == ["result.json"]
        assert (tmp_path / "result.json").read_bytes() == b"old"

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
    def test_an_interruption_before_the_rename_leaves_the_old_content(self, tmp_path, monkeypatch, interruption):
        (tmp_path / "result.json").write_bytes(b"old")

        def interrupted(descriptor: int) -> None:
            raise interruption

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(interruption):
            publish.write_file(tmp_path / "result.json", b"new")

        assert names(tmp_path) == ["result.json"]
        assert (tmp_path / "result.json").read_bytes() == b"old"

    def test_a_path_through_a_file_says_so(self, tmp_path):
        (tmp_path / "file").touch()

        with pytest.raises(DeploykitError, match="part of that path is a file, not a folder"):
            publish.write_file(tmp_path / "file" / "result.json", b"")

    def test_killed_at_any_moment_the_file_has_the_old_content_or_the_new(self, tmp_path):
        script = """
import itertools, sys; from pathlib import Path; from deploykit import publish
for number in itertools.count():
    publish.write_file(Path(sys.argv[1]), b"%d " % number * 20_000)
    if not number: print("ready", flush=True)
"""
        draws = random.Random(0)
        for _ in range(10):
            with running(script, tmp_path / "file"):
                time.sleep(draws.uniform(0, 0.02))

            numbers = (tmp_path / "file").read_text().split()
            assert (len(numbers), len(set(numbers))) == (20_000, 1)
            assert set(names(tmp_path)) <= {"file", "file.partial"}


class TestFillingADirectory:
    def test_it_appears_when_the_block_ends_and_not_before(self, tmp_path):
        with publish.directory(tmp_path / "runs" / "final") as folder:
            fill(folder, "new")
            assert not (tmp_path / "runs" / "final").exists()

        assert names(tmp_path / "runs") == ["final"]
        assert content(tmp_path / "runs" / "final") == {"new"}

    def test_it_replaces_what_was_there_as_a_whole(self, tmp_path):
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "old").touch()

        with publish.directory(tmp_path / "final") as folder:
            fill(folder, "new")
            assert names(tmp_path / "final") == ["old"]

        assert names(tmp_path) == ["final"]
        assert "old" not in names(tmp_path / "final")

    @pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize("before", [False, True])
    def test_an_exception_leaves_everything_as_it_was(self, tmp_path, exception, before):
        if before:
            (tmp_path / "final").mkdir()
            fill(tmp_path / "final", "old")

        with pytest.raises(exception), publish.directory(tmp_path / "final") as folder:  # noqa: PT012
            fill(folder, "new")
            raise exception

        assert names(tmp_path) == ["final"] * before
        assert not before or content(tmp_path / "final") == {"old"}

    def test_a_failure_of_the_last_rename_brings_the_old_directory_back(self, tmp_path):
        with publish.directory(tmp_path / "final") as folder:
            fill(folder, "old")

        with pytest.raises(FileNotFoundError), publish.directory(tmp_path / "final") as folder:
            folder.rmdir()

        assert names(tmp_path) == ["final"]
        assert content(tmp_path / "final") == {"old"}

    def test_what_killed_runs_left_is_no_obstacle_and_goes(self, tmp_path):
        for name in ("final", "final.partial", "final.stale"):
            (tmp_path / name / "sub").mkdir(parents=True)
            (tmp_path / name / "sub" / "left over").touch()

        with publish.directory(tmp_path / "final") as folder:
            assert names(folder) == []
            fill(folder, "new")

        assert names(tmp_path) == ["final"]

    def test_a_full_disk_leaves_the_old_directory_and_says_what_to_do(self, full):
        with publish.directory(full / "final") as folder:
            fill(folder, "old")

        with pytest.raises(DeploykitError) as caught, publish.directory(full / "final") as folder:
            fill(folder, "x" * 100_000)

        assert "why: no space left on device\n  try: free some space, or choose another place with --output" in str(caught.value)
        assert names(full) == ["final"]
        assert content(full / "final") == {"old"}

    def test_a_device_that_takes_no_byte_is_reported(self, tmp_path):
        no_space = pytest.raises(DeploykitError, match=r"cannot write: (.|\n)*why: no space left on device")

        with no_space, publish.directory(tmp_path / "final") as folder:
            (folder / "file").symlink_to("/dev/full")
            (folder / "file").write_text("content")

        assert names(tmp_path) == []

    @pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
    def test_a_process_that_is_asked_to_stop_cleans_up(self, tmp_path, interruption):
        script = """
import signal, sys, time; from pathlib import Path; from deploykit import publish
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with publish.directory(Path(sys.argv[1])) as folder:
        (folder / "file").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    pass
"""
        with running(script, tmp_path / "final") as process:
            assert names(tmp_path) == ["final.partial"]
            process.send_signal(interruption)
            process.wait(timeout=10)

        assert names(tmp_path) == []

    def test_killed_at_any_moment_a_complete_directory_is_there(self, tmp_path):
        script = """
import itertools, sys; from pathlib import Path; from deploykit import publish
for number in itertools.count():
    with publish.directory(Path(sys.argv[1])) as folder:
        for name in sys.argv[2:]:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{number} " * 2000)
    if not number: print("ready", flush=True)
"""
        final, stale = tmp_path / "final", tmp_path / "final.stale"
        draws = random.Random(0)
        for _ in range(15):
            with running(script, final, *FILES):
                time.sleep(draws.uniform(0, 0.02))

            # Between the two renames there is no `final`; the old directory, complete, stands beside it.
            (found,) = content(final if final.exists() else stale)
            assert len(found.split()) == 2000
            assert set(publish.leftovers(tmp_path)) >= {path for path in tmp_path.iterdir() if path != final}


class TestOrder:
    @pytest.fixture
    def calls(self, tmp_path):
        """Runs a script and lists the calls that put things on the disk, as `fsync PATH` and `rename OLD NEW`."""
        if shutil.which("strace") is None:
            pytest.skip("wants strace (Debian package strace)")

        def trace(script: str) -> list[str]:
            log = tmp_path / "strace.log"
            options = ["-f", "-y", "-s", "4096", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", str(log)]
            script = "from pathlib import Path; from deploykit import publish; root = Path.cwd(); " + script
            done = subprocess.run(
                ["strace", *options, sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True
            )
            if "ptrace" in done.stderr.lower():
                pytest.skip("wants the right to trace a process (CAP_SYS_PTRACE)")
            assert done.returncode == 0, done.stderr
            found = []
            for line in log.read_text().splitlines():
                if match := re.search(r"fsync\(\d+<(.*)>\) += 0", line):
                    found.append(f"fsync {match[1]}")
                elif match := re.search(r'rename\w*\(.*?"(.*?)".*?"(.*?)".*\) += 0', line):
                    found.append(f"rename {match[1]} {match[2]}")
            return [line.replace(f"{tmp_path}/", "").replace(str(tmp_path), ".") for line in found]

        return trace

    def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_call_returns(self, calls):
        assert calls("publish.write_file(root / 'file', b'content')") == [
            "fsync file.partial",
            "rename file.partial file",
            "fsync .",
        ]

    def test_every_file_then_every_folder_then_the_rename_then_the_parent(self, calls):
        found = calls(
            "publish.write_file(root / 'before', b'')\n"
            "for _ in range(2):\n"
            "    with publish.directory(root / 'final') as folder:\n"
            "        (folder / 'sub').mkdir(); (folder / 'sub' / 'a').touch(); (folder / 'b').touch()\n"
        )

        filled = [
            "fsync final.partial/sub/a",
            "fsync final.partial/sub",
            "fsync final.partial/b",
            "fsync final.partial",
        ]
        last = ["rename final.partial final", "fsync ."]
        assert found[3:] == [*filled, *last, *filled, "rename final final.stale", *last]


class TestRemoving:
    def test_a_link_is_removed_and_never_followed(self, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")

        for name in ("folder", "link", "dangling", "nothing"):
            publish.remove(tmp_path / name)

        assert names(tmp_path) == ["precious"]
        assert names(tmp_path / "precious") == ["file"]

    def test_left_over_is_what_is_unfinished_or_superseded(self, tmp_path):
        for name in ("build.partial", "export.stale", "result.json.partial"):
            (tmp_path / name).touch()
        (tmp_path / "build").mkdir()
        (tmp_path / "partial").mkdir()

        assert [path.name for path in publish.leftovers(tmp_path)] == ["build.partial", "export.stale", "result.json.partial"]
        assert publish.leftovers(tmp_path / "nothing") == []


class TestTheLock:
    HOLDER = """
import sys, time; from pathlib import Path; from deploykit import publish
with publish.lock(Path(sys.argv[1])):
    print("locked", flush=True); time.sleep(60)
"""

    def test_a_second_process_is_refused_and_told_who_holds_it(self, tmp_path):
        with (
            running(self.HOLDER, tmp_path / "run") as holder,
            pytest.raises(UsageError) as caught,
            publish.lock(tmp_path / "run"),
        ):
            pass

        assert str(caught.value) == (
            f"{tmp_path / 'run'} is in use by another run (pid {holder.pid})\n"
            "  try: wait for it, or choose another place with --output"
        )

    def test_it_dies_with_its_holder_however_that_dies(self, tmp_path):
        with running(self.HOLDER, tmp_path) as holder:
            holder.send_signal(signal.SIGKILL)
            holder.wait()

        with publish.lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()}\n"

    def test_it_is_given_back_also_after_an_exception(self, tmp_path):
        with pytest.raises(ValueError, match="inside"), publish.lock(tmp_path):
            raise ValueError("inside")

        with publish.lock(tmp_path):
            pass

    def test_it_makes_the_folder(self, tmp_path):
        with publish.lock(tmp_path / "runs" / "new"):
            assert (tmp_path / "runs" / "new").is_dir()

    def test_a_folder_that_is_a_file_says_so(self, tmp_path):
        (tmp_path / "file").touch()

        with (
            pytest.raises(DeploykitError, match="part of that path is a file, not a folder"),
            publish.lock(tmp_path / "file" / "run"),
        ):
            pass
