"""Signatures by the system's OpenSSH: `ssh-keygen -Y sign` and `-Y verify`, with the keys that people already have.

What is signed is the manifest, byte for byte; it holds the digest and size of everything else. The namespace keeps a
signature that was made for something else (a commit, a mail) from being taken for one of a bundle.
OpenSSH's own description: PROTOCOL.sshsig, and ALLOWED SIGNERS in ssh-keygen(1).

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import CapabilityError, UsageError, printable

NAMESPACE = "deploykit-bundle@v1"
LIMIT_BYTES = 64 << 10
_TOOL = "ssh-keygen"
_TIMEOUT_S = 120  # a key on a token waits for somebody's finger


def sign(content: bytes, key: Path) -> bytes:
    """The signature of `content` by the private key in the file `key` (or by the agent, for its public half).

    Raises UsageError with OpenSSH's words when the key cannot sign, CapabilityError when there is no ssh-keygen.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {printable(key)}", fix="ssh-keygen -t ed25519 -f KEY makes one")
    done = _run(["-Y", "sign", "-n", NAMESPACE, "-f", str(key.absolute())], content)
    if done.returncode != 0 or not done.stdout:
        raise UsageError(f"{printable(key)} cannot sign", why=_words(done))
    return done.stdout


def signer(content: bytes, signature: bytes, allowed: Path) -> str:
    """Who signed `content`: the name in the allowed-signers file whose key and namespaces fit.

    Raises UsageError when nobody of them did, CapabilityError when there is no ssh-keygen.
    """
    if not allowed.is_file():
        raise UsageError(f"there is no file of allowed signers {printable(allowed)}", fix="one line each: NAME KEYTYPE PUBLICKEY")
    if len(signature) > LIMIT_BYTES:
        raise UsageError("the signature is none", why=f"it has {len(signature)} bytes; one has at most {LIMIT_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "signature")
        written.write_bytes(signature)
        files = ["-s", str(written), "-f", str(allowed.absolute())]
        known = _run(["-Y", "find-principals", *files], b"")
        names = known.stdout.decode("utf-8", "replace").splitlines() if known.returncode == 0 else []
        why = "its key is not in the file" if known.returncode else ""
        for name in names:
            done = _run(["-Y", "verify", "-n", NAMESPACE, "-I", name, *files], content)
            if done.returncode == 0:
                return name
            why = _words(done)
    raise UsageError(f"the bundle is not signed by anybody in {printable(allowed)}", why=why or "its key is not in the file")


def fingerprints(allowed: bytes) -> list[str]:
    """The keys of an allowed-signers file, one line each as `ssh-keygen -l` shows them, with the names they stand for."""
    found = []
    for line in allowed.decode("utf-8", "replace").splitlines():
        words = line.split()
        kinds = [index for index, word in enumerate(words) if word.startswith(("ssh-", "ecdsa-", "sk-"))]
        if not words or words[0].startswith("#") or not kinds:
            continue
        done = _run(["-l", "-f", "-"], " ".join(words[kinds[0] : kinds[0] + 2]).encode())
        shown = done.stdout.decode("utf-8", "replace").split()
        if done.returncode or len(shown) < 2:
            raise UsageError(f"a key of {printable(words[0])} cannot be read", why=_words(done))
        found.append(f"{words[0]}: {shown[1]} {shown[-1]}")
    return found


def _run(words: Sequence[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run([_TOOL, *words], input=content, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise CapabilityError("there is no ssh-keygen here", why=str(error), fix="install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError("ssh-keygen did not answer", why=f"it was given {_TIMEOUT_S} s") from error


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of what ssh-keygen said."""
    lines = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
    return printable(lines[-1])[:300] if lines else f"ssh-keygen ended with exit code {done.returncode}"
