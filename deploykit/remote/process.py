"""Commands of a device as local processes: `local` is one, and ssh, adb and the like are run by a local program."""

from __future__ import annotations

import hashlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deploykit.errors import DeploykitError, LineError, UsageError, printable, translating_os_errors
from deploykit.progress import Progress, silent

_PIECE = 1 << 18
_LONGEST_ANSWER = 64 << 20
_NOT_FOUND, _NOT_ALLOWED, _SIGNALLED = 127, 126, 128
# The target gets its name when everything has arrived: a cut line looks like the end of the file to `cat`.
_PUT = """
case $1 in */*) folder=${1%/*}/ ;; *) folder=./ ;; esac
if [ -d "$1" ]; then echo "$1 is a folder" >&2; exit 1; fi
aside=${folder}.put.$$
trap 'rm -f -- "$aside"' EXIT HUP TERM
cat > "$aside" || exit 1
found=$(sha256sum < "$aside") || exit 1
if [ "${found%% *}" != "$2" ]; then echo "what arrived is not what was sent" >&2; exit 1; fi
# A `sync` that takes no names syncs all. Without the second one a power cut could take the name away again.
sync -- "$aside" 2> /dev/null || sync
mv -f -- "$aside" "$1" || exit 1
sync -- "$folder" 2> /dev/null || sync
"""
_GET = 'if [ -d "$1" ]; then echo "$1 is a folder" >&2; exit 1; fi; exec cat < "$1"'


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, and what it wrote to its two streams."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """The last line of what it complained, fit to be shown; else its exit code."""
        lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
        return printable(lines[-1])[:500] if lines else f"exit code {self.code}"


class Talk:
    """A command that goes on: lines can be said to it and heard from it."""

    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes], name: str) -> None:
        self._process, self._complaints, self._name, self._heard = process, complaints, name, b""

    def say(self, content: bytes) -> None:
        """Write to its standard input. Raises LineError when it does not listen any more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(content)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise LineError(f"{self._name} does not listen any more", why=self._last_words()) from error

    def line(self, silence_s: float) -> bytes:
        """The next line that it writes, without its end; empty when it has ended. Raises LineError after `silence_s`."""
        stdout = self._process.stdout
        assert stdout is not None
        until = time.monotonic() + silence_s
        while b"\n" not in self._heard:
            with selectors.DefaultSelector() as ready:
                ready.register(stdout, selectors.EVENT_READ)
                if not ready.select(max(0.0, until - time.monotonic())):
                    raise LineError(f"{self._name} said nothing for {silence_s:g} s")
            piece = os.read(stdout.fileno(), _PIECE)
            if not piece or len(self._heard) > _LONGEST_ANSWER:
                break
            self._heard += piece
        found, _, self._heard = self._heard.partition(b"\n")
        return found

    @property
    def is_running(self) -> bool:
        """Whether it still runs, as far as this side knows."""
        return self._process.poll() is None

    def close(self, silence_s: float = 10.0) -> Done:
        """Let it see the end of its standard input, and wait; it is ended when it takes longer than `silence_s`.

        The answer's `stdout` is what `line` has not given yet.
        """
        try:
            stdout, _ = self._process.communicate(timeout=silence_s)
        except subprocess.TimeoutExpired:
            end_group(self._process)
            stdout, _ = self._process.communicate()
        code = self._process.returncode
        self._complaints.seek(0)
        with self._complaints:
            return Done(code if code >= 0 else _SIGNALLED - code, self._heard + (stdout or b""), self._complaints.read(_PIECE))

    def _last_words(self) -> str:
        self._complaints.seek(0)
        return Done(0, b"", self._complaints.read(_PIECE)).words


class Processes(ABC):
    """What every connection shares whose commands are local processes; a subclass says which (`_command`)."""

    def __init__(self, name: str) -> None:
        self.name, self.commands = name, 0

    def run(self, words: Sequence[str], *, stdin: bytes | Iterable[bytes] = b"", silence_s: float = 120.0) -> Done:
        """See `Connection.run`."""
        heard: list[bytes] = []
        code, stderr = self._exchange(words, stdin, heard.append, silence_s, _LONGEST_ANSWER)
        return Done(code, b"".join(heard), stderr)

    def start(self, words: Sequence[str]) -> Talk:
        """See `Connection.start`."""
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - `Talk.close` closes it
        try:
            return Talk(self._popen(words, complaints), complaints, self.name)
        except BaseException:
            complaints.close()
            raise

    def put(self, source: Path, target: str, *, progress: Progress = silent) -> None:
        """See `Connection.put`."""
        with translating_os_errors("read", source), source.open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
        total = source.stat().st_size

        def pieces() -> Iterator[bytes]:
            done = 0
            with source.open("rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
                    done += len(piece)
                    progress(f"put {source.name}", done, total)

        done = self.run(["sh", "-c", _PUT, "put", target, sha], stdin=pieces())
        if done.code:
            raise DeploykitError(f"cannot write {printable(target)} on {self.name}", why=done.words)

    def get(self, source: str, target: Path) -> None:
        """See `Connection.get`."""
        aside = target.with_name(f".get.{os.getpid()}")
        try:
            with translating_os_errors("write", target), aside.open("wb") as file:
                code, stderr = self._exchange(["sh", "-c", _GET, "get", source], b"", file.write, 120.0, None)
            if code:
                raise DeploykitError(f"cannot read {printable(source)} on {self.name}", why=Done(code, b"", stderr).words)
            aside.rename(target)
        finally:
            aside.unlink(missing_ok=True)

    def close(self) -> None:  # noqa: B027 - nothing to end, unless a subclass holds a line
        """See `Connection.close`."""

    @abstractmethod
    def _command(self, words: Sequence[str]) -> list[str]:
        """The local process that runs `words` on the device."""

    def _failure(self, code: int, stderr: bytes) -> DeploykitError | None:  # noqa: B027 - nothing by default
        """What the local process says about the connection, where it is not what the command on the device says."""

    def _popen(self, words: Sequence[str], stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
        if not words or any("\0" in word for word in words):
            raise UsageError("a command is a list of words without NUL", why=f"this one is {printable(str(list(words)))[:200]}")
        self.commands += 1
        # Its own group: Ctrl-C is for this process, which then lets go in order; and what it started can be ended with it.
        return subprocess.Popen(
            self._command(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, bufsize=0
        )

    def _exchange(
        self,
        words: Sequence[str],
        stdin: bytes | Iterable[bytes],
        hear: Callable[[bytes], object],
        silence_s: float,
        most: int | None,
    ) -> tuple[int, bytes]:
        """Feed and drain one command; its exit code and what it complained."""
        try:
            process = self._popen(words, subprocess.PIPE)
        except FileNotFoundError:
            return _NOT_FOUND, f"{words[0]}: not found".encode(errors="surrogateescape")
        except PermissionError:
            return _NOT_ALLOWED, f"{words[0]}: permission denied".encode(errors="surrogateescape")
        try:
            stderr = _move(
                process, filter(None, [stdin] if isinstance(stdin, bytes) else stdin), hear, silence_s, most, self.name
            )
            code = process.wait(silence_s)
        except subprocess.TimeoutExpired as error:
            raise LineError(f"{self.name} said nothing for {silence_s:g} s", why=_shown(words)) from error
        finally:
            if process.poll() is None:
                end_group(process)
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
        failure = self._failure(code, stderr)
        if failure is not None:
            raise failure
        return (code if code >= 0 else _SIGNALLED - code), stderr


class Local(Processes):
    """This machine, as a device."""

    def __init__(self) -> None:
        super().__init__("local")

    def _command(self, words: Sequence[str]) -> list[str]:
        return list(words)


def _move(
    process: subprocess.Popen[bytes],
    pieces: Iterator[bytes],
    hear: Callable[[bytes], object],
    silence_s: float,
    most: int | None,
    name: str,
) -> bytes:
    """Write `pieces` to a process while both of its streams are read; what came on standard error."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    complaints, heard, left = b"", 0, memoryview(b"")
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        ready.register(process.stderr, selectors.EVENT_READ)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        while ready.get_map():
            events = ready.select(silence_s)
            if not events:
                raise subprocess.TimeoutExpired(name, silence_s)
            for key, _ in events:
                if key.fileobj is process.stdin:
                    left = left or memoryview(next(pieces, b""))
                    try:
                        left = left[os.write(key.fd, left) :] if left else left
                        is_over = not left and not (left := memoryview(next(pieces, b"")))
                    except BlockingIOError:
                        is_over = False
                    except BrokenPipeError:  # it needs no more; whether that is right, its exit code says
                        is_over = True
                    if is_over:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                if not piece:
                    ready.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    hear(piece)
                    heard += len(piece)
                    if most is not None and heard > most:
                        raise DeploykitError(f"{name} answered with more than {most >> 20} MiB", why="that is no answer")
                else:
                    complaints = (complaints + piece)[-_PIECE:]
    return complaints


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _shown(words: Sequence[str]) -> str:
    return f"it was running {printable(' '.join(words))[:200]}"
