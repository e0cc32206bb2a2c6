"""What a machine says of itself, when two are the same, and what a broken one cannot spoil."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploykit import machine
from deploykit.jsonable import to_json
from deploykit.machine import Machine, available_cores, installed_version

JETSON = Machine(
    arch="aarch64",
    cpu="Cortex-A78AE",
    features=("asimd", "asimddp"),
    cores=6,
    memory_bytes=8 << 30,
    system="Linux 5.15.148-tegra",
    python="3.10.12",
    gpu="Orin, 540.4.0, 8.7",
    versions={"tensorrt": "10.3.0"},
)


@pytest.fixture
def files(monkeypatch):
    """The system's own files, made up: path -> content; the others are not there."""
    made: dict[str, str] = {}
    monkeypatch.setattr(machine, "_read", lambda path: made.get(str(path), ""))
    return made


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on the PATH, and nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(script: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(script)
        tool.chmod(0o755)

    return put


class TestProbing:
    @pytest.mark.parametrize(
        ("kernel", "here", "emulated"),
        [
            ("x86_64", "aarch64", True),
            ("aarch64", "x86_64", True),
            ("x86_64", "x86_64", False),
            ("x86_64", "i686", False),
            ("aarch64", "armv8l", False),
            ("", "aarch64", False),
        ],
    )
    def test_a_cpu_that_the_kernel_is_not_for_is_emulated(self, files, monkeypatch, kernel, here, emulated):
        files["/proc/cpuinfo"], files["/proc/sys/kernel/arch"] = "model name\t: Cortex-A76\n", f"{kernel}\n"
        monkeypatch.setattr(machine.platform, "machine", lambda: here)

        found = Machine.probe()

        assert (found.is_emulated, found.cpu) == (emulated, "Cortex-A76, emulated" if emulated else "Cortex-A76")

    def test_this_machine_says_what_it_is(self):
        here = Machine.probe()

        assert here.arch == os.uname().machine
        assert here.cpu
        assert 1 <= here.cores <= (os.cpu_count() or 1)
        assert here.memory_bytes > 1 << 26
        assert here.versions["deploykit"] == installed_version("deploykit")

    def test_it_imports_none_of_the_packages_whose_versions_it_lists(self):
        script = "import sys; from deploykit.machine import Machine; Machine.probe(); print(*sys.modules)"

        loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()

        assert not {"numpy", "torch", "onnx", "onnxruntime", "openvino", "tensorrt"} & set(loaded)

    def test_features_are_those_that_decide_about_int8_in_a_fixed_order(self, files, monkeypatch):
        monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
        files["/proc/cpuinfo"] = "processor\t: 0\nmodel name\t: Xeon: 8488C\nflags\t\t: amx_int8 fpu avx2 avx512_vnni\n"

        here = Machine.probe()

        assert (here.cpu, here.features) == ("Xeon: 8488C", ("avx2", "avx512_vnni", "amx_int8"))
        assert here.has_int8_dot_product

    def test_arm_has_other_words_for_them(self, files, monkeypatch):
        monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
        files["/proc/cpuinfo"] = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n"

        assert Machine.probe().features == ("asimd", "asimddp")

    def test_an_unknown_machine_without_proc_is_still_a_machine(self, files, monkeypatch):
        monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
        monkeypatch.setattr(machine.platform, "processor", lambda: "")

        here = Machine.probe()

        assert (here.cpu, here.features, here.has_int8_dot_product) == ("unknown", (), False)

    def test_a_package_that_is_not_installed_has_no_version(self):
        assert installed_version("no-such-package") is None


class TestCores:
    def test_the_affinity_of_the_process_counts(self):
        script = (
            "import os; from deploykit.machine import available_cores\n"
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cores())"
        )

        assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "1\n"

    @pytest.mark.parametrize(
        ("quota", "wanted"),
        [
            ("200000 100000\n", 2),
            ("150000 100000\n", 1),
            ("50000 100000\n", 1),
            ("9900000 100000\n", 8),
            ("max 100000\n", 8),
            ("", 8),
            ("rubbish", 8),
        ],
    )
    def test_the_quota_of_a_container_lowers_them_and_never_to_none(self, files, monkeypatch, quota, wanted):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        files["/sys/fs/cgroup/cpu.max"] = quota

        assert available_cores() == wanted


class TestGpu:
    def test_it_is_the_first_one_with_its_driver_and_compute_capability(self, nvidia_smi):
        nvidia_smi("#!/bin/sh\necho 'NVIDIA H200, 570.86, 9.0'\necho 'NVIDIA T4, 570.86, 7.5'\n")

        assert Machine.probe().gpu == "NVIDIA H200, 570.86, 9.0"

    @pytest.mark.parametrize(
        "script",
        [
            "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n",
            "#!/bin/sh\n",
            "#!/bin/sh\necho\necho\n",
            "#!/no/such/interpreter\n",
            "\x00not a program",
        ],
    )
    def test_a_broken_driver_is_no_gpu(self, nvidia_smi, script):
        nvidia_smi(script)

        assert Machine.probe().gpu is None

    def test_without_the_tool_there_is_no_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))

        assert Machine.probe().gpu is None

    def test_its_name_may_be_in_any_encoding(self, nvidia_smi):
        nvidia_smi("#!/bin/sh\nprintf 'GPU \\351, 1, 2\\n'\n")

        assert Machine.probe().gpu == "GPU \ufffd, 1, 2"


class TestIdentity:
    def test_a_machine_that_was_written_down_is_read_as_the_same(self):
        for wanted in (JETSON, Machine.probe()):
            assert Machine.from_json(json.loads(json.dumps(to_json(wanted)))) == wanted

    @pytest.mark.parametrize(
        ("field", "value"),
        [("arch", "x86_64"), ("cpu", "Cortex-A55"), ("features", ("asimd",)), ("cores", 4), ("gpu", None)],
    )
    def test_what_results_depend_on_makes_another_machine(self, field, value):
        assert replace(JETSON, **{field: value}).identity != JETSON.identity

    @pytest.mark.parametrize(
        ("field", "value"),
        [("memory_bytes", 1), ("system", "Linux 6.8"), ("python", "3.12"), ("versions", {})],
    )
    def test_what_changes_with_an_update_does_not(self, field, value):
        assert replace(JETSON, **{field: value}).identity == JETSON.identity

    @pytest.mark.parametrize("content", [{}, {"arch": "x86_64"}, {**vars(JETSON), "colour": "red"}])
    def test_what_is_not_a_machine_is_not_made_into_one(self, content):
        with pytest.raises((KeyError, TypeError)):
            Machine.from_json(content)


def test_files_that_are_not_there_or_not_text_are_no_obstacle(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    assert machine._read(tmp_path / "nothing") == machine._read(Path("/")) == ""
    assert machine._read(tmp_path / "binary") == "\ufffd\ufffd"
