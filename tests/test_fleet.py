"""Fleets: canaries first, several at a time, a stop after failures, and going on where a roll-out was interrupted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_agent import packed

from deploykit import fleet
from deploykit.deploy import Deployed, How
from deploykit.errors import LineError, StageError, UsageError
from deploykit.fleet import Fleet, Member, Outcome


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return [packed(folder, release=1), packed(folder, release=2, op="Mul")]


def of(count: int, *, canary: float = 0.0, parallel: int = 3, stop_after: int = 1, groups: int = 1) -> Fleet:
    members = [Member(f"d{number}", f"g{number % groups}", f"ssh://d{number}", How()) for number in range(count)]
    return Fleet(tuple(members), {f"g{number}": canary for number in range(groups)}, parallel, stop_after)


ON_TRIAL = {"activate": {"activated": True, "confirm_within_s": 30.0}}
STILL_ON_TRIAL = {"activate": {"activated": False, "trial": {"id": "a" * 64, "seconds_left": 12.0}}}


def done(member: Member, **more: Any) -> Deployed:
    facts = {
        "device": member.address,
        "root": "/",
        "id": "a" * 64,
        "release": 1,
        "stage": "activate",
        "code": 0,
        "activated": True,
    }
    facts |= {"sent_bytes": 5, "sent_blobs": 1, "total_bytes": 10, "blobs": 2, "commands": 9, "attempts": 1, "seconds": 1.0}
    return Deployed(**{**facts, **more})


class Devices:
    """Devices that count who is deployed to, fail as told, and answer alike."""

    def __init__(self, failing: Callable[[str], bool] = lambda name: False, answers: Mapping[str, Any] | None = None) -> None:
        self.failing, self.asked, self.most, self._now, self._answers = failing, [], 0, 0, answers or {}
        self._lock = threading.Lock()

    def __call__(self, member: Member) -> Deployed:
        with self._lock:
            self.asked.append(member.name)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            if self.failing(member.name):
                raise LineError(f"{member.name} is not there")
            return done(member, answers=self._answers)
        finally:
            with self._lock:
                self._now -= 1


class TestARollOut:
    def test_reaches_every_device_and_writes_a_page_and_junit(self, bundles, tmp_path):
        shown: list[dict[str, str]] = []

        def show(rows: dict[str, fleet.Row]) -> None:
            shown.append({name: row.outcome.value for name, row in rows.items()})

        rolled = fleet.roll_out(bundles[0], of(5), tmp_path, owner="me", deploy_one=Devices(), show=show)

        assert (rolled.counts, rolled.code, rolled.why_stopped) == ({"done": 5}, 0, "")
        assert "5 of 5 devices" in (tmp_path / "rollout.html").read_text()
        assert len(ElementTree.parse(tmp_path / "junit.xml").findall(".//testcase")) == 5
        assert shown[0]["d0"] == "running"
        assert set(shown[-1].values()) == {"done"}

    def test_stops_at_a_canary_that_fails_and_the_others_keep_what_they_run(self, bundles, tmp_path):
        devices = Devices(lambda name: name == "d1")

        rolled = fleet.roll_out(bundles[0], of(10, canary=0.2, stop_after=9), tmp_path, owner="me", deploy_one=devices)

        assert set(devices.asked) == {"d0", "d1"}
        assert rolled.why_stopped == "stopped: the canary d1 failed"
        assert rolled.counts == {"waiting": 8, "done": 1, "failed": 1}
        assert rolled.code == 1
        assert "d1 is not there" in (tmp_path / "rollout.html").read_text()
        cases = ElementTree.parse(tmp_path / "junit.xml")
        assert (len(cases.findall(".//failure")), len(cases.findall(".//skipped"))) == (1, 8)

    def test_stops_after_so_many_failures(self, bundles, tmp_path):
        devices = Devices(lambda name: True)

        rolled = fleet.roll_out(bundles[0], of(20, parallel=1, stop_after=3), tmp_path, owner="me", deploy_one=devices)

        assert (devices.asked, rolled.why_stopped) == (["d0", "d1", "d2"], "stopped: 3 failed")

    def test_a_gate_that_says_no_is_a_failure_with_its_exit_code(self, bundles, tmp_path):
        rolled = fleet.roll_out(
            bundles[0], of(1), tmp_path, owner="me", deploy_one=lambda member: done(member, code=3, stage="parity")
        )

        assert (rolled.code, rolled.rows["d0"].text) == (3, "did not pass parity")

    def test_goes_on_with_those_that_are_not_done(self, bundles, tmp_path):
        fleet.roll_out(bundles[0], of(6, parallel=1), tmp_path, owner="me", deploy_one=Devices(lambda name: name == "d3"))
        again = Devices()

        rolled = fleet.roll_out(bundles[0], of(6), tmp_path, owner="me", deploy_one=again)

        assert set(again.asked) == {"d3", "d4", "d5"}
        assert rolled.counts == {"done": 6}

    def test_that_was_killed_counts_devices_in_the_middle_as_not_done(self, bundles, tmp_path):
        class Killed(BaseException):
            pass

        def show(rows: dict[str, fleet.Row]) -> None:
            if rows["d1"].outcome is Outcome.RUNNING:
                raise Killed

        with pytest.raises(Killed):
            fleet.roll_out(bundles[0], of(3, parallel=1), tmp_path, owner="me", deploy_one=Devices(), show=show)
        assert "interrupted: Killed" in (tmp_path / "rollout.html").read_text()
        again = Devices()

        fleet.roll_out(bundles[0], of(3, parallel=1), tmp_path, owner="me", deploy_one=again)

        assert again.asked == ["d1", "d2"]

    def test_with_releases_on_trial_starts_the_others_when_the_canary_is_confirmed(self, bundles, tmp_path):
        devices, confirmed, rows = Devices(answers=ON_TRIAL), [], []

        def confirm(member: Member, deployed: Deployed) -> None:
            assert set(devices.asked) <= {"d0"} or "d0" in confirmed
            confirmed.append(member.name)

        rolled = fleet.roll_out(
            bundles[0],
            of(4, canary=0.25),
            tmp_path,
            owner="me",
            deploy_one=devices,
            confirm_one=confirm,
            show=lambda now: rows.append(now["d0"].text),
        )

        assert sorted(confirmed) == ["d0", "d1", "d2", "d3"]
        assert rolled.counts == {"done": 4}
        assert list(dict.fromkeys(rows)) == ["deploying", "on trial", f"runs {'a' * 12}, 5 bytes sent, confirmed"]

    @pytest.mark.parametrize("answers", [ON_TRIAL, STILL_ON_TRIAL], ids=["put on trial", "found on trial"])
    def test_stops_at_a_canary_that_went_back(self, bundles, tmp_path, answers):
        devices = Devices(answers=answers)

        def confirm(member: Member, deployed: Deployed) -> None:
            raise StageError("not confirmed within 30 s", why="it went back")

        rolled = fleet.roll_out(bundles[0], of(4, canary=0.25), tmp_path, owner="me", deploy_one=devices, confirm_one=confirm)

        assert (devices.asked, rolled.why_stopped, rolled.code) == (["d0"], "stopped: the canary d0 failed", 1)
        assert "it went back" in rolled.rows["d0"].text
        assert rolled.rows["d0"].facts["sent_bytes"] == 5

    def test_waits_for_no_trial_where_a_gate_said_no_or_none_was_asked_for(self, bundles, tmp_path):
        def never(member: Member, deployed: Deployed) -> None:
            raise AssertionError

        refused = fleet.roll_out(
            bundles[0],
            of(1),
            tmp_path / "refused",
            owner="me",
            deploy_one=lambda member: done(member, code=3, stage="parity", answers=ON_TRIAL),
            confirm_one=never,
        )
        plain = fleet.roll_out(bundles[0], of(1), tmp_path / "plain", owner="me", deploy_one=Devices(), confirm_one=never)

        assert (refused.code, plain.code) == (3, 0)

    def test_of_another_bundle_is_not_mixed_in(self, bundles, tmp_path):
        fleet.roll_out(bundles[0], of(1), tmp_path, owner="me", deploy_one=Devices())

        with pytest.raises(UsageError, match="is of another bundle"):
            fleet.roll_out(bundles[1], of(1), tmp_path, owner="me", deploy_one=Devices())

    def test_whose_state_is_damaged_says_so(self, bundles, tmp_path):
        (tmp_path / "rollout.json").write_text('{"id": 1')

        with pytest.raises(UsageError, match=r"rollout\.json is damaged"):
            fleet.roll_out(bundles[0], of(1), tmp_path, owner="me", deploy_one=Devices())

    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(1, 12),
        st.floats(0, 1),
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sets(st.integers(0, 11)),
    )
    def test_whatever_fails(self, count, canary, parallel, stop_after, groups, failing):
        """Nobody is asked twice, never too many at a time, and no more fail than those that ran when it stopped."""
        devices = Devices(lambda name: int(name[1:]) in failing)
        planned = of(count, canary=canary, parallel=parallel, stop_after=stop_after, groups=groups)
        rows = {member.name: fleet.Row(member.group) for member in planned.members}
        rolling = fleet._Rolling(planned, rows, Path("/dev/null"), None, lambda rows: None, devices, None)
        rolling._keep = rows.__setitem__

        rolling.run()

        failed = [name for name, row in rows.items() if row.outcome is Outcome.FAILED]
        assert len(devices.asked) == len(set(devices.asked))
        assert devices.most <= parallel
        assert len(failed) < stop_after + parallel
        assert Outcome.RUNNING not in {row.outcome for row in rows.values()}
        if not failed:
            assert {row.outcome for row in rows.values()} == {Outcome.DONE}

    def test_seven_hundredths_of_a_hundred_are_seven(self):
        assert [len(members) for _, members in fleet.waves(of(100, canary=0.07))] == [7, 93]

    def test_canaries_of_a_group_go_before_its_others_and_groups_one_after_another(self):
        found = fleet.waves(of(8, canary=0.3, groups=2))

        assert [(is_canary, [member.name for member in members]) for is_canary, members in found] == [
            (True, ["d0", "d2"]),
            (False, ["d4", "d6"]),
            (True, ["d1", "d3"]),
            (False, ["d5", "d7"]),
        ]


class TestTheFile:
    def test_says_where_devices_are_and_how_they_are_deployed_to(self, tmp_path):
        (tmp_path / "fleet.toml").write_text(
            """
            root = "/opt/deploykit/my-net"
            parallel = 4
            stop_after = 2

            [groups.gates]
            canary = 0.1

            [devices.gate-1]
            address = "ssh://gate-1"
            group = "gates"
            host_key = "ssh-ed25519 AAAA"

            [devices.lab]
            address = "local"
            root = "/srv/my-net"
            python = "/usr/bin/python3.10"
            """
        )

        found = fleet.read(tmp_path / "fleet.toml", How(threads=2))

        gate, lab = found.members
        assert (found.parallel, found.stop_after, found.canaries) == (4, 2, {"gates": 0.1})
        assert (gate.name, gate.how.root, gate.how.threads, gate.host_key) == (
            "gate-1",
            "/opt/deploykit/my-net",
            2,
            "ssh-ed25519 AAAA",
        )
        assert (lab.how.root, lab.how.python, lab.group) == ("/srv/my-net", "/usr/bin/python3.10", "")

    def test_all_its_problems_are_told_at_once(self, tmp_path):
        (tmp_path / "fleet.toml").write_text(
            """
            paralel = 4
            stop_after = 0
            root = ["/opt/a"]
            [groups.gates]
            canary = 7
            [devices.one]
            address = "local"
            group = "doors"
            [devices.two]
            address = "local"
            root = 5
            [devices.three]
            [devices.four]
            address = "local"
            [devices.five]
            address = "jetson-5"
            host_key = 5
            """
        )

        with pytest.raises(UsageError) as error:
            fleet.read(tmp_path / "fleet.toml", How())

        told = "\n".join(error.value.problems)
        for problem in (
            "paralel: there is no such key",
            "stop_after: 0 is no whole number",
            "groups.gates.canary: 7 is no share",
            "devices.one.group: there is no [groups.doors]",
            "root: ['/opt/a'] is no text",
            "devices.two.root: 5 is no text",
            "devices.five.address: 'jetson-5' is no address of a device",
            "devices.five.host_key: 5 is no text",
            "devices.three.address: it is missing",
            "devices: local is there 3 times",
        ):
            assert problem in told

    @pytest.mark.parametrize("content", ["[", "", "devices = 3", b"\xff"])
    def test_that_is_none_is_refused(self, tmp_path, content):
        (tmp_path / "fleet.toml").write_bytes(content if isinstance(content, bytes) else content.encode())

        with pytest.raises(UsageError):
            fleet.read(tmp_path / "fleet.toml", How())
        with pytest.raises(UsageError, match="there is no fleet"):
            fleet.read(tmp_path / "nothing.toml", How())


def test_a_fleet_is_asked_and_one_that_is_not_there_does_not_spoil_the_others(tmp_path, deploykit):
    (tmp_path / "fleet.toml").write_text(
        f"""
        [devices.here]
        address = "local"
        root = "{tmp_path}/nothing"
        [devices.away]
        address = "ssh://127.0.0.1:1"
        root = "/x"
        """
    )

    said = deploykit("status", "--fleet", str(tmp_path / "fleet.toml"), "--json")

    answers = json.loads(said.out)["devices"]
    assert "has no release in" in answers["here"]["error"]
    assert "cannot reach ssh://127.0.0.1:1" in answers["away"]["error"]
    assert said.code == 2
