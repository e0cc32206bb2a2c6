"""The job of five lines in docs/ci.md, executed as written on a clean clone: installation, run, annotations, exit codes.

usage: python benchmarks/five_lines.py [--keep FOLDER] [--output DIR]

What a runner of GitHub does is done here: `checkout` is a clone of a user's repository (a network, its weights, pictures and a
recipe), `setup-python` a new virtual environment, and each `run` line goes to `bash -e` with GitHub's variables. The address
from which deploykit is installed is written as in the page and answered by this repository's last commit (git's `insteadOf`);
its dependencies come from pip's own index, some gigabytes of them. A second commit adds a gate that no engine passes: the job has
to stop, with exit code 3 and an annotation (5 where something disturbs the measurement).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from _results import write
from PIL import Image

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/deploykit/deploykit"
NETWORK = """
from torch import nn


class Net(nn.Module):
    preprocess = {"resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

    def __init__(self, num_classes):
        super().__init__()
        first = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.features = nn.Sequential(*first, nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def build(num_classes=2):
    return Net(num_classes)
"""
RECIPE = """
name = "net"
gate = [{rules}]
[model]
name = "net.py:build"
weights = "net.pth"
[data]
calibrate = "photos"
validate = "labelled"
[quantize]
speed = false
target_sqnr_db = 0.0
[benchmark]
processes = 5
queries = 20
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work here and leave everything there")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        upstream = repository(place / "upstream")
        job = (ROOT / "docs" / "ci.md").read_text().split("```yaml\n")[1].partition("```")[0]
        good = run(job, upstream, place / "good", place / "venv")
        (upstream / "recipe.toml").write_text(RECIPE.format(rules='"latency <= 0.000001 ms"'))
        commit(upstream, "A gate that nothing passes")
        bad = run(job, upstream, place / "bad", place / "venv")
    for step in (*good, *bad):
        print(f"{step['line']}\n  exit code {step['exit_code']} after {step['seconds']:.0f} s; {step['annotations']} annotations")
    write("five_lines", {"good": good, "bad": bad}, arguments.output)
    codes = [[step["exit_code"] for step in steps] for steps in (good, bad)]
    sys.exit(0 if codes[0] == [0, 0] and codes[1] in ([0, 3], [0, 5]) and bad[-1]["annotations"] else 1)


def repository(folder: Path) -> Path:
    """A user's repository with a network of random weights and noise for pictures."""
    import torch

    (folder / "photos").mkdir(parents=True)
    (folder / "net.py").write_text(NETWORK)
    (folder / "recipe.toml").write_text(RECIPE.format(rules='"disagreements <= 32"'))
    random = np.random.default_rng(0)
    for number in range(32):
        for kind in ("photos", f"labelled/{'ab'[number % 2]}"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(NETWORK, names)  # the text above
    torch.save(names["build"]().state_dict(), folder / "net.pth")
    git("init", "--quiet", folder)
    commit(folder, "A network")
    return folder


def commit(folder: Path, message: str) -> None:
    git("-C", folder, "add", ".")
    git("-C", folder, "-c", "user.name=ci", "-c", "user.email=ci@example.org", "commit", "--quiet", "--message", message)


def git(*words: str | Path) -> None:
    subprocess.run(["git", *map(str, words)], check=True)


def run(job: str, upstream: Path, clone: Path, venv: Path) -> list[dict[str, Any]]:
    """Every line of the job, as the runner executes it; it stops at the first that fails."""
    git("clone", "--quiet", upstream, clone)  # actions/checkout
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)  # actions/setup-python
    rewritten = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": ADDRESS}
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "PYTHONPATH", "VIRTUAL_ENV"))
    }
    summary = clone.with_suffix(".md")
    of_github = {"GITHUB_ACTIONS": "true", "CI": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    environment = {**inherited, **rewritten, **of_github, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    steps = []
    for line in re.findall(r"^      - run: (.*)$", job, re.MULTILINE):
        start = perf_counter()
        done = subprocess.run(["bash", "-e", "-c", line], cwd=clone, env=environment, capture_output=True, text=True, check=False)
        notes = [said for said in done.stderr.splitlines() if said.startswith(("::error", "::warning"))]
        steps.append(
            {
                "line": line,
                "exit_code": done.returncode,
                "seconds": perf_counter() - start,
                "annotations": len(notes),
                "summary": summary.read_text() if summary.exists() else "",
                "said": _kept(done.stdout + done.stderr, clone.parent) if line.startswith("deploykit") else "",
            }
        )
        if done.returncode:
            if not line.startswith("deploykit"):
                print(done.stdout, done.stderr, sep="", file=sys.stderr)
            break
    return steps


def _kept(said: str, place: Path) -> str:
    """The end of what a step of ours said, without the folder that only this run had; what pip says is of the machine."""
    return said.replace(str(place), "")[-4000:]


if __name__ == "__main__":
    main()
