"""Every attack is refused for what it is, in time, with nothing touched: markers, other files, left-overs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import Outcome

from attacks.generate import Attack, Door, everything
from deploykit import data, foreign, recipe
from deploykit.artifact import Preprocess
from deploykit.errors import DeploykitError, printable
from deploykit.models.checkpoint import load_state_dict

ATTACKS = list(everything())
SMALL = Preprocess(8, (8, 8), (0.5,) * 3, (0.5,) * 3)
DOORS: Mapping[Door, Callable[[Path], object]] = {
    "checkpoint": load_state_dict,
    "graph": foreign.onnx_file,
    "picture": lambda path: data.folder(path, labelled=False).checked(SMALL),
    "classes": lambda path: data.folder(path, classes=("ant", "bee"), labelled=True),
    "recipe": recipe.load,
}
# Each ends within the start-up of a process, which is a second or two, and 5 s: CPU time, which a busy machine does not change.
LONGEST_S = 7
# By real command lines: some of every class.
COMMANDS = {
    "checkpoint-system-in-archive": ("export", "resnet18", "--to", "onnx", "--weights", "FILE"),
    "checkpoint-kind-pipe": ("export", "resnet18", "--to", "onnx", "--weights", "FILE"),
    "checkpoint-system-in-older-format": ("inspect", "FILE"),
    "checkpoint-archive-compressed-bomb": ("inspect", "FILE"),
    "checkpoint-kind-exported-program-renamed": ("inspect", "FILE"),
    "checkpoint-safetensors-overlap": ("inspect", "FILE"),
    "graph-bomb-Range": ("parity", "FILE", "resnet18"),
    "graph-external-hard-link": ("bisect", "theirs.onnx", "FILE"),
    "graph-operator-loop-for-ever": ("inspect", "FILE"),
    "picture-bomb-png-20000": ("export", "lenet5_rgb", "--to", "onnx", "--weights", "none", "--calibrate", "FILE"),
    "picture-pipe": ("export", "lenet5_rgb", "--to", "onnx", "--weights", "none", "--calibrate", "FILE"),
    "recipe-nested": ("run", "FILE"),
    "recipe-yaml-tag": ("run", "FILE"),
    "checkpoint-called-shell-dollar": ("export", "resnet18", "--to", "onnx", "--weights", "FILE"),
    "graph-called-not-utf8": ("inspect", "FILE"),
    "graph-called-line-break": ("parity", "FILE", "resnet18"),
    "graph-function-times-50-to-the-8th": ("inspect", "--rules", "tensorrt", "FILE"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the attack. Home and temporary files have to look afterwards as they did before."""
    outside = tmp_path / "outside"
    for name in ("home", "tmp"):
        (outside / name).mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (outside / "home" / "thesis.txt").write_text("years of work")
    monkeypatch.setenv("TMPDIR", str(outside / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("HOME", str(outside / "home"))
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / "attacked" / "inside"
    folder.mkdir(parents=True)
    before = _seen(outside)
    yield folder
    assert _seen(outside) == before


def _seen(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def _cpu_s() -> float:
    """Of this process and of all that it has started and waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _named(name: str) -> Attack:
    (found,) = [attack for attack in ATTACKS if attack.name == name]
    return found


def test_there_are_at_least_350_attacks_and_no_two_of_one_name():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 350


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused_for_what_it_is(attack: Attack, place: Path) -> None:
    marker = place / "marker"
    path = attack.make(place, marker)
    before = sorted(place.rglob("*"))
    start = _cpu_s()

    with pytest.raises(DeploykitError) as refused:
        DOORS[attack.door](path)

    assert _cpu_s() - start < LONGEST_S
    assert re.search(attack.told, str(refused.value)), refused.value
    assert printable(path) in str(refused.value)
    assert all(letter.isprintable() for line in str(refused.value).splitlines() for letter in line)
    assert not marker.exists()
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_an_attack_is_refused_by_the_command_line(name: str, place: Path, shell: Callable[..., Outcome]) -> None:
    attack = _named(name)
    path = attack.make(place, place / "marker")

    outcome = shell(*(path if word == "FILE" else word for word in COMMANDS[name]))

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert re.search(attack.told, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert not (place / "marker").exists()


@pytest.mark.parametrize("name", ["checkpoint-system-in-archive", "checkpoint-tensor-beyond-its-storage"])
def test_an_attack_through_a_link_with_an_honest_name_is_refused_too(name: str, place: Path) -> None:
    attack = _named(name)
    (place / "inner").mkdir()
    (place / "best.pth").symlink_to(attack.make(place / "inner", place / "marker"))

    with pytest.raises(DeploykitError, match=attack.told):
        load_state_dict(place / "best.pth")

    assert not (place / "marker").exists()
