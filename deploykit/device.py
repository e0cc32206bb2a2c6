"""A device that we are connected to: the commands of its device half, and what has to be done there before that may run.

Everything that a device says is data: its answers have a limit, are parsed as JSON, and are shown without the characters that
move a cursor. What the device half says of itself is not believed before the device's own `ssh-keygen` and `sha256sum`, or the
device half that is installed there already, have checked it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import lease
from deploykit.bundle import DEVICE_HALF, signature
from deploykit.errors import CapabilityError, DeploykitError, LineError, UsageError, printable
from deploykit.gate import EXIT_CODES
from deploykit.remote import Connection, Talk

ROOT = "/opt/deploykit"
SIGNERS = "allowed_signers"
BUILD_SILENCE_S = 2 * 3600.0  # an engine of TensorRT takes an hour on a small board, and says nothing meanwhile
_SILENCE_S = 600.0
_LONGEST_TEXT = 4096
_GATES = frozenset(EXIT_CODES.values())

# What is there, by nothing but a POSIX shell: $1 root, $2 identity, $3 Python.
_SURVEY = """
command -v -- "$3" > /dev/null 2>&1 && echo python
cd -- "$1" 2> /dev/null || exit 0
[ -f "releases/$2/bundle.json" ] && echo "release $(sha256sum < "releases/$2/bundle.json" | cut -c1-64)"
[ -f "releases/$2/device.pyz" ] && echo "half releases/$2"
[ -f current/device.pyz ] && echo "installed $(sha256sum < current/device.pyz | cut -c1-64)"
[ -f "incoming/$2/device.pyz" ] && echo "came $(sha256sum < "incoming/$2/device.pyz" | cut -c1-64)"
exit 0
"""

# What comes on standard input (manifest, signature, device half: $3 $4 $5 bytes; a half of 0 bytes is one that is
# there already) is put in place, and nothing of it runs before it was checked: by the device half that is installed there, or the
# first time by the system's own tools.
# $1 root, $2 identity, $6 digest of the device half, $7 Python, $8 namespace of signatures.
_BOOTSTRAP = """
fail() { echo "$1" >&2; exit 1; }
umask 022
mkdir -p -- "$1/incoming/$2" && cd -- "$1/incoming/$2" && root=$(cd ../.. && pwd) || exit 1
head -c "$3" > "bundle.json.$$" && head -c "$4" > "bundle.json.sig.$$" && head -c "$5" > "device.pyz.$$" || exit 1
[ "$(wc -c < "device.pyz.$$")" -eq "$5" ] || fail "the line was cut"
if [ "$5" = 0 ]; then
  for there in device.pyz ../../current/device.pyz; do
    if [ -f "$there" ] && [ "$(sha256sum < "$there" | cut -c1-64)" = "$6" ]; then cat < "$there" > "device.pyz.$$" || exit 1; fi
  done
fi
mv -f "bundle.json.$$" bundle.json && mv -f "device.pyz.$$" device.pyz || exit 1
if [ "$4" = 0 ]; then rm -f "bundle.json.sig.$$" bundle.json.sig; else mv -f "bundle.json.sig.$$" bundle.json.sig; fi
if [ -f ../../current/device.pyz ]; then exec "$7" ../../current/device.pyz vouch "$2" --root "$root"; fi
printf '%s  device.pyz\\n' "$6" | sha256sum -c - > /dev/null || fail "device.pyz is not what was sent"
grep -q "\\"$6\\"" bundle.json || fail "the manifest does not name this device.pyz"
if [ ! -e ../../allowed_signers ] && [ ! -L ../../allowed_signers ]; then
  echo '{"signer": null, "by": "sha256sum", "exit_code": 0}'; exit 0
fi
[ -f bundle.json.sig ] || fail "the bundle is not signed, and the device wants one of its allowed signers"
names=$(ssh-keygen -Y find-principals -s bundle.json.sig -f ../../allowed_signers 2> /dev/null) || names=
[ -n "$names" ] || fail "the bundle is not signed by an allowed signer of the device"
while IFS= read -r name; do
  if ssh-keygen -Y verify -n "$8" -I "$name" -s bundle.json.sig -f ../../allowed_signers < bundle.json > /dev/null 2>&1; then
    echo '{"by": "ssh-keygen and sha256sum", "exit_code": 0}'; exit 0
  fi
done <<END
$names
END
fail "the signature of the bundle is wrong"
"""


@dataclass(frozen=True)
class Survey:
    """What is there before anything of ours runs: the digest of the device half that is installed, None where none is, and of
    one that came for this release before; and, where the release is installed, the folder of its own one, below the root, and
    the digest of its manifest."""

    installed_sha256: str | None
    came_sha256: str | None
    own_half: str | None
    release_sha256: str | None


class Device:
    """One network's releases on one device, as its device half tells of them."""

    def __init__(self, connection: Connection, root: str, *, python: str = "python3") -> None:
        self.connection, self.root, self.python = connection, root, python
        self.half = "current"  # the folder, below the root, of the device half that answers

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self.connection.name

    def survey(self, id: str) -> Survey:
        """Look at what is there, with a shell alone. Raises CapabilityError when there is no Python."""
        done = self.connection.run(["sh", "-c", _SURVEY, "survey", self.root, id, self.python])
        if done.code:
            raise DeploykitError(f"{self.name} has no POSIX shell that answers", why=done.words)
        said = dict(line.partition(" ")[::2] for line in done.stdout.decode("utf-8", "replace").splitlines()[:20])
        if "python" not in said:
            raise CapabilityError(
                f"{self.name} has no {self.python}", fix="install Python 3.10 or newer, or name one with --python"
            )
        return Survey(said.get("installed"), said.get("came"), said.get("half"), said.get("release"))

    def bootstrap(self, id: str, manifest: bytes, signed: bytes | None, half: bytes, sha256: str) -> dict[str, Any]:
        """Bring the manifest and the device half, and have the device check them; from then on that device half answers.

        Raises DeploykitError with the device's words when it refuses them; nothing of ours has run there then.
        """
        parts = [manifest, signed or b"", half]
        sizes = [str(len(part)) for part in parts]
        words = ["sh", "-c", _BOOTSTRAP, "bootstrap", self.root, id, *sizes, sha256, self.python, signature.NAMESPACE]
        done = self.connection.run(words, stdin=parts)
        if done.code and not done.stdout.strip():
            fix = ""
            if "ermission denied" in done.words or "Read-only" in done.words:
                fix = f"on the device, once: sudo install -d -o USER {self.root}; or another --root"
            elif "sign" in done.words:
                fix = f"sign it (pack --sign), or change who may: deploykit device trust {self.name} --signers FILE"
            raise DeploykitError(f"{self.name} does not take the bundle", why=done.words, fix=fix)
        answer = self._parsed(done.stdout, done.words)
        self.half = f"incoming/{id}"
        return answer

    def lease(self, owner: str) -> Lease:
        """Hold the device's lease until it is stopped. Raises DeploykitError that names who holds it, and for how long."""
        talk = self.connection.start([*self._half(), "lease", "--root", self.root, "--owner", owner])
        try:
            said = talk.line(_SILENCE_S)
            if said != b"leased":
                rest = talk.close()
                self._parsed(said + b"\n" + rest.stdout, rest.words)
                raise LineError(f"{self.name} gave no lease", why=rest.words)
        except BaseException:
            if talk.is_running:
                talk.close()
            raise
        return Lease(talk, self.name)

    def ask(
        self,
        verb: str,
        *words: str,
        stdin: bytes | Iterable[bytes] = b"",
        silence_s: float = _SILENCE_S,
        has_root: bool = True,
    ) -> dict[str, Any]:
        """The answer of one command of the device half; what a gate says (exit codes 3 and 5) is one.

        Raises what the device half raised there, with the device's name.
        """
        place = ["--root", self.root] if has_root else []
        done = self.connection.run([*self._half(), verb, *words, *place], stdin=stdin, silence_s=silence_s)
        return self._parsed(done.stdout, done.words)

    def _half(self) -> list[str]:
        return ["env", "ORT_DISABLE_TELEMETRY=1", self.python, f"{self.root}/{self.half}/{DEVICE_HALF}"]

    def _parsed(self, stdout: bytes, words: str) -> dict[str, Any]:
        try:
            answer = json.loads(stdout)
            code = answer["exit_code"]
            if not isinstance(answer, dict) or type(code) is not int:
                raise TypeError("no exit code")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if "can't open file" in words:
                fix = "deploykit deploy BUNDLE puts one there"
                raise UsageError(f"{self.name} has no release in {printable(self.root)}", why=words, fix=fix) from error
            raise DeploykitError(f"{self.name} gave no answer that can be read", why=words) from error
        if "error" in answer:
            raise _error(self.name, answer["error"], code)
        if code not in _GATES | {0, 1}:
            raise DeploykitError(f"{self.name} ended with exit code {code}", why=words)
        return dict(answer)


class Lease:
    """A lease that is held: signs of life go to the device until the block ends."""

    def __init__(self, talk: Talk, name: str) -> None:
        self._talk, self._name, self._over = talk, name, threading.Event()
        self._beats = threading.Thread(target=self._beat, name=f"lease of {name}", daemon=True)
        self._beats.start()

    def require(self) -> None:
        """Raise LineError when the lease was lost: somebody else may be deploying."""
        if not self._talk.is_running:
            raise LineError(f"the lease of {self._name} was lost", why="no sign of life came through in time")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._beats.join()
        self._talk.close()

    def _beat(self) -> None:
        while not self._over.wait(lease.BEAT_S):
            try:
                self._talk.say(b"\n")
            except LineError:
                return


def trust(connection: Connection, root: str, signers: Path) -> None:
    """Put a file of allowed signers where the device half looks for it: from then on nothing else is installed there.

    `root` is the folder of one network on the device. Raises DeploykitError when that cannot be made or written, LineError.
    """
    done = connection.run(["mkdir", "-p", "--", root])
    if done.code:
        fix = f"on the device, once: sudo install -d -o USER {root}; or another --root"
        raise DeploykitError(f"cannot make {printable(root)} on {connection.name}", why=done.words, fix=fix)
    connection.put(signers, f"{root}/{SIGNERS}")


def trusted(connection: Connection, root: str) -> bytes | None:
    """The allowed signers that are on the device now; None when there are none."""
    done = connection.run(["sh", "-c", '[ -e "$1" ] || [ -L "$1" ] || exit 3; exec cat < "$1"', "trusted", f"{root}/{SIGNERS}"])
    if done.code not in (0, 3):
        raise DeploykitError(f"cannot read {printable(root)}/{SIGNERS} on {connection.name}", why=done.words)
    return done.stdout if done.code == 0 else None


def sendable(pieces: Iterable[bytes], skip: int) -> Iterator[bytes]:
    """The bytes after the first `skip`."""
    for piece in pieces:
        rest = piece[skip:]
        skip = max(0, skip - len(piece))
        if rest:
            yield rest


def _error(name: str, said: Any, code: int) -> DeploykitError:
    facts: Mapping[str, Any] = said if isinstance(said, dict) else {}
    kind = {2: UsageError, 4: CapabilityError}.get(code, DeploykitError)
    problems: Sequence[Any] = facts.get("problems") or ()
    return kind(
        f"{name}: {_text(facts.get('what'))}",
        why=_text(facts.get("why")),
        fix=_text(facts.get("fix")),
        problems=[_text(problem) for problem in list(problems)[:20]],
    )


def _text(value: Any) -> str:
    return printable(value)[:_LONGEST_TEXT] if isinstance(value, str) else ""


def find_root(connection: Connection) -> str:
    """The only root below /opt/deploykit that has a current release. Raises UsageError when there is none, or several."""
    script = 'for link in "$1"/*/current; do [ -e "$link" ] && echo "${link%/current}"; done; exit 0'
    done = connection.run(["sh", "-c", script, "roots", ROOT])
    found = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line]
    if len(found) != 1:
        why = f"below {ROOT} there are: {', '.join(map(printable, found[:20]))}" if found else f"there is none below {ROOT}"
        raise UsageError(f"which releases of {connection.name}?", why=why, fix="name their folder on the device with --root")
    return found[0]
