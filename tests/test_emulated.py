"""A 64-bit ARM root as a device: what making one refuses, and what is run in one where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import arm64
from deploykit.emulate import CPUS
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError
from deploykit.remote import Connection, connect

ROOT = os.environ.get("DEPLOYKIT_ARM64_ROOT")


class TestMaking:
    def test_what_is_there_already_is_left_alone(self, tmp_path, deploykit):
        found = deploykit("device", "emulate", tmp_path)

        assert found.code == 2
        assert "is there already" in found.err
        assert list(tmp_path.iterdir()) == []

    def test_a_cpu_that_is_not_known_is_refused_with_those_that_are(self, tmp_path):
        with pytest.raises(UsageError, match=r"no emulated ARM CPU 'pentium'(.|\n)*cortex-a72, cortex-a76"):
            arm64.make(tmp_path / "root", "pentium")

    def test_without_mmdebstrap_it_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(CapabilityError, match=r"there is no mmdebstrap(.|\n)*Debian packages mmdebstrap"):
            arm64.make(tmp_path / "root")

    def test_a_tool_that_fails_is_quoted_and_leaves_nothing(self, tmp_path, monkeypatch):
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "mmdebstrap").write_text("#!/bin/sh\necho E: no mirror >&2\nexit 1\n")
        (tools / "mmdebstrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")

        with pytest.raises(StageError, match=r"mmdebstrap failed(.|\n)*E: no mirror"):
            arm64.make(tmp_path / "root")

        assert [path.name for path in tmp_path.iterdir()] == ["tools"]

    def test_the_root_is_whole_or_not_there_and_names_its_cpu(self, tmp_path, monkeypatch):
        def tool(command, **_):
            if command[0] == "mmdebstrap":
                (Path(command[-1]) / "etc").mkdir(parents=True)
                (Path(command[-1]) / "usr" / "bin").mkdir(parents=True)
            else:
                (Path(command[command.index("--target") + 1]) / "onnxruntime").mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(arm64.subprocess, "run", tool)
        monkeypatch.setattr(arm64.shutil, "which", lambda name: f"/usr/bin/{name}")
        steps = []

        arm64.make(tmp_path / "root", "cortex-a72", progress=lambda *step: steps.append(step))

        assert arm64.cpu_of(tmp_path / "root") == "cortex-a72"
        assert "asimddp" not in (tmp_path / "root" / "proc" / "cpuinfo").read_text()
        assert [done for _, done, _ in steps] == [0, 1, 2, 3]
        assert [path.name for path in tmp_path.iterdir()] == ["root"]

    def test_every_emulated_arm_cpu_can_be_one(self):
        assert set(arm64.CPUS) == {name for name, cpu in CPUS.items() if cpu.arch == "aarch64"}
        assert ["asimddp" in arm64.cpu_info(name) for name in ("cortex-a72", "cortex-a76")] == [False, True]


class TestConnecting:
    def test_a_folder_that_is_no_root_is_refused_with_the_command_that_makes_one(self, tmp_path):
        with pytest.raises(UsageError, match=r"is no 64-bit ARM root(.|\n)*deploykit device emulate"):
            connect(f"emulated://{tmp_path}")

    def test_without_qemu_it_says_what_to_install(self, tmp_path, monkeypatch):
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc" / "qemu-cpu").write_text("cortex-a76\n")
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(CapabilityError, match=r"no qemu-aarch64-static(.|\n)*Debian package qemu-user-static"):
            connect(f"emulated://{tmp_path}")

    def test_a_root_that_cannot_be_entered_is_a_lack_of_this_machine(self, tmp_path, monkeypatch):
        (tmp_path / "root" / "etc").mkdir(parents=True)
        (tmp_path / "root" / "etc" / "qemu-cpu").write_text("cortex-a76\n")
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in ("qemu-aarch64-static", "unshare", "chroot", "mount"):
            (tools / name).write_text("#!/bin/sh\necho unshare: unshare failed: Operation not permitted >&2\nexit 1\n")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        monkeypatch.setattr("deploykit.remote.emulated._PATH", str(tools))

        with pytest.raises(CapabilityError, match=r"cannot be entered(.|\n)*Operation not permitted(.|\n)*Linux 6\.7"):
            connect(f"emulated://{tmp_path}/root").run(["true"])


@pytest.fixture(scope="module")
def device() -> Connection:
    if ROOT is None:
        pytest.skip("wants a 64-bit ARM root: deploykit device emulate DIR, and DEPLOYKIT_ARM64_ROOT=DIR")
    return connect(f"emulated://{ROOT}")


class TestARealRoot:
    def test_is_a_64_bit_arm_machine_with_python_and_onnxruntime(self, device):
        done = device.run(["python3", "-c", "import platform, onnxruntime, numpy; print(platform.machine())"])

        assert (done.code, done.stdout) == (0, b"aarch64\n"), done.stderr

    def test_has_exit_codes_streams_and_signals_of_its_own(self, device):
        done = device.run(["sh", "-c", "echo out; echo err >&2; exit 3"])

        assert (done.code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
        assert device.run(["sh", "-c", "kill -9 $$"]).code == 137
        missing = device.run(["no-such-program"])
        assert (missing.code, "not found" in missing.words) == (127, True)

    @pytest.mark.parametrize("word", ["", "with space", "-x", "quote'\"s $HOME `id` ;&|<>*?", "new\nline", "ünï"])
    def test_gets_its_words_as_they_are(self, device, word):
        assert device.run(["printf", "%s", word]).stdout == word.encode()

    def test_takes_files_and_gives_them_back(self, device, tmp_path):
        content = bytes(range(256)) * 5000
        (tmp_path / "file").write_bytes(content)

        device.put(tmp_path / "file", "/tmp/a file")
        device.get("/tmp/a file", tmp_path / "back")

        assert (tmp_path / "back").read_bytes() == content
        with pytest.raises(DeploykitError, match="cannot read /tmp/nothing"):
            device.get("/tmp/nothing", tmp_path / "nothing")

    def test_does_not_see_this_machines_environment(self, device, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(sys.executable).parent))

        said = device.run(["sh", "-c", "echo $HOME $PYTHONPATH; pwd"]).stdout

        assert said == b"/root\n/root\n"
