"""What a Jetson tells while it works: every form of tegrastats' lines, sysfs as it is found, throttling; other GPUs by NVML."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pynvml
import pytest
import timings
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploykit.benchmark.conditions import Conditions, Watch
from deploykit.benchmark.report import BenchmarkReport
from deploykit.jsonable import to_json
from deploykit.telemetry import board, nvml, throttling
from deploykit.telemetry.board import State
from deploykit.telemetry.recorder import Recorder
from deploykit.telemetry.tegrastats import Sample, energy_mj, parse, samples

# As found in public files, one for each release and board: release, line.
LINES = {
    "Nano, JetPack 4": (
        "RAM 1766/3964MB (lfb 197x4MB) SWAP 0/2048MB (cached 0MB) CPU [24%@1224,15%@1224,13%@1224,10%@1224] EMC_FREQ 0% "
        "GR3D_FREQ 0% PLL@21C CPU@25C PMIC@100C GPU@23.5C AO@33.5C thermal@24.5C POM_5V_IN 2545/2547 POM_5V_GPU 0/0 "
        "POM_5V_CPU 549/529"
    ),
    "Nano, one core off": (
        "RAM 2519/3956MB (lfb 3x4MB) SWAP 0/1978MB CPU [12%@1479,off,7%@1479,20%@1479] EMC_FREQ 9%@1600 GR3D_FREQ 45%@921 "
        "NVDEC 716 APE 25 PLL@33C CPU@36.5C PMIC@100C GPU@34C AO@41C thermal@35.25C POM_5V_IN 3187/3187 POM_5V_GPU 450/450 "
        "POM_5V_CPU 612/612"
    ),
    "TX2, JetPack 4": (
        "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU [44%@1421,49%@2031,67%@2034,17%@1420,25%@1419,8%@1420] "
        "EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C GPU@39.5C "
        "BCPU@42.5C thermal@41.3C Tdiode@39.25C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN 5297/5297 "
        "VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241"
    ),
    "Orin NX, JetPack 5": (
        "01-24-2024 09:17:09 RAM 3503/7337MB (lfb 7x1MB) SWAP 430/3668MB (cached 1MB) CPU "
        "[11%@729,13%@729,9%@729,18%@729,off,off] "
        "EMC_FREQ 0%@2133 GR3D_FREQ 0%@305 GR3D2_FREQ 0%@0 VIC_FREQ 115 APE 174 CV0@42.718C CPU@44.093C SOC2@42.625C "
        "SOC0@43.281C "
        "CV1@42.25C GPU@41.343C tj@46.968C SOC1@46.968C CV2@42.875C VDD_IN 4915mW/4915mW VDD_CPU_GPU_CV 449mW/449mW "
        "VDD_SOC 1431mW/1431mW"
    ),
    "AGX Orin, idle": (
        "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729] EMC_FREQ 0%@2133 "
        "GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C SOC2@39.343C Tdiode@33.25C "
        "SOC0@39.375C CV1@-256C GPU@-256C tj@42.593C SOC1@40.468C CV2@-256C VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW "
        "VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
    ),
    "AGX Orin, DLA": (
        "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] "
        "EMC_FREQ 1%@2133 "
        "GR3D_FREQ 14%@[407,406] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C Tboard@62C SOC2@70C "
        "Tdiode@62.25C SOC0@69.531C CV1@72.5C GPU@69.125C tj@77.281C SOC1@68.968C CV2@67.25C VDD_GPU_SOC 3150mW/2971mW "
        "VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
    ),
    "Orin Nano, JetPack 6.2": (
        "04-19-2026 01:31:10 RAM 519/7607MB (lfb 61x4MB) CPU [0%@1728,0%@1728,0%@1728,9%@1728,0%@1728,0%@1728] EMC_FREQ 0%@3199 "
        "GR3D_FREQ 0%@[1018] NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@48.906C soc2@47.656C soc0@48.093C "
        "gpu@49.593C tj@49.593C soc1@47.312C VDD_IN 5971mW/5971mW VDD_CPU_GPU_CV 1669mW/1669mW VDD_SOC 2308mW/2308mW"
    ),
    "Orin NX, not root": (
        "08-21-2026 15:11:33 RAM 998/15389MB (lfb 3313x4MB) SWAP 0/7694MB (cached 0MB) CPU "
        "[4%@883,0%@883,1%@883,0%@729] EMC_FREQ 0% "
        "GR3D_FREQ 0% GR3D2_FREQ 0%@0 CV0@54.156C CPU@56.843C SOC2@54.906C SOC0@56.031C CV1@54.093C GPU@54.375C tj@57.468C "
        "SOC1@57.468C CV2@54.281C"
    ),
    "AGX Orin, JetPack 7.2, tail": (
        "GR3D_FREQ 32%@[1300,1300] soc0@49.406C/49.5C gpu@47.125C/47.125C tj@51.968C/51.968C soc1@47.906C/48.093C "
        "VDD_GPU_SOC 4385mW/3787mW/4385mW VDD_CPU_CV 1196mW/897mW/1196mW VIN_SYS_5V0 5552mW/5274mW/5552mW"
    ),
    "Thor, R38.4": (
        "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,0%@972,0%@972] EMC_FREQ 0%@2750 GR3D_FREQ "
        "@[314,314,314] "
        "NVENC0_FREQ @314 VIC off OFA_FREQ @315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C "
        "soc345@37.406C VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
    ),
}
# (RAM, swap, cores, (EMC %, MHz), (GPU %, MHz), tj or hottest, total mW)
EXPECTED = {
    "Nano, JetPack 4": ((1766, 3964), (0, 2048), 4, (0, None), (0, None), 33.5, 2545),
    "Nano, one core off": ((2519, 3956), (0, 1978), 4, (9, 1600), (45, 921), 41.0, 3187),
    "TX2, JetPack 4": ((3276, 7859), (1626, 12122), 6, (1, 1866), (0, 114), 42.5, 5297),
    "Orin NX, JetPack 5": ((3503, 7337), (430, 3668), 6, (0, 2133), (0, 305), 46.968, 4915),
    "AGX Orin, idle": ((1282, 62795), (0, 31398), 2, (0, 2133), (0, 0), 42.593, 2399 + 400 + 4032),
    "AGX Orin, DLA": ((13983, 62780), (126, 31390), 2, (1, 2133), (14, 406), 77.281, 3150 + 14312 + 4968),
    "Orin Nano, JetPack 6.2": ((519, 7607), None, 6, (0, 3199), (0, 1018), 49.593, 5971),
    "Orin NX, not root": ((998, 15389), (0, 7694), 4, (0, None), (0, None), 57.468, None),
    "AGX Orin, JetPack 7.2, tail": (None, None, 0, (None, None), (32, 1300), 51.968, 4385 + 1196 + 5552),
    "Thor, R38.4": ((105265, 125772), None, 3, (0, 2750), (None, 314), 38.875, 19780),
}


def parsed(line: str) -> Sample:
    found = parse(line)
    assert found is not None
    return found


class TestTegrastats:
    @pytest.mark.parametrize("release", LINES)
    def test_the_line_of_every_release_is_read(self, release):
        found = parsed(LINES[release])

        memory, swap, cores, emc, gpu, hottest, total = EXPECTED[release]
        assert (found.ram_mb, found.swap_mb, len(found.cpu)) == (memory, swap, cores)
        assert (found.emc_percent, found.emc_mhz) == emc
        assert (found.gpu_percent, found.gpu_mhz) == gpu
        assert (found.hottest_c, found.total_mw) == (hottest, total)

    def test_cores_have_a_load_and_a_clock_and_may_be_off(self):
        assert parsed(LINES["Nano, one core off"]).cpu == ((12, 1479), None, (7, 1479), (20, 1479))

    def test_unpowered_zones_and_the_constant_of_the_pmic_are_no_temperatures(self):
        found = parsed(LINES["AGX Orin, idle"]).temperatures_c

        assert set(found) == {"cpu", "tboard", "soc2", "tdiode", "soc0", "tj", "soc1"}
        assert "pmic" not in parsed(LINES["Nano, JetPack 4"]).temperatures_c

    def test_a_rail_has_its_power_now_and_an_unconnected_one_is_none(self):
        assert parsed(LINES["AGX Orin, idle"]).power_mw == {
            "VDD_GPU_SOC": 2399,
            "VDD_CPU_CV": 400,
            "VIN_SYS_5V0": 4032,
            "VDDQ_VDD2_1V8AO": 301,
        }
        assert parsed(LINES["AGX Orin, JetPack 7.2, tail"]).power_mw["VDD_GPU_SOC"] == 4385

    def test_engines_have_a_clock_or_are_off(self):
        assert parsed(LINES["AGX Orin, DLA"]).engines_mhz == {"VIC": 115, "NVDLA0": 1600, "APE": 174}
        assert parsed(LINES["Thor, R38.4"]).engines_mhz == {"NVENC0": 314, "VIC": 0, "OFA": 315, "PVA0": 0, "APE": 300}

    def test_the_time_is_the_lines_own(self):
        assert parsed(LINES["Thor, R38.4"]).time == "04-21-2026 15:50:52"
        assert parsed(LINES["Nano, JetPack 4"]).time is None

    def test_a_leading_nul_and_half_a_line_are_survived(self):
        lines = ["\0" + LINES["Orin Nano, JetPack 6.2"], LINES["Thor, R38.4"][:15], ""]

        assert [sample.gpu_mhz for sample in samples(lines)] == [1018]

    def test_ten_thousand_damaged_lines_are_survived(self):
        chance, put = random.Random(0), "0123456789%@[],/.-CmWoff \0\n٣GR3D_FREQ"
        for _ in range(10_000):
            line = LINES[chance.choice(sorted(LINES))]
            start = chance.randrange(len(line))
            inserted = "".join(chance.choices(put, k=chance.randrange(12)))

            found = parse(line[:start] + inserted + line[start + chance.randrange(40) :])

            assert found is None or isinstance(found, Sample)

    @settings(deadline=None, max_examples=100)
    @given(st.text())
    @example("RAM 9999999999999999999999/1MB CPU [%@,,,] GR3D_FREQ 999999999999%@[,,] tj@" + "9" * 5000 + "C")
    def test_nor_is_any_text(self, text):
        found = parse(text)

        assert found is None or isinstance(found, Sample)

    def test_energy_is_the_sum_of_what_was_taken_at_each_moment(self):
        found = [parsed(LINES["Orin Nano, JetPack 6.2"])] * 10

        assert energy_mj(found, 0.1) == pytest.approx(5971)
        assert energy_mj([parsed(LINES["Orin NX, not root"])], 0.1) is None


class Jetson:
    """A Jetson's files, as folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64")
        self.write("proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
        self.write("sys/class/hwmon/hwmon3/name", "soctherm_oc")
        self.events(0)
        self.clock(1_020_000_000)
        self.temperature(50_000)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def events(self, count: int) -> None:
        self.write("sys/class/hwmon/hwmon3/oc1_event_cnt", 2)
        self.write("sys/class/hwmon/hwmon3/oc3_event_cnt", count)

    def clock(self, most_hz: int) -> None:
        self.write("sys/class/devfreq/17000000.gpu/cur_freq", 306_000_000)
        self.write("sys/class/devfreq/17000000.gpu/max_freq", most_hz)

    def temperature(self, milli: int) -> None:
        self.write("sys/class/thermal/thermal_zone0/type", "tj-thermal")
        self.write("sys/class/thermal/thermal_zone0/temp", milli)


@pytest.fixture
def jetson(tmp_path) -> Jetson:
    return Jetson(tmp_path)


class TestABoardsFiles:
    def test_clock_temperature_and_events_are_read(self, jetson):
        found = board.look(jetson.root)

        assert (found.gpu_hz, found.gpu_most_hz) == (306_000_000, 1_020_000_000)
        assert found.temperatures_c == {"tj": 50.0}
        assert found.events == {"oc1_event_cnt": 2, "oc3_event_cnt": 0}

    def test_a_rails_power_is_its_voltage_times_its_current(self, jetson):
        jetson.write("sys/class/hwmon/hwmon1/name", "ina3221")
        for number, label in ((1, "VDD_IN"), (2, "NC")):
            jetson.write(f"sys/class/hwmon/hwmon1/in{number}_label", label)
            jetson.write(f"sys/class/hwmon/hwmon1/in{number}_input", 5000)
            jetson.write(f"sys/class/hwmon/hwmon1/curr{number}_input", 1200)

        assert board.look(jetson.root).power_mw == {"VDD_IN": 6000.0}

    def test_release_and_model_are_read(self, jetson):
        assert board.l4t(jetson.root) == "36.4.3"
        assert (board.model(jetson.root) or "").endswith("Developer Kit Super")

    def test_a_zone_without_power_is_left_out(self, jetson):
        jetson.temperature(-256_000)

        assert board.look(jetson.root).temperatures_c == {}

    def test_the_constant_of_a_nanos_pmic_is_no_heat(self, jetson):
        before = board.look(jetson.root)
        jetson.write("sys/class/thermal/thermal_zone1/type", "PMIC-Die")
        jetson.write("sys/class/thermal/thermal_zone1/temp", 100_000)

        assert throttling.between(before, board.look(jetson.root)) == []

    def test_another_machine_is_not_asked(self, jetson):
        (jetson.root / "etc/nv_tegra_release").unlink()
        (jetson.root / "proc/device-tree/model").unlink()

        assert board.look(jetson.root) == State()

    def test_power_modes_are_known_by_number_and_name(self):
        text = "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n<POWER_MODEL NAME=MAXN_SUPER ID=2>\n< PM_CONFIG DEFAULT=1 >"

        assert board.power_modes(text) == {0: "15W", 2: "MAXN_SUPER"}
        assert board.power_mode("NV Power Mode: MAXN\n0\n") == (0, "MAXN")
        assert board.power_mode("nothing of that") == (None, None)


def trace(*clocks: int, load: int = 99, tj: float = 60.0) -> list[Sample]:
    return [parsed(f"RAM 1/2MB GR3D_FREQ {load}%@[{clock}] tj@{tj}C") for clock in clocks]


class TestThrottling:
    def test_a_clock_that_falls_under_load_is_told(self):
        [told] = throttling.of_samples(trace(1020, 1020, 1020, 612))

        assert told == "the GPU's clock fell from 1020 to 612 MHz in 25 % of the busy time"

    def test_so_is_one_that_never_reached_what_was_pinned(self):
        assert throttling.of_samples(trace(612, 612)) == []
        assert throttling.of_samples(trace(612, 612), locked_mhz=1020) != []

    def test_a_clock_that_rises_is_no_throttling(self):
        assert throttling.of_samples(trace(306, 612, 1020)) == []

    def test_an_idle_gpu_may_lower_its_clock(self):
        assert throttling.of_samples(trace(1020) + trace(306, load=0)) == []

    def test_heat_is_told(self):
        assert throttling.of_samples(trace(1020, tj=85.0)) == []
        assert throttling.of_samples(trace(1020, tj=91.0)) == ["the board was at 91 degrees, and throttles above 85"]

    def test_events_count_from_when_the_run_began(self):
        before, after = (
            State(events={"oc1_event_cnt": 2, "oc3_event_cnt": 5}),
            State(events={"oc1_event_cnt": 2, "oc3_event_cnt": 9}),
        )

        assert throttling.between(before, after) == ["4 over-current events (oc3)"]


class TestABenchmarkOnAThrottlingBoard:
    def conditions(self, jetson: Jetson, happens: str) -> Conditions:
        with Watch(jetson.root) as watch:
            if happens == "over-current":
                jetson.events(3)
            elif happens == "heat":
                jetson.temperature(95_000)
            elif happens == "clock":
                jetson.clock(612_000_000)
        return watch.conditions

    def verdict(self, throttled: tuple[str, ...]) -> str:
        return timings.report({"a": [1000] * 5}, throttled=throttled).verdict

    @pytest.mark.parametrize("happens", ["over-current", "heat", "clock"])
    def test_is_invalid_and_says_why(self, jetson, happens):
        calm, disturbed = (self.conditions(jetson, each).throttled for each in ("nothing", happens))

        assert self.verdict(calm) == "valid"
        assert self.verdict(disturbed).startswith("invalid: the board throttled in 10 of 10 processes: ")

    def test_a_replayed_trace_flips_the_verdict(self):
        lines = [f"RAM 1/2MB GR3D_FREQ 98%@[{clock}] tj@{tj}C" for clock, tj in ((1020, 70), (1020, 82), (816, 88), (612, 92))]

        found = [sample for line in lines if (sample := parse(line)) is not None]

        assert self.verdict(tuple(throttling.of_samples(found[:2]))) == "valid"
        assert "from 1020 to 714 MHz" in self.verdict(tuple(throttling.of_samples(found)))

    def watched(self, jetson: Jetson, folder: Path, monkeypatch: pytest.MonkeyPatch, *trace: tuple[int, int]) -> Conditions:
        """A window in which tegrastats says of each (GPU clock, temperature)."""
        lines = [f"RAM 1/2MB GR3D_FREQ 98%@[{clock}] tj@{tj}C VDD_IN 9000mW/1mW VDD_SOC 1mW/1mW" for clock, tj in trace]
        folder.mkdir()
        (folder / "trace").write_text("\n".join(lines) + "\nRAM 1/2MB GR3D_F")  # and half a line
        tool = folder / "tegrastats"
        tool.write_text(f"#!/bin/sh\n/bin/cat {folder}/trace\n: > {folder}/said\nexec /bin/sleep 60\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        with Watch(jetson.root) as watch:
            while not (folder / "said").exists():
                watch.look()
        return watch.conditions

    def test_a_trace_that_tegrastats_replays_flips_the_verdict_of_a_benchmark(self, jetson, tmp_path, monkeypatch):
        calm = self.watched(jetson, tmp_path / "calm", monkeypatch, (306, 50), (1020, 70), (1020, 82))
        hot = self.watched(jetson, tmp_path / "hot", monkeypatch, (1020, 70), (1020, 82), (816, 88), (612, 92))

        assert self.verdict(calm.throttled) == "valid"
        assert "invalid: the board throttled in 10 of 10 processes: the GPU's clock fell from 1020 to 714 MHz" in self.verdict(
            hot.throttled
        )
        assert hot.throttled[1] == "the board was at 92 degrees, and throttles above 85"

    def test_mode_clocks_and_energy_are_recorded_and_told(self, jetson, tmp_path, monkeypatch):
        jetson.write("var/lib/nvpmodel/status", "pmode:0002 fmode:quiet")
        jetson.write("etc/nvpmodel.conf", "< POWER_MODEL ID=2 NAME=MAXN_SUPER >")

        found = self.watched(jetson, tmp_path / "tool", monkeypatch, (1020, 60), (1005, 61))
        report = timings.report({"a": [2_000_000] * 5}, energy_uj=9_000_000, power_mode=found.power_mode, gpu_mhz=found.gpu_mhz)

        assert (found.power_mode, found.gpu_mhz, found.power_w) == ("MAXN_SUPER", (1020, 1005), pytest.approx(9.0, rel=1e-3))
        assert report.board == {"power_modes": ["MAXN_SUPER"], "gpu_mhz": [1005, 1020]}
        assert report.engine("a").energy_mj == pytest.approx(9.0 * 2)  # 9 W over a second, for 2 ms

    def test_without_tegrastats_the_rails_of_sysfs_say_what_it_took(self, jetson, monkeypatch):
        monkeypatch.setenv("PATH", "")
        jetson.write("sys/class/hwmon/hwmon1/name", "ina3221")
        for name, value in (("in1_label", "VDD_IN"), ("in1_input", 5000), ("curr1_input", 1200)):
            jetson.write(f"sys/class/hwmon/hwmon1/{name}", value)
        with Watch(jetson.root) as watch:
            pass

        assert watch.conditions.power_w == pytest.approx(6.0, rel=1e-3)

    def test_a_tool_that_is_no_program_is_done_without(self, jetson, tmp_path):
        (tmp_path / "tegrastats").write_text("")
        with Recorder(jetson.root, str(tmp_path / "tegrastats")) as recorder:
            pass

        assert recorder.seen.throttled == ()

    def test_what_was_seen_is_kept_with_the_raw_samples(self):
        report = timings.report(
            {"a": [1000] * 5}, throttled=("3 over-current events (oc3)",), gpu_mhz=(306, 1020), power_mode="15W"
        )

        assert BenchmarkReport.from_json(to_json(report)) == report


GPU = """
exec(open({real!r}).read())
states, asked = {states!r}, []
def nvmlInit():
    {init}
def nvmlDeviceGetCount():
    return {count}
def nvmlDeviceGetHandleByIndex(index):
    return index
def nvmlDeviceGetHandleByPciBusId(pciBusId):
    if pciBusId != "0000:65:00.0":
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    return 0
def nvmlDeviceGetClockInfo(handle, type):
    assert type == NVML_CLOCK_SM
    asked.append(handle)
    if len(asked) == len(states):
        open({said!r}, "w").close()
    return states[min(len(asked), len(states)) - 1][0]
def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return states[min(max(len(asked), 1), len(states)) - 1][1]
"""
IDLE, POWER, HEAT, FIXED = (
    pynvml.nvmlClocksEventReasonGpuIdle,
    pynvml.nvmlClocksEventReasonSwPowerCap,
    pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
)


class TestAGpu:
    @pytest.fixture
    def watched(self, tmp_path, monkeypatch):
        """A window in which NVML says of each look (clock, reasons), and then the last of them again."""

        def watch(*states: tuple[int, int], init: str = "pass", count: int = 1, gpu: str = "") -> Conditions:
            said = tmp_path / "said"
            written = GPU.format(real=pynvml.__file__, states=states, init=init, count=count, said=str(said))
            (tmp_path / "pynvml.py").write_text(written)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
            with Watch(tmp_path, gpu=gpu) as watch:
                while states and not said.exists():
                    time.sleep(0.01)
            return watch.conditions

        return watch

    def test_its_clocks_are_those_while_it_does_not_idle(self, watched):
        found = watched((345, IDLE), (1980, 0), (1965, FIXED))

        assert set(found.gpu_mhz) == {1980, 1965}
        assert (found.throttled, found.gpu_unseen) == ((), "")
        assert timings.report({"a": [1000] * 5}, gpu_mhz=found.gpu_mhz).board["gpu_mhz"] == [1965, 1980]

    @pytest.mark.parametrize(("reason", "told"), [(POWER, "its power limit"), (HEAT, "heat, by its hardware")])
    def test_a_clock_that_was_held_down_makes_the_run_invalid_and_says_by_what(self, watched, reason, told):
        found = watched((1980, 0), (1200, reason))

        verdict = timings.report({"a": [1000] * 5}, throttled=found.throttled).verdict
        assert f"invalid: the GPU throttled in 10 of 10 processes: its clock was held down by {told} in " in verdict

    def test_one_of_several_is_found_by_its_place_on_the_bus(self, watched):
        assert watched((1980, 0), count=4, gpu="0000:65:00.0").gpu_mhz
        assert watched(count=4).gpu_unseen == "which of 4 GPUs was measured is not known"
        assert "Not Found" in watched(count=4, gpu="0000:99:00.0").gpu_unseen

    def test_without_a_driver_or_the_package_the_report_says_so_and_the_run_stays_valid(self, watched, tmp_path, monkeypatch):
        found = watched(init="raise NVMLError(NVML_ERROR_DRIVER_NOT_LOADED)")
        assert found.gpu_unseen == "NVIDIA's management library says: Driver Not Loaded"

        (tmp_path / "pynvml.py").write_text("raise ImportError")
        with Watch(tmp_path, gpu="") as watch:
            pass

        unseen = watch.conditions.gpu_unseen
        assert unseen == "nvidia-ml-py is not installed (pip install 'deploykit[gpu]')"
        report = timings.report({"a": [1000] * 5}, gpu_unseen=unseen)
        assert (report.verdict, report.board["unseen"]) == ("valid", unseen)
        assert BenchmarkReport.from_json(to_json(report)) == report

    def test_a_program_that_dies_is_told(self, watched, tmp_path):
        assert "said nothing" in watched(init="import os; os._exit(1)").gpu_unseen

    def test_where_no_gpu_is_measured_nobody_asks(self, monkeypatch):
        monkeypatch.setattr(nvml, "Recorder", None)
        with Watch() as watch:
            pass

        assert (watch.conditions.gpu_mhz, watch.conditions.gpu_unseen) == ((), "")

    def test_a_jetson_has_tegrastats_instead(self, jetson, monkeypatch):
        monkeypatch.setattr(nvml, "Recorder", None)
        with Watch(jetson.root, gpu=""):
            pass
