"""The device half: install, build, parity, activate and back, each refused until it is right, all answers as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from test_bundle import RECIPE, allowed, expect_wrong_answers, ssh_key, tiny_run

from deploykit import agent, artifact, engines, infer, rebuild, runtimes, slots
from deploykit.artifact import Samples
from deploykit.bundle import device_half, pack
from deploykit.errors import UsageError
from deploykit.gate import GateResult, Verdict
from deploykit.slots import Moment

NO_GATE = RECIPE.replace('gate = ["latency <= 500 ms"]', "gate = []")
PIXELS = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)


def packed(folder: Path, *, release: int, op: str = "Add", recipe: str = NO_GATE, key: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    run = tiny_run(folder / f"run-{op}-{release}-{key is None}", op=op, recipe=recipe)
    return pack.pack(run, folder / f"{run.name}.bundle", release=release, key=key).path


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Release 1 adds, release 2 multiplies."""
    folder = tmp_path_factory.mktemp("bundles")
    return {"adds": packed(folder, release=1), "multiplies": packed(folder, release=2, op="Mul")}


@pytest.fixture
def device(tmp_path, capsys) -> Callable[..., tuple[int, dict[str, Any]]]:
    """A command of the device half on the root of this test: its exit code and its answer."""

    def run(verb: str, *words: object) -> tuple[int, dict[str, Any]]:
        place = [] if verb in ("probe", "verify") else ["--root", str(tmp_path / "device")]
        code = agent.run([verb, *map(str, words), *place])
        said = json.loads(capsys.readouterr().out)
        assert said["exit_code"] == code
        return code, said

    return run


@pytest.fixture
def deploy(device) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Everything up to `activate`, whose answer it gives."""

    def run(bundle: Path, *words: object) -> tuple[int, dict[str, Any]]:
        code, said = device("install", bundle, *[word for word in words if word == "--allow-downgrade"])
        assert code == 0, said
        device("build", said["id"])
        device("parity", said["id"])
        return device("activate", said["id"], *words)

    return run


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "device"


def change_checked(root: Path, id: str, **parts: Any) -> None:
    """Say something else of the only engine of a release."""
    health = slots.read_health(root, id)
    ((name, found),) = health.checked.items()
    slots.write_health(root, id, replace(health, checked={name: {**found, **parts}}))


def content(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in root.rglob("*")
        if path.name != ".lock"
    }


class TestDeploying:
    def test_a_bundle_becomes_the_current_release_and_answers(self, deploy, device, bundles, root, tmp_path):
        np.save(tmp_path / "pixels.npy", PIXELS)

        code, said = deploy(bundles["adds"])

        assert (code, said["activated"], said["previous"]) == (0, True, None)
        assert said["latency"] == "the bundle has no latency budget, so none was checked"
        assert device("status")[1]["current"] == said["id"] == slots.current(root)
        assert device("infer", tmp_path / "pixels.npy")[1]["answer"] == (2 * PIXELS).tolist()
        with pytest.raises(UsageError, match="there is no file"):
            infer.read_input(tmp_path / "nothing.png", artifact.read_artifact(next((root / "engines").glob("*/*"))))

    def test_logits_are_told_as_classes_best_first(self, device, root, tmp_path, monkeypatch):
        classes = type("Engine", (), {"classes": ("cat", "dog", "eel")})
        opened = infer.Opened(
            "a" * 64, classes, type("Session", (), {"close": lambda self: None})(), os.open(tmp_path, os.O_RDONLY)
        )
        monkeypatch.setattr(infer, "open_current", lambda root: opened)
        monkeypatch.setattr(infer, "read_input", lambda file, engine: None)
        monkeypatch.setattr(infer, "answer", lambda opened, array: np.array([0.0, 2.0, 1.0]))

        (best,) = device("infer", "x.npy")[1]["top"]

        assert [found["class"] for found in best] == ["dog", "eel", "cat"]

    def test_deploying_the_same_again_does_nothing(self, deploy, bundles, root):
        deploy(bundles["adds"])
        before = content(root)

        code, said = deploy(bundles["adds"])

        assert (code, said["activated"]) == (0, False)
        assert content(root) == before

    def test_nothing_becomes_current_before_it_was_checked_here(self, device, bundles):
        _, said = device("install", bundles["adds"])

        assert device("activate", said["id"])[1]["error"]["fix"] == "run build and parity first"
        assert device("parity", said["id"])[1]["error"]["fix"] == "run build first"
        assert device("status")[1]["current"] is None

    def test_a_release_that_fails_parity_never_becomes_current(self, deploy, device, bundles, tmp_path):
        run = tiny_run(tmp_path / "run", op="Add", recipe=NO_GATE)
        expect_wrong_answers(run)
        bad = pack.pack(run, tmp_path / "bad.bundle", release=9).path
        _, good = deploy(bundles["adds"])

        code, said = deploy(bad)

        assert (code, said["activated"]) == (3, False)
        assert said["refused"]["parity"]["verdict"] == "fail"
        assert device("status")[1]["current"] == good["id"]

    @pytest.mark.parametrize(("verdict", "code"), [("fail", 3), ("cannot tell", 5), ("pass", 0)])
    def test_a_latency_budget_has_to_be_measured_and_kept(self, device, deploy, root, tmp_path, verdict, code):
        bundle = packed(tmp_path, release=1, recipe=RECIPE)

        refused, said = deploy(bundle)
        assert (refused, said["error"]["fix"]) == (2, "run benchmark first")
        id = device("install", bundle)[1]["id"]
        change_checked(root, id, latency={"verdict": verdict})

        assert device("activate", id)[0] == code
        assert slots.current(root) == (id if code == 0 else None)

    def test_a_lower_release_number_is_refused_unless_that_is_meant(self, deploy, device, bundles):
        deploy(bundles["multiplies"])

        code, said = device("install", bundles["adds"])
        assert (code, said["error"]["why"]) == (2, "it is release 1, and release 2 runs here")
        code, said = deploy(bundles["adds"], "--allow-downgrade")

        assert (code, said["activated"]) == (0, True)
        assert device("status")[1]["log"][0].startswith("downgrade to release 1")

    def test_the_same_release_under_a_higher_number_is_that_number_from_then_on(self, deploy, device, bundles, root, tmp_path):
        _, first = deploy(bundles["adds"])
        deploy(bundles["multiplies"])
        again = packed(tmp_path, release=3)

        code, said = deploy(again)

        assert (code, said["id"], said["activated"]) == (0, first["id"], True)
        assert device("status")[1]["release_numbers"][first["id"]] == 3
        assert device("status")[1]["log"] == []
        before = content(root)
        device("install", again)
        assert content(root) == before
        assert device("install", bundles["multiplies"])[1]["error"]["why"] == "it is release 2, and release 3 runs here"

    def test_signers_in_the_root_are_asked_for_every_time(self, device, bundles, root, tmp_path):
        key = ssh_key(tmp_path / "key")
        root.mkdir()
        shutil.copy(allowed(key), root / "allowed_signers")

        code, said = device("install", bundles["adds"])

        assert (code, "is not signed" in said["error"]["what"]) == (2, True)
        assert [path.name for path in root.iterdir()] == ["allowed_signers"]
        assert device("install", packed(tmp_path, release=1, key=key))[0] == 0

    def test_a_list_of_signers_that_leads_nowhere_lets_nobody_in(self, device, bundles, root):
        root.mkdir()
        (root / "allowed_signers").symlink_to("/nonexistent/signers")

        code, said = device("install", bundles["adds"])

        assert (code, "is not signed" in said["error"]["what"]) == (2, True)

    def test_another_network_is_refused(self, deploy, device, bundles, tmp_path):
        deploy(bundles["adds"])

        code, said = device("install", packed(tmp_path, release=5, recipe=NO_GATE.replace("tiny", "other")))

        assert (code, said["error"]["why"]) == (2, "the bundle is of other")

    def test_a_full_disk_is_noticed_before_anything_is_written(self, device, bundles, root, monkeypatch):
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))

        code, said = device("install", bundles["adds"])

        assert (code, "0 MB are free" in said["error"]["why"]) == (1, True)
        assert not root.exists()


class TestDamage:
    def test_a_release_that_was_changed_on_the_device_is_refused_by_name(self, deploy, device, bundles, root):
        _, said = deploy(bundles["adds"])
        folder = root / "releases" / said["id"]
        (folder / "classes.json").write_text("[]")

        code, said = device("build", said["id"])

        assert (code, said["error"]["problems"]) == (2, ["classes.json"])

    def test_an_engine_that_was_changed_is_refused(self, device, bundles, root):
        id = device("install", bundles["adds"])[1]["id"]
        device("build", id)
        device("parity", id)
        engine = next((root / "engines" / id).glob("*/engine.onnx"))
        engine.write_bytes(engine.read_bytes() + b"\0")

        code, said = device("activate", id)

        assert (code, "is not the file that was published" in said["error"]["what"]) == (2, True)
        assert slots.current(root) is None

    def test_another_engine_than_the_one_that_was_checked_is_refused(self, device, bundles, root):
        id = device("install", bundles["adds"])[1]["id"]
        device("build", id)
        device("parity", id)
        change_checked(root, id, identity="0" * 64)

        assert device("activate", id)[1]["error"]["fix"] == "run parity again"

    def test_golden_samples_that_are_pickles_are_refused_and_not_opened(self, device, tmp_path):
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "marker",)

        run = tiny_run(tmp_path / "run", recipe=NO_GATE)
        made = artifact.read_artifact(run / "export-onnx")
        pickled = np.array([Evil()], object)
        np.savez(
            made.folder / "samples.npz", **{"inputs/image": pickled, "expected/logits": pickled, "reference/logits": pickled}
        )
        artifact.write_manifest(made.folder, made)
        id = device("install", pack.pack(run, tmp_path / "evil.bundle", release=1).path)[1]["id"]
        device("build", id)

        code, said = device("parity", id)

        assert (code, "cannot be used" in said["error"]["what"]) == (2, True)
        assert not (tmp_path / "marker").exists()


class TestSeveralEngines:
    @pytest.fixture
    def engines(self, deploy, device, bundles, root) -> tuple[str, str, str]:
        """The current release, the engine it runs with, and another one that answers wrong."""
        id = deploy(bundles["adds"])[1]["id"]
        one = slots.read_health(root, id).running.engine
        other = device("build", id, "--threads", "1")[1]["engine"]
        made = artifact.read_artifact(root / "engines" / id / other)
        golden = made.samples()
        wrong = {"logits": golden.expected["logits"] + 1}
        Samples(golden.inputs, wrong, wrong).save(made.folder / "samples.npz")
        artifact.write_manifest(made.folder, made)
        return id, one, other

    def test_one_that_fails_does_not_take_the_place_of_the_one_that_runs(self, device, engines, root):
        id, one, other = engines

        assert device("parity", id, "--engine", other)[0] == 3

        assert set(slots.read_health(root, id).checked) == {one, other}
        opened = infer.open_current(root)
        opened.close()
        assert opened.engine.folder.name == one
        assert device("activate", id, "--engine", other)[0] == 3
        assert slots.read_health(root, id).running.engine == one

    def test_one_that_passes_runs_once_it_is_activated_and_not_before(self, device, engines, root):
        id, one, other = engines
        made = artifact.read_artifact(root / "engines" / id / other)
        shutil.copyfile(root / "engines" / id / one / "samples.npz", made.folder / "samples.npz")
        artifact.write_manifest(made.folder, made)

        assert device("parity", id, "--engine", other)[0] == 0
        assert slots.read_health(root, id).running.engine == one
        refused = device("activate", id, "--engine", other, "--confirm-within", "60")[1]
        assert refused["error"]["fix"] == "leave --confirm-within out"
        _, said = device("activate", id, "--engine", other)

        assert (said["activated"], said["previous"]) == (True, None)
        assert slots.read_health(root, id).running.engine == other
        assert device("activate", id)[1]["activated"] is False

    @pytest.mark.parametrize("verdicts", [{}, {"parity": Verdict.FAIL}, {"parity": Verdict.PASS, "latency": Verdict.CANNOT_TELL}])
    def test_one_that_did_not_pass_is_not_opened_whatever_is_written_down(self, engines, root, verdicts):
        id, _, _ = engines
        health = slots.read_health(root, id)
        slots.write_health(root, id, replace(health, running=replace(health.running, verdicts=verdicts)))

        with pytest.raises(UsageError, match="has no engine that passed here"):
            infer.open_current(root)

    def test_one_that_was_built_anew_since_is_not_opened(self, engines, root):
        id, _, other = engines
        health = slots.read_health(root, id)
        slots.write_health(root, id, replace(health, running=replace(health.running, engine=other)))

        with pytest.raises(UsageError, match="it is another one than was activated"):
            infer.open_current(root)

    def test_what_is_said_of_it_later_does_not_stop_what_runs(self, deploy, bundles, root):
        id = deploy(bundles["adds"])[1]["id"]

        change_checked(root, id, latency={"verdict": "cannot tell"})

        infer.open_current(root).close()


class TestGoingBack:
    def test_the_previous_release_answers_again(self, deploy, device, bundles):
        _, first = deploy(bundles["adds"])
        _, second = deploy(bundles["multiplies"])

        code, said = device("rollback")

        assert (code, said["current"], said["left"]) == (0, first["id"], second["id"])
        assert device("collect-garbage")[1]["removed"] == [second["id"]]

    def test_a_release_on_trial_goes_back_after_the_next_start(self, deploy, device, bundles, root, monkeypatch):
        _, first = deploy(bundles["adds"])
        _, second = deploy(bundles["multiplies"], "--confirm-within", "600")
        assert device("status")[1]["trial"]["id"] == second["id"]

        now = Moment.now()
        monkeypatch.setattr(Moment, "now", lambda: Moment("the next boot", now.seconds))
        _, said = device("recover")

        assert said["current"] == first["id"]

    def test_a_confirmed_one_stays(self, deploy, device, bundles):
        deploy(bundles["adds"])
        _, second = deploy(bundles["multiplies"], "--confirm-within", "600")

        assert device("confirm")[1] == {"confirmed": True, "current": second["id"], "recovered": [], "exit_code": 0}
        assert device("status")[1]["trial"] is None

    def test_confirming_nothing_or_another_one_is_no_success(self, deploy, device, bundles, monkeypatch):
        _, first = deploy(bundles["adds"])
        assert device("confirm")[0] == 1
        _, second = deploy(bundles["multiplies"], "--confirm-within", "600")

        code, said = device("confirm", first["id"])
        assert (code, said["error"]["why"]) == (2, f"the release {second['id']} is")
        now = Moment.now()
        monkeypatch.setattr(Moment, "now", lambda: Moment("the next boot", now.seconds))
        code, said = device("confirm", second["id"])

        assert (code, said["confirmed"], said["current"]) == (1, False, first["id"])
        assert said["recovered"] == [f"went back from {second['id']}, which was not confirmed"]

    def test_while_one_is_on_trial_no_other_one_is_activated(self, deploy, device, bundles, tmp_path):
        _, first = deploy(bundles["adds"])
        _, second = deploy(bundles["multiplies"], "--confirm-within", "600")

        _, third = device("install", packed(tmp_path, release=3, op="Sub"))
        for verb in ("build", "activate"):
            code, said = device(verb, third["id"])
            assert (code, said["error"]["what"]) == (2, f"the release {second['id']} is on trial")
        assert [device("status")[1][name] for name in ("current", "previous")] == [second["id"], first["id"]]


class TestAfterAnUpdateOfTheDevice:
    """The runtime is another version than the engine was built by: the former one is pretended."""

    @pytest.fixture
    def before(self, deploy, device, root, monkeypatch) -> Callable[..., str]:
        """The release of a bundle, deployed before the update; its latency budget counts as kept."""

        def run(bundle: Path, *words: object) -> str:
            with monkeypatch.context() as former:
                former.setattr(onnxruntime, "__version__", "1.0")
                former.setattr(runtimes, "installed_version", lambda package: "1.0")
                code, said = deploy(bundle, *words)
                if code == 2:
                    id = device("install", bundle)[1]["id"]
                    change_checked(root, id, latency={"verdict": "pass", "processes": 2, "queries": 3})
                    code, said = device("activate", id)
            assert code == 0, said
            return str(said["id"])

        return run

    def test_load_and_status_say_what_to_run_and_that_builds_the_engine_again(self, before, device, bundles, root, tmp_path):
        id = before(bundles["adds"])
        old = slots.read_health(root, id).running.engine
        np.save(tmp_path / "pixels.npy", PIXELS)

        code, said = device("infer", tmp_path / "pixels.npy")
        assert code == 2
        assert said["error"]["why"].startswith("rebuild needed because it was built by onnxruntime 1.0, and ")
        assert said["error"]["fix"] == f"run `python3 {root}/current/device.pyz recover --rebuild --root {root}`"
        assert device("status")[1]["engines"][id] == f"{said['error']['why']}; {said['error']['fix']}"
        assert device("recover")[1] == {"done": [], "current": id, "exit_code": 0}
        code, said = device("recover", "--rebuild")

        assert code == 0
        (rebuilt,) = said["rebuilt"]
        assert (rebuilt["id"], rebuilt["left"], rebuilt["built"], rebuilt["activated"]) == (id, old, True, True)
        assert rebuilt["engine"] == slots.read_health(root, id).running.engine != old
        assert device("status")[1]["engines"] == {id: "loads here"}
        assert device("infer", tmp_path / "pixels.npy")[1]["answer"] == (2 * PIXELS).tolist()

    def test_where_every_engine_loads_nothing_is_done(self, before, device, bundles, root):
        before(bundles["adds"])
        device("recover", "--rebuild")
        after = content(root)

        assert device("recover", "--rebuild")[1]["rebuilt"] == []

        assert content(root) == after

    def test_the_way_back_is_built_again_too(self, before, device, bundles, root, tmp_path):
        first, second = before(bundles["adds"]), before(bundles["multiplies"])
        np.save(tmp_path / "pixels.npy", PIXELS)

        assert [rebuilt["id"] for rebuilt in device("recover", "--rebuild")[1]["rebuilt"]] == [second, first]

        assert device("infer", tmp_path / "pixels.npy")[1]["answer"] == (PIXELS * PIXELS).tolist()
        device("rollback")
        assert device("infer", tmp_path / "pixels.npy")[1]["answer"] == (2 * PIXELS).tolist()

    def test_deploying_the_same_again_builds_it_again(self, before, deploy, bundles, root):
        id = before(bundles["adds"])

        assert deploy(bundles["adds"])[1]["activated"] is True

        infer.open_current(root).close()
        assert slots.current(root) == id

    def test_an_engine_that_answers_wrong_does_not_run(self, before, device, bundles, root, monkeypatch):
        id = before(bundles["adds"])
        other = device("install", bundles["multiplies"])[1]["id"]
        wrong = artifact.read_artifact(root / "releases" / other / "models" / "onnxruntime-fp32")
        build = rebuild.builder.build
        monkeypatch.setattr(rebuild.builder, "build", lambda model, *words, **more: build(wrong, *words, **more))
        golden = root / "releases" / id / "models" / "onnxruntime-fp32" / "samples.npz"
        monkeypatch.setattr(build.__globals__["shutil"], "copyfile", lambda source, to: Path(to).write_bytes(golden.read_bytes()))
        old = slots.read_health(root, id).running

        code, said = device("recover", "--rebuild")

        assert (code, said["rebuilt"][0]["parity"]["verdict"], said["rebuilt"][0]["activated"]) == (3, "fail", False)
        assert slots.read_health(root, id).running == old
        assert device("recover", "--rebuild")[1]["rebuilt"][0]["built"] is False

    @pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 3), ("cannot tell", 5)])
    def test_a_latency_budget_has_to_be_kept_again_measured_as_before(
        self, before, device, root, tmp_path, monkeypatch, verdict, code
    ):
        id = before(packed(tmp_path, release=1, recipe=RECIPE))
        asked: list[dict[str, Any]] = []
        report = SimpleNamespace(engine=lambda label: SimpleNamespace(median_ns=1.0), doubts=[])
        monkeypatch.setattr(engines.benchmark, "benchmark", lambda found, **settings: asked.append(settings) or report)
        judged = GateResult("latency <= 500 ms", Verdict(verdict), None, None, "")
        monkeypatch.setattr(engines.latency_judge, "judge", lambda rule, report, label: judged)

        found, said = device("recover", "--rebuild")

        assert (found, said["rebuilt"][0]["activated"]) == (code, code == 0)
        assert said["rebuilt"][0]["latency"]["verdict"] == verdict
        assert (asked[0]["processes"], asked[0]["queries"]) == (2, 3)
        assert (device("status")[1]["engines"][id] == "loads here") is (code == 0)

    def test_while_a_release_is_on_trial_nothing_is_built(self, before, device, bundles):
        before(bundles["adds"])
        id = before(bundles["multiplies"], "--confirm-within", "600")

        code, said = device("recover", "--rebuild")

        assert (code, said["error"]["what"]) == (2, f"the release {id} is on trial")
        device("confirm")
        assert device("recover", "--rebuild")[0] == 0

    def test_a_runtime_that_is_gone_is_named_with_what_to_install(self, before, device, bundles, tmp_path, monkeypatch):
        id = before(bundles["adds"])
        monkeypatch.setitem(sys.modules, "deploykit.runtimes.onnxruntime", None)

        assert device("infer", tmp_path / "pixels.npy")[1]["error"]["fix"] == runtimes.REGISTRY["onnxruntime"].install
        assert device("recover", "--rebuild")[0] == 4
        assert "no onnxruntime here" in device("status")[1]["engines"][id]

    def test_whatever_a_power_cut_leaves_of_it_it_ends_the_same(self, before, device, bundles, root, tmp_path, monkeypatch):
        """The root is copied in front of every call that gives a name or syncs: that is what a kill there leaves."""
        id = before(bundles["adds"])
        kept: list[Path] = []

        def keeping(call: Callable[..., Any]) -> Callable[..., Any]:
            def copy_first(*words: Any) -> Any:
                kept.append(shutil.copytree(root, tmp_path / f"cut {len(kept)}", symlinks=True))
                return call(*words)

            return copy_first

        with monkeypatch.context() as cutting:
            cutting.setattr(Path, "rename", keeping(Path.rename))
            cutting.setattr(os, "fsync", keeping(os.fsync))
            assert device("recover", "--rebuild")[0] == 0
        outcomes = []
        for cut in kept:
            running = slots.read_health(cut, id).running
            shutil.rmtree(root)
            cut.rename(root)
            outcomes.append(device("status")[1]["engines"][id] == "loads here")
            assert slots.read_health(root, id).running == running
            assert device("recover", "--rebuild")[0] == 0
            np.testing.assert_array_equal(infer.load(root / "current")(PIXELS), 2 * PIXELS)
            assert [path for path in root.rglob("*") if path.name.endswith((".partial", ".stale"))] == []

        assert len(kept) > 10
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {False, True}


class TestTheRuntime:
    def test_a_program_follows_every_switch_and_its_release_is_not_collected(self, deploy, device, bundles, root):
        deploy(bundles["adds"])
        net = infer.load(root / "current")
        try:
            np.testing.assert_array_equal(net(PIXELS), PIXELS + PIXELS)
            deploy(bundles["multiplies"])
            np.testing.assert_array_equal(net(PIXELS), PIXELS * PIXELS)
            device("rollback")
            assert device("collect-garbage")[1]["removed"] == []  # the program has not called since
            np.testing.assert_array_equal(net(np.stack([PIXELS] * 2)), np.stack([PIXELS + PIXELS] * 2))
            assert net.classes == ("cat", "dog")
            assert len(device("collect-garbage")[1]["removed"]) == 1
        finally:
            net.close()

    def test_what_the_system_refuses_is_an_answer_too(self, device, monkeypatch):
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "/opt/file")

        monkeypatch.setattr(slots, "status", refuse)

        code, said = device("status")

        assert (code, said["error"]) == (1, {"what": "the operating system refuses: /opt/file", "why": "Permission denied"})

    def test_what_does_not_fit_is_refused(self, deploy, bundles, root):
        deploy(bundles["adds"])
        net = infer.load(root / "current")

        with pytest.raises(UsageError, match="is float64, the model takes float32"):
            net(PIXELS.astype(np.float64))
        with pytest.raises(UsageError, match="is not the link of a current release"):
            infer.load(root)
        for strange in (np.float32(1), np.array(1, np.float32), np.ones(2, np.float32), np.ones((1, 1, 1, 2, 2), np.float32)):
            with pytest.raises(UsageError, match="is no input of this network"):
                net(strange)
        with pytest.raises(UsageError, match="a list is no input of this network"):
            net(PIXELS.tolist())
        with pytest.raises(UsageError, match="the batch is empty"):
            net(PIXELS[None][:0])
        net.close()

    def test_a_file_that_is_no_array_is_an_answer_with_the_reason(self, deploy, device, bundles, tmp_path):
        deploy(bundles["adds"])
        path = tmp_path / "x.npy"
        with path.open("wb") as file:
            np.savez(file, PIXELS)

        code, said = device("infer", path)
        assert (code, "is no numpy array" in said["error"]["what"]) == (2, True)
        np.save(path, np.array(1, np.float32))
        code, said = device("infer", path)

        assert (code, said["error"]["why"]) == (2, "one input has 3 dimensions, a batch 4")

    def test_health_that_lacks_a_part_is_an_answer_with_what_to_do(self, deploy, device, bundles, root, tmp_path):
        id = deploy(bundles["adds"])[1]["id"]
        path = root / "health" / f"{id}.json"
        value = json.loads(path.read_text())
        for engine in value["checked"].values():
            del engine["precision"]
        path.write_text(json.dumps(value))

        for words in (["parity", id], ["benchmark", id], ["infer", tmp_path / "x.npy"]):
            code, said = device(*words)
            assert (code, said["error"]["fix"]) == (2, "remove it, then run parity and activate again")

    def test_without_a_release_there_is_nothing_to_load(self, tmp_path):
        with pytest.raises(UsageError, match="has no current release"):
            infer.load(tmp_path / "current")

    def test_the_zipapp_is_all_that_a_program_needs(self, deploy, bundles, root, tmp_path):
        deploy(bundles["adds"])
        script = """
import sys
sys.path.insert(0, f"{sys.argv[1]}/current/device.pyz")
import numpy
from deploykit_device import load
net = load(f"{sys.argv[1]}/current")
print(net(numpy.ones((1, 2, 2), numpy.float32)).tolist(), net.release)
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(root)], capture_output=True, text=True, cwd=tmp_path, check=False
        )

        assert done.stdout == f"[[[2.0, 2.0], [2.0, 2.0]]] {slots.current(root)}\n", done.stderr


class TestTheZipappOnItsOwn:
    def test_it_measures_in_fresh_processes_of_itself(self, bundles, tmp_path):
        app, root = tmp_path / "device.pyz", tmp_path / "root"
        app.write_bytes(device_half.zipapp())

        def run(*words: object) -> dict[str, Any]:
            command = [sys.executable, str(app), *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        id = run("install", bundles["adds"], "--root", root)["id"]
        run("build", id, "--root", root)
        run("parity", id, "--root", root)
        measured = run("benchmark", id, "--root", root, "--processes", 1, "--queries", 3)

        assert measured["latency"]["median_ns"] > 0
        assert run("probe")["runtimes"]["onnxruntime"] == "loads"

    def test_probe_imports_runtimes_and_nothing_that_knows_of_releases(self, tmp_path):
        (tmp_path / "device.pyz").write_bytes(device_half.zipapp())
        script = """
import sys
sys.path.insert(0, sys.argv[1])
from deploykit import agent
code = agent.run(["probe"])
print(code, *sorted(name for name in sys.modules if name.partition(".")[0] == "deploykit"), file=sys.stderr)
"""
        command = [sys.executable, "-c", script, str(tmp_path / "device.pyz")]

        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        code, *names = done.stderr.replace("deploykit.", "").split()

        assert (code, json.loads(done.stdout)["runtimes"]["onnxruntime"]) == ("0", "loads")
        floor = {"deploykit", *("errors", "jsonable", "machine", "publish", "artifact", "progress")}
        assert {name for name in names if name.partition(".")[0] not in ("agent", "runtimes")} <= floor
        assert "agent.commands" not in names


@pytest.mark.parametrize("span", ["nan", "-1", "inf", "soon"])
def test_a_trial_that_could_never_end_is_refused(device, span):
    with pytest.raises(SystemExit, match="2"):
        device("activate", 64 * "0", f"--confirm-within={span}")
