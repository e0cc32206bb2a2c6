"""Boards: what each file says and where it is from, power modes, a user's own file, JetPack, and the three commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomllib
from click.testing import CliRunner, Result

from deploykit import targets
from deploykit.cli import cli
from deploykit.errors import CapabilityError, UsageError
from deploykit.targets import UNITS, jetpack

NAMES = targets.names()
OWN = """
title = "Our board"
kind = "gpu"
compute_capability = "8.7"

[figures]
sm = { value = 4, source = "sheet" }
gpu_mhz = { value = 1000, source = "sheet" }
int8_tops = { value = 16, derived = "4096 op/clk/SM" }
fp16_tops = { value = 8, derived = "2048 op/clk/SM" }
fp32_tops = { value = 1, derived = "256 op/clk/SM" }
bandwidth_gbs = { value = 51, source = "sheet" }
l2_kib = { value = 2048, source = "sheet" }

[sources]
sheet = "our data sheet"

[[modes]]
name = "half"
id = 1
watts = 7
sm = 2
gpu_mhz = 500
bandwidth_gbs = 25.5
source = "sheet"
"""


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "ours.toml"
    path.write_text(OWN)
    return path


class TestTheBoards:
    def test_all_that_are_promised_are_there(self):
        assert set(NAMES) >= {
            *("jetson-nano", "jetson-tx2", "xavier-nx", "agx-xavier", "thor-t4000", "thor-t5000"),
            *("orin-nano-4gb", "orin-nano-8gb", "orin-nano-4gb-super", "orin-nano-8gb-super"),
            *("orin-nx-8gb", "orin-nx-16gb", "orin-nx-8gb-super", "orin-nx-16gb-super"),
            *("agx-orin-32gb", "agx-orin-64gb", "agx-orin-industrial"),
            *("t4", "l4", "a2", "a10", "a30", "a100", "h100", "h200"),
            *("x86-avx2", "x86-vnni", "x86-amx", "raspberry-pi-4", "raspberry-pi-5", "arm64"),
        }

    @pytest.mark.parametrize("name", NAMES)
    def test_every_figure_names_its_source_or_its_rule(self, name):
        board = targets.find(name)

        assert all(figure.source for figure in board.figures.values())
        assert set(board.figures) <= set(UNITS)
        assert all(mode.source for mode in board.modes)

    @pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("orin", "agx-orin"))])
    def test_the_rates_of_every_orin_follow_from_its_sms_and_its_clock(self, name):
        board = targets.find(name)
        clocks = 1e6 * board.value("sm") * board.value("gpu_mhz")

        assert board.rate("int8") == pytest.approx(4096 * clocks, rel=1e-3)
        assert board.rate("fp16") == pytest.approx(2048 * clocks, rel=1e-3)
        assert board.figures["int8_tops"].derived

    @pytest.mark.parametrize(
        ("name", "sparse"), [("orin-nano-4gb", 20), ("orin-nano-8gb", 40), ("orin-nano-8gb-super", 67), ("agx-orin-64gb", 170)]
    )
    def test_twice_the_dense_rate_is_what_the_data_sheet_prints(self, name, sparse):
        assert 2 * targets.find(name).value("int8_tops") == pytest.approx(sparse, rel=0.03)

    @pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2"])
    def test_boards_without_int8_kernels_have_no_rate_for_them(self, name):
        assert not targets.find(name).has_int8

    def test_a_name_stands_for_one_board_alone(self):
        aliases = [alias for name in NAMES for alias in targets.find(name).aliases]

        assert len({*aliases, *NAMES}) == len(aliases) + len(NAMES)
        assert targets.find("orin-nano").name == "orin-nano-8gb"

    def test_an_unknown_name_is_told_the_nearest(self):
        with pytest.raises(UsageError, match="orin-nano"):
            targets.find("orin-nan")


class TestPowerModes:
    @pytest.mark.parametrize("name", [name for name in NAMES if targets.find(name).modes])
    def test_the_first_one_is_never_above_the_board(self, name):
        board = targets.find(name)

        for mode in board.modes:
            lowered = targets.in_mode(board, mode.name)
            assert lowered.rate("fp16") <= board.rate("fp16") * 1.0001
            assert lowered.mode == mode.name

    def test_rates_follow_sms_and_clock_and_bandwidth_the_memory(self, own):
        lowered = targets.in_mode(targets.find(str(own)), "HALF")

        assert (lowered.value("int8_tops"), lowered.value("fp16_tops")) == (4, 2)
        assert (lowered.value("sm"), lowered.value("bandwidth_gbs"), lowered.value("l2_kib")) == (2, 25.5, 2048)
        assert lowered.figures["int8_tops"].derived

    def test_the_published_rates_of_the_modes_of_agx_orin_come_out(self):
        board = targets.find("agx-orin")

        rates = [2 * targets.in_mode(board, mode).value("int8_tops") for mode in ("MAXN", "50W", "30W", "15W")]

        # NVIDIA's DLA-SW README prints 171, 109, 41 and 14, the last of them below what its SMs and clock give.
        assert rates[:3] == pytest.approx([171, 109, 41], rel=0.02)

    def test_a_mode_is_known_by_its_number_too(self, own):
        assert targets.in_mode(targets.find(str(own)), "1").mode == "half"

    def test_an_unknown_mode_is_refused_with_those_that_there_are(self, own):
        with pytest.raises(UsageError, match=r"half \(1\)"):
            targets.in_mode(targets.find(str(own)), "MAXN")


class TestAUsersOwnFile:
    def test_is_a_target_named_after_the_file(self, own):
        board = targets.find(str(own))

        assert (board.name, board.title, board.value("sm")) == ("ours", "Our board", 4)
        assert (board.figures["sm"].source, board.figures["int8_tops"].derived) == ("our data sheet", True)

    def test_all_its_problems_are_told_at_once(self, tmp_path):
        path = tmp_path / "bad.toml"
        text = OWN.replace('kind = "gpu"', 'kind = "tpu"\ncolour = "green"\njetpack = ["9.9"]').replace(
            'source = "sheet" }', 'source = "?" }', 1
        )
        path.write_text(text.replace("bandwidth_gbs = 25.5", "bandwidth_gbs = 99").replace("value = 16", "value = -1"))

        with pytest.raises(UsageError) as refused:
            targets.find(str(path))

        told = "\n".join(refused.value.problems)
        for problem in (
            "kind is 'tpu'",
            "unknown key 'colour'",
            "jetpack '9.9'",
            "figures.sm names the source '?'",
            "figures.int8_tops",
        ):
            assert problem in told
        assert "more than the board's 51" in told

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ('{ value = 4, source = "sheet" }', "4", "figures.sm has no positive value"),
            ('{ value = 4, source = "sheet" }', "{ value = 4 }", "either a source or the rule"),
            ('{ value = 4, source = "sheet" }', '{ value = inf, source = "sheet" }', "figures.sm has no positive value"),
            ('{ value = 4, source = "sheet" }', '{ value = 4, source = ["sheet"] }', "names the source"),
            ('compute_capability = "8.7"', "compute_capability = 8.7", "compute_capability"),
            ("sm = {", "sms = {", "figures.sm is missing"),
            ('title = "Our board"', "", "it has no title"),
            ("[[modes]]", "[modes]", "modes is not a list"),
            ('sheet = "our data sheet"', "sheet = 1", "sources is not a table of texts"),
        ],
    )
    def test_each_kind_of_problem_is_named(self, tmp_path, old, new, told):
        path = tmp_path / "bad.toml"
        assert old in OWN
        path.write_text(OWN.replace(old, new, 1))

        with pytest.raises(UsageError, match=told):
            targets.find(str(path))

    @pytest.mark.parametrize("content", [b"title = ", b"\xff\xfe", b"a = " + b"[" * 5000])
    def test_what_is_no_toml_is_refused(self, tmp_path, content):
        (tmp_path / "bad.toml").write_bytes(content)

        with pytest.raises(UsageError, match="TOML"):
            targets.find(str(tmp_path / "bad.toml"))

    def test_one_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="cannot read the target"):
            targets.find(str(tmp_path / "none.toml"))


class TestJetPack:
    def test_it_says_what_software_comes_with_it(self):
        found = jetpack.RELEASES["6.1"]

        assert (found.l4t, found.cuda, found.tensorrt, found.python) == ("36.4 to 36.5", "12.6", "10.3.0", "3.10")

    @pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2", "xavier-nx", "agx-xavier"])
    def test_boards_whose_tensorrt_is_too_old_are_predicted_only(self, name):
        with pytest.raises(CapabilityError, match="predicted only") as refused:
            jetpack.require_builds(targets.find(name))

        assert refused.value.exit_code == 4

    @pytest.mark.parametrize("name", ["orin-nano", "agx-orin", "thor", "t4", "raspberry-pi-5"])
    def test_others_are_built_for(self, name):
        jetpack.require_builds(targets.find(name))

    @pytest.mark.parametrize(
        ("tensorrt", "opset", "dla"),
        [
            ("8.6.2", 17, "fp16 and int8"),
            ("10.3.0", 20, "fp16"),
            ("10.16", 24, "none"),
            ("11.4.0", 24, "none"),
            ("11.4.1", 24, "fp16 and int8"),
        ],
    )
    def test_what_a_tensorrt_does_with_our_graphs_is_known(self, tensorrt, opset, dla):
        found = jetpack.abilities(tensorrt)

        assert (found.opset, found.dla) == (opset, dla)
        assert found.strongly_typed == (not tensorrt.startswith("8"))

    def test_of_its_releases_those_build_whose_tensorrt_takes_precision_from_the_graph(self):
        assert [release.jetpack for release in jetpack.building(targets.find("orin-nano"))] == ["6.1", "7.2"]

    def test_tensorrt_11_is_for_agx_orin_and_thor_with_jetpack_7_2_2(self):
        with_11 = {name for name in NAMES if any(found.tensorrt == "11.4.1" for found in jetpack.of(targets.find(name)))}

        assert with_11 == {"agx-orin-32gb", "agx-orin-64gb", "agx-orin-industrial", "thor-t4000", "thor-t5000"}

    @pytest.mark.parametrize(
        ("l4t", "jetpack_"),
        [("36.4.3", "6.1"), ("36.5", "6.1"), ("36.3.0", "6.0"), ("35.6.4", "5.1"), ("38.4", "7.0"), ("39.2.1", "7.2")],
    )
    def test_doctor_knows_a_jetpack_by_its_l4t_and_says_what_its_tensorrt_does(self, l4t, jetpack_):
        release, able = jetpack.here(l4t, None)

        assert release.startswith(f"JetPack {jetpack_} (L4T {l4t}) comes with CUDA")
        assert able.startswith(f"TensorRT {jetpack.RELEASES[jetpack_].tensorrt} ")

    def test_doctor_tells_of_the_tensorrt_that_is_installed_and_of_none_where_there_is_none(self):
        assert "newest opset 20; on DLA cores: FP16 alone" in jetpack.here(None, "10.3.0")[0]
        assert "no engine of ours" in jetpack.here("35.4.1", None)[1]
        assert "11.4.0 takes" in jetpack.here("39.2", "11.4.0")[1]
        assert jetpack.here("99.1", None) == ["L4T 99.1 is of no JetPack that is known here"]
        assert jetpack.here(None, None) == []


class TestRefusals:
    """What a laptop says before it exports for a board that could not build the engine."""

    @staticmethod
    def told(name: str, **asked: Any) -> list[str]:
        return jetpack.refusals(
            targets.find(name), **({"int8": True, "float_type": "fp16", "dla_core": None, "opset": 19} | asked)
        )

    @pytest.mark.parametrize("name", ["orin-nano", "agx-orin", "thor", "t4", "h200"])
    def test_there_are_none_for_int8_where_there_are_kernels(self, name):
        assert self.told(name) == []

    def test_a_board_without_a_gpu_runs_no_tensorrt(self):
        (found,) = self.told("raspberry-pi-5")

        assert "runs no TensorRT" in found

    def test_the_oldest_release_that_builds_has_to_read_the_opset(self):
        assert self.told("orin-nano", opset=20) == []
        assert self.told("orin-nano", opset=21) == ["TensorRT 10.3.0 of JetPack 6.1 reads opset 20 at most, not 21"]

    def test_bfloat16_came_with_ampere(self):
        assert self.told("orin-nano", int8=False, float_type="bf16") == []
        assert self.told("t4", float_type="bf16") == ["NVIDIA T4 has no bfloat16: that came with compute capability 8.0"]

    def test_a_dla_core_is_counted_on_the_board(self):
        assert "it has none; Xavier, Orin NX and AGX Orin have" in self.told("orin-nano", dla_core=0)[0]
        assert self.told("agx-orin", dla_core=2) == ["NVIDIA Jetson AGX Orin 64GB has no DLA core 2: it has 2, counted from 0"]

    def test_fp16_runs_on_a_dla_core_of_jetpack_6(self):
        assert self.told("agx-orin", dla_core=1, int8=False) == []
        assert "a DLA core computes in FP16 or INT8" in self.told("agx-orin", dla_core=1, int8=False, float_type="fp32")[0]

    def test_q_dq_does_not_and_what_does_it_is_named(self):
        oldest = "TensorRT 10.3.0 of JetPack 6.1, the oldest that builds these graphs for the board,"

        assert self.told("agx-orin", dla_core=1) == [
            f"{oldest} runs FP16 alone on DLA cores, no Q/DQ; JetPack 7.2.2 (TensorRT 11.4.1) does what is asked: "
            'build.jetpack = "7.2.2" says that the board has it'
        ]
        assert self.told("orin-nx", dla_core=1) == [
            f"{oldest} runs FP16 alone on DLA cores, no Q/DQ; no other JetPack for NVIDIA Jetson Orin NX 16GB does more"
        ]

    def test_the_jetpack_that_is_named_decides_and_no_other_one(self):
        assert self.told("agx-orin", dla_core=1, jetpack="7.2.2") == []
        assert self.told("agx-orin", dla_core=1, jetpack="6.1")[0].startswith("TensorRT 10.3.0 of JetPack 6.1 runs FP16 alone")
        assert self.told("agx-orin", dla_core=1, int8=False, jetpack="7.2") == [
            "TensorRT 10.16 of JetPack 7.2 does not use DLA cores; JetPack 6.1 (TensorRT 10.3.0) or JetPack 7.2.2 "
            '(TensorRT 11.4.1) does what is asked: build.jetpack = "7.2.2" says that the board has it'
        ]
        assert self.told("orin-nano", opset=21, jetpack="7.2") == []

    def test_a_jetpack_that_does_not_run_there_or_builds_nothing_is_refused(self):
        assert self.told("orin-nano", jetpack="7.2.2")[0].startswith("JetPack 7.2.2 does not run on NVIDIA Jetson Orin Nano")
        assert self.told("t4", jetpack="6.1") == ["JetPack 6.1 does not run on NVIDIA T4: it is no Jetson"]
        assert "TensorRT 8.6.2 of JetPack 6.0 does not take precision from the graph" in self.told("agx-orin", jetpack="6.0")[0]

    def test_only_the_releases_that_do_what_is_asked_are_told_to_be_needed(self):
        def able(**asked: Any) -> list[str]:
            wanted = {"int8": True, "dla_core": None, "opset": 19, "jetpack": None} | asked
            return [release.jetpack for release in jetpack.able(targets.find("agx-orin"), **wanted)]

        assert able() == ["6.1", "7.2", "7.2.2"]
        assert able(dla_core=0, int8=False) == ["6.1", "7.2.2"]
        assert able(dla_core=0) == ["7.2.2"]
        assert able(jetpack="7.2") == ["7.2"]


class TestExportingForABoard:
    def export(self, tmp_path: Path, board: str, *runtimes: str) -> Result:
        words = [word for runtime in runtimes for word in ("--to", runtime)]
        return CliRunner().invoke(cli, ["export", "lenet5", *words, "--target", board, "--output", str(tmp_path / "out")])

    @pytest.mark.parametrize("board", ["jetson-nano", "jetson-tx2", "xavier-nx", "agx-xavier"])
    def test_whose_tensorrt_is_too_old_is_a_missing_capability_and_makes_nothing(self, tmp_path, board):
        found = self.export(tmp_path, board, "tensorrt")

        assert isinstance(found.exception, CapabilityError)
        assert found.exception.exit_code == 4
        assert "predicted only" in str(found.exception)
        assert not (tmp_path / "out").exists()

    def test_that_has_no_gpu_is_one_too(self, tmp_path):
        assert "runs no TensorRT" in str(self.export(tmp_path, "raspberry-pi-5", "tensorrt").exception)

    def test_that_nobody_knows_is_the_users_mistake(self, tmp_path):
        assert isinstance(self.export(tmp_path, "orin-pico", "onnx").exception, UsageError)


class TestTheCommand:
    def run(self, *words: str) -> str:
        done = CliRunner().invoke(cli, ["targets", *words], catch_exceptions=False, standalone_mode=False)
        return done.output

    def test_lists_every_board(self):
        assert {board["name"] for board in json.loads(self.run("--json"))} == set(NAMES)
        assert "orin-nano-8gb" in self.run()

    def test_says_where_each_figure_of_one_is_from(self):
        told = self.run("orin-nano")

        assert "DS-11105-001" in told
        assert "derived: 4096 op/clk/SM" in told
        assert "10.3.0" in told

    def test_prints_a_file_to_begin_ones_own_with(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text(self.run("orin-nano", "--toml"))

        assert tomllib.loads(path.read_text())["title"].endswith("Orin Nano 8GB")
        assert targets.find(str(path)).figures == targets.find("orin-nano").figures
