"""The machine this runs on as a target: a Jetson by its device tree, a GPU by its name, a CPU by what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timings

from deploykit import forecast
from deploykit.targets import here
from deploykit.targets.latency import predict
from deploykit.telemetry import board


def files(root: Path, **content: str) -> Path:
    for name, text in content.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("model", "gib", "hz", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.4, 1_020_000_000, "orin-nano-8gb-super"),
        ("NVIDIA Orin Nano Developer Kit", 7.4, 624_750_000, "orin-nano-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30, 1_300_500_000, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin", 30, None, "agx-orin-32gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, 918_000_000, "orin-nx-16gb"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 7.6, None, "xavier-nx"),
        ("Jetson-AGX", 31, None, "agx-xavier"),
        ("quill", 7.7, None, "jetson-tx2"),
        ("NVIDIA Jetson Nano Developer Kit", 3.9, None, "jetson-nano"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122, None, "thor-t5000"),
    ],
)
def test_a_jetson_is_known_by_its_device_tree_its_memory_and_its_clock(model, gib, hz, name):
    found = here.jetson(model, gib, hz)

    assert found is not None
    assert found.name == name


def test_a_jetson_is_taken_in_the_power_mode_that_it_is_in(tmp_path):
    root = files(
        tmp_path,
        etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
        var__lib__nvpmodel__status="pmode:0003 fmode:quiet",
    )
    (root / "etc/nvpmodel.conf").write_text("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=3 NAME=7W >")
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano Developer Kit Super\0")
    (root / "sys/class/devfreq/17000000.gpu").mkdir(parents=True)
    (root / "sys/class/devfreq/17000000.gpu/max_freq").write_text("1020000000")

    assert board.current_mode(root) == (3, "7W")
    assert here.of_machine(replace(timings.HERE, memory_bytes=8 << 30), root).mode == "7W"


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("Tesla T4, 535.161, 7.5", "t4"),
        ("NVIDIA A100-SXM4-80GB, 550.54, 8.0", "a100"),
        ("NVIDIA A100-PCIE-40GB, 550.54, 8.0", "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3, 550.54, 9.0", "h100"),
        ("NVIDIA H100 PCIe, 550.54, 9.0", "h100-pcie"),
        ("NVIDIA A10, 550.54, 8.6", "a10"),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name_for_it(tmp_path, told, name):
    assert here.of_machine(replace(timings.HERE, gpu=told), tmp_path).name == name


def test_another_machine_is_its_cpu(tmp_path):
    root = files(
        tmp_path,
        sys__devices__system__cpu__cpu0__cpufreq__cpuinfo_max_freq="3500000\n",
        sys__devices__system__cpu__cpu0__cache__index2__size="512K\n",
        sys__devices__system__cpu__cpu0__cache__index3__size="32M\n",
    )
    found = here.of_machine(replace(timings.HERE, features=("avx2", "fma")), root)

    assert found.kind == "cpu"
    assert found.value("cpu_mhz") == 3500
    assert found.value("l2_kib") == 32 * 1024
    assert found.rate("fp32") == 32 * 2 * 3.5e9
    assert found.figures["bandwidth_gbs"].derived


def test_one_that_says_nothing_is_guessed_and_says_so(tmp_path):
    found = here.of_machine(replace(timings.HERE, arch="riscv64", features=(), gpu="Quadro 9000"), tmp_path)

    assert "guess" in found.figures["cpu_mhz"].source
    assert found.rate("fp32") > 0


def test_this_machine_is_a_target(portable):
    network = forecast.network_of(str(portable("lenet5").path))

    assert predict(network, forecast.target_of("local"), "fp32").latency_ns > 0
