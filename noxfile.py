"""The tests with every Python and PyTorch that deploykit is for.

One of them: nox -s "tests(python='3.11', torch='2.11')" -- tests/test_export.py. `nox --list` names all, `nox -s tests` runs all.
Each has an environment of its own, of 5.4 GB with torch.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
# Without a session's name nothing runs: fifteen environments are seldom what somebody wanted.
nox.options.sessions = []
# A session whose Python is missing fails. By itself nox passes over it with a warning, which says nothing about that Python.
nox.options.error_on_missing_interpreters = True

PYTHONS = ("3.11", "3.12", "3.13")
# The torchvision that goes with each torch, by what it requires of torch: 0.26.0 to 0.29.0 want exactly 2.11.0, 2.12.0 (0.27.1:
# 2.12.1), 2.13.0 and 2.14.0; 0.29.1 and 0.29.2 want 2.14.0 or a later one. pip then takes the pair that fits.
TORCHVISION = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29", "2.15": "0.29"}


@nox.session
@nox.parametrize("torch", list(TORCHVISION))
@nox.parametrize("python", PYTHONS)
def tests(session: nox.Session, torch: str) -> None:
    """Everything that `make test` runs, or the arguments of pytest after `--`."""
    session.install("--editable", ".[dev]", f"torch=={torch}.*", f"torchvision=={TORCHVISION[torch]}.*")
    session.run("python", "-m", "pytest", *(session.posargs or ("--numprocesses", "auto", "--dist", "loadfile")))
