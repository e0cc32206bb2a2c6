"""The door for files of others: what comes through unharmed, that nothing else does, and what a reader's process can do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import hypothesis
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit import inspect
from deploykit.errors import ModelError, UsageError
from deploykit.intake import archive, checkpoint, child, door
from deploykit.intake import onnx as graphs
from deploykit.intake import safetensors as header
from deploykit.intake.child import Limits
from deploykit.intake.refused import Refused
from deploykit.models import stored

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
MORE_DTYPES = (torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.uint64)
SMALL = Limits(cpu_s=2, memory_bytes=256 << 20)


def saved(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any type and shape, with gaps, turned or expanded."""
    dtype = draw(st.sampled_from(DTYPES + MORE_DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape, dtype=int))
    made = torch.arange(count + 3).to(dtype)[draw(st.integers(0, 3)) :][:count].reshape(shape)
    change = draw(st.sampled_from(("", "turned", "gaps", "expanded")))
    if made.dim() and change == "turned":
        return made.transpose(0, -1)
    if made.dim() and change == "gaps":
        return made[::2]
    return made.unsqueeze(0).expand(3, *made.shape) if change == "expanded" else made


VALUES = st.recursive(
    st.one_of(
        tensors(), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False), st.text(max_size=20), st.none(), st.booleans()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers(0, 5)), inner, max_size=4),
        st.lists(st.tuples(st.text(max_size=8), inner), max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        assert type(one) is type(other)
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
        if tensor.numel()
        else b""
    )


class TestCheckpoints:
    @settings(deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @given(content=VALUES, legacy=st.booleans())
    def test_are_read_as_torch_reads_them(self, tmp_path, content, legacy):
        path = saved(tmp_path / "some.pth", content, legacy=legacy)

        try:
            wanted = torch.load(path, weights_only=True)
        except AttributeError:  # torch cannot read types without a storage type of their own in its older format
            hypothesis.reject()

        assert same(wanted, stored.read(path))

    @pytest.mark.parametrize("legacy", [False, True])
    def test_keep_the_versions_of_modules(self, tmp_path, legacy):
        wanted = torch.nn.BatchNorm2d(3).state_dict()

        read = stored.read(saved(tmp_path / "net.pth", {"state_dict": wanted}, legacy=legacy))["state_dict"]

        assert read._metadata == wanted._metadata

    @pytest.mark.parametrize("legacy", [False, True])
    def test_may_share_numbers_between_tensors(self, tmp_path, legacy):
        whole = torch.arange(10.0)

        read = stored.read(saved(tmp_path / "net.pth", {"a": whole, "b": whole[3:7], "c": whole[::3]}, legacy=legacy))

        assert [read[name].tolist() for name in "bc"] == [[3, 4, 5, 6], [0, 3, 6, 9]]

    def test_hold_parameters_and_tensors_with_attributes_as_tensors(self, tmp_path):
        marked = torch.ones(2)
        marked.origin = "here"

        read = stored.read(saved(tmp_path / "net.pth", {"p": torch.nn.Parameter(torch.ones(2)), "m": marked}))

        assert read["p"].tolist() == read["m"].tolist() == [1, 1]

    def test_may_hold_what_is_no_plain_tensor_which_is_named_and_not_looked_into(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates its own quantized tensors
            quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        odd = {"s": torch.eye(2).to_sparse(), "d": torch.device("cpu"), "q": quantized, "n": Counter("aab"), "set": {1, 2}}

        read = stored.read(saved(tmp_path / "net.pth", odd))

        assert [read[key].name for key in ("s", "d", "q", "set")] == [
            *("torch._utils._rebuild_sparse_tensor", "torch.device", "torch._utils._rebuild_qtensor", "builtins.set"),
        ]
        assert read["n"] == {"a": 2, "b": 1}

    def test_of_training_with_optimizer_and_random_state_are_read(self, tmp_path):
        network = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "epoch": 3}

        assert same(torch.load(saved(tmp_path / "run.pth", content), weights_only=True), stored.read(tmp_path / "run.pth"))

    def test_take_no_memory_before_they_are_looked_at(self, tmp_path):
        path = saved(tmp_path / "large.pth", {"w": torch.zeros(64 << 20, dtype=torch.uint8)})
        program = (
            "import sys, resource; from pathlib import Path; from deploykit.models import stored\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "found = stored.read(Path(sys.argv[1]))['w']\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )

        grown = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout

        assert int(grown) * 1024 < 16 << 20

    def test_written_to_stay_as_they_were_on_disk(self, tmp_path):
        path = saved(tmp_path / "net.pth", {"w": torch.zeros(4)})
        before = path.read_bytes()

        stored.read(path)["w"].fill_(1)

        assert path.read_bytes() == before

    @settings(deadline=None, max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @given(data=st.data(), legacy=st.booleans())
    def test_that_are_damaged_anywhere_are_refused_or_read_within_their_own_bytes(self, tmp_path, data, legacy):
        content = bytearray(
            saved(tmp_path / "net.pth", {"state_dict": torch.nn.Linear(3, 2).state_dict()}, legacy=legacy).read_bytes()
        )
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, 40))
        (tmp_path / "net.pth").write_bytes(content[: len(content) - cut])

        with (tmp_path / "net.pth").open("rb") as file:
            try:
                told = json.loads(json.dumps(checkpoint.read(file)))
            except Refused:
                return

        for dtype, start, elements, *_ in tensors_in(told):
            assert 0 <= start <= start + elements * checkpoint.SIZES[dtype] <= len(content) - cut


def tensors_in(told: object) -> list[list]:
    if isinstance(told, list):
        return [found for item in told for found in tensors_in(item)]
    if isinstance(told, dict):
        return [told["tensor"]] if "tensor" in told else [found for item in told.values() for found in tensors_in(item)]
    return []


class TestArchives:
    def test_of_torch_give_the_place_of_every_record(self, tmp_path):
        path = saved(tmp_path / "net.pth", {"w": torch.arange(3.0)})

        with path.open("rb") as file:
            record = archive.records(file)["data/0"]

        assert np.frombuffer(path.read_bytes()[record.start :][: record.size], np.float32).tolist() == [0, 1, 2]


class TestSafetensors:
    @settings(deadline=None, max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_that_pass_are_those_that_the_library_reads(self, tmp_path, data):
        content = bytearray(
            safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, {"format": "pt"})
        )
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0123456789"{}[],:FIU\x00\xff'))
        (tmp_path / "net.safetensors").write_bytes(content)

        try:
            header.check(tmp_path / "net.safetensors")
        except Refused:
            return

        # What passes may still be odd in ways that only the library knows; then it says so, in its own class of error.
        with contextlib.suppress(safetensors.SafetensorError):
            safetensors.torch.load_file(tmp_path / "net.safetensors")

    def test_without_any_tensor_and_with_metadata_pass(self, tmp_path):
        safetensors.torch.save_file({}, tmp_path / "net.safetensors", {"format": "pt"})

        header.check(tmp_path / "net.safetensors")


@pytest.fixture
def good(tmp_path) -> Path:
    """A graph with a constant in every form that ONNX has."""
    floats = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    listed = helper.make_tensor("listed", TensorProto.FLOAT, [2], [1.0, 2.0])
    nibbles = helper.make_tensor("nibbles", TensorProto.INT4, [3], [1, 2, 3])
    halves = helper.make_tensor("halves", TensorProto.FLOAT16, [2], [1.0, 2.0])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, -1])
    truth = helper.make_tensor("truth", TensorProto.BOOL, [1], [True])
    texts = helper.make_tensor("texts", TensorProto.STRING, [2], [b"a", b"b"])
    value = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.int64([2]), "inner"))
    nodes = [value, helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Reshape", ["h", "shape"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "m"])]
    constants = [floats, listed, nibbles, halves, shape, truth, texts]
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "good.onnx")
    return tmp_path / "good.onnx"


class TestGraphs:
    def test_with_constants_in_every_form_pass_and_are_counted(self, good):
        assert door.onnx_file(good) == graphs.Summary(nodes=3, external=())

    @pytest.mark.parametrize("name", ["residual", "mobile", "attention"])
    def test_of_our_own_export_pass_and_open(self, portable, name):
        path = portable(name).path

        assert door.onnx_file(path).nodes == len(onnx.load(path).graph.node)
        assert door.rehearse(path) == ""

    def test_with_data_beside_them_pass_and_name_it_and_can_be_looked_at(self, good, tmp_path):
        model = onnx.load(good)
        del model.graph.initializer[-1]  # texts are never stored elsewhere
        (tmp_path / "deep").mkdir()
        onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="deep/w.bin", size_threshold=1)

        assert "w" in door.onnx_file(tmp_path / "outside.onnx").external
        assert inspect.inspect(tmp_path / "outside.onnx")["operators"]["MatMul"] == 1

    def test_that_a_runtime_refuses_are_told_with_its_reason_and_not_refused_here(self, good):
        model = onnx.load(good)
        model.graph.node[1].input[0] = "nobody"
        onnx.save(model, good)

        assert "nobody" in door.rehearse(good)

    def test_with_several_faults_are_refused_with_all_of_them(self, good):
        model = onnx.load(good)
        model.graph.initializer[0].dims[0] = 7
        model.graph.initializer[1].dims[0] = -1
        model.graph.node.add(op_type="Loop", name="l")
        onnx.save(model, good)

        with pytest.raises(UsageError) as refused:
            door.onnx_file(good)

        assert str(refused.value).startswith(f"{good} is refused\n")
        assert [problem.split(" ")[0] for problem in refused.value.problems] == ["constant", "constant", "operators"]

    @settings(deadline=None, max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_that_are_damaged_anywhere_are_refused_or_looked_through_in_no_time(self, good, data):
        content = bytearray(good.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        mutated = good.with_name("mutated.onnx")
        mutated.write_bytes(content)
        start = monotonic()

        with contextlib.suppress(Refused):
            graphs.check(mutated)

        assert monotonic() - start < 2

    def test_are_cut_nowhere_without_being_refused(self, good):
        content = good.read_bytes()
        cut = good.with_name("cut.onnx")

        for end in range(0, len(content), 5):
            cut.write_bytes(content[:end])
            with pytest.raises(UsageError):
                door.onnx_file(cut)


@pytest.fixture
def reader(monkeypatch, tmp_path) -> Callable[[str], object]:
    """Run lines of Python as a reader, in the process that readers have; `file` is the file, `answer` is what is told."""
    (tmp_path / "file").write_bytes(b"content")

    def run(lines: str, limits: Limits = SMALL) -> object:
        body = "".join(f"    {line}\n" for line in ["answer = None", *lines.splitlines(), "return answer"])
        program = "import os, sys, json\nsys.path += json.loads(sys.argv[1])['path']\nfrom deploykit.intake import inside\n"
        program += f"def read(file):\n{body}inside.READERS['test'] = lambda: read\ninside.main()"
        monkeypatch.setattr(child, "_PROGRAM", program)
        return child.ask("test", tmp_path / "file", limits)

    return run


class TestTheProcessOfAReader:
    def test_reads_the_file_and_answers(self, reader):
        assert reader("answer = [file.read().decode(), os.listdir('.')]") == ["content", ["complaints.txt"]]

    def test_has_nothing_of_our_environment_or_folder(self, reader, monkeypatch, tmp_path):
        monkeypatch.setenv("SECRET", "x")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "struct.py").write_text("raise SystemExit('a file of the current directory was imported')")

        environment, path = reader("import struct\nanswer = [dict(os.environ), sys.path]")

        assert "SECRET" not in environment
        assert "HOME" not in environment
        assert str(tmp_path) not in path

    @pytest.mark.parametrize(
        ("lines", "why"),
        [
            ("os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
            ("os.abort()", "crashed (SIGABRT)"),
            ("while True: pass", "took more than 2 s"),
            ("bytearray(1 << 30)", "took more than 0.2 GiB of memory"),
            ("open('large', 'wb').write(bytes(65 << 20))", "File too large"),
            ("[open('/dev/null') for _ in range(100)]", "Too many open files"),
            ("os._exit(0)", "gave no answer"),
            ("os._exit(7)", "it said nothing"),
            ("1 / 0", "ZeroDivisionError"),
            ("answer = object()", "not JSON serializable"),
            ("open('answer.json', 'w').write('[' * 100000); os._exit(0)", "gave no answer"),
            ("open('answer.json', 'w').write('{}'); os._exit(0)", "gave no answer"),
            ("os.symlink('/etc/passwd', 'answer.json'); os._exit(0)", "gave no answer"),
        ],
    )
    def test_that_ends_in_another_way_is_one_clear_error(self, reader, lines, why):
        with pytest.raises(Refused) as refused:
            reader(lines)

        assert why in refused.value.why

    def test_that_sleeps_is_ended(self, reader, monkeypatch):
        monkeypatch.setattr(child, "_START_UP_S", 1)
        start = monotonic()

        with pytest.raises(Refused, match="took more than 0 s"):
            reader("import time; time.sleep(60)", Limits(cpu_s=0, memory_bytes=256 << 20))

        assert monotonic() - start < 10

    def test_is_cut_off_from_the_network_where_the_kernel_allows_it(self, reader):
        if not child.gives_up()["network"]:
            pytest.skip("wants a kernel that lets a process leave the network")

        devices = reader("answer = [line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]")

        assert devices in ([], ["lo"])
        with pytest.raises(Refused, match=r"unreachable"):
            reader("import socket; socket.create_connection(('127.0.0.1', 9), 2)")

    def test_writes_nowhere_else_where_the_kernel_allows_it(self, reader, tmp_path):
        if not child.gives_up()["folders"]:
            pytest.skip("wants a kernel with Landlock")
        (tmp_path / "thesis.txt").write_text("years of work")

        for lines in ("open(r'{}', 'w')", "os.truncate(r'{}', 0)", "os.remove(r'{}')", "os.mkdir(r'{}' + '.d')"):
            with pytest.raises(Refused, match="PermissionError"):
                reader(lines.format(tmp_path / "thesis.txt"))

        assert (tmp_path / "thesis.txt").read_text() == "years of work"

    def test_leaves_nothing_behind(self, reader, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

        reader("os.mkdir('deep'); open('deep/file', 'w').write('x')")

        assert list((tmp_path / "tmp").iterdir()) == []

    def test_ends_when_its_user_interrupts(self, tmp_path, monkeypatch):
        path = saved(tmp_path / "net.pth", {"w": torch.ones(1)})
        waited: list[subprocess.Popen[bytes]] = []

        class Interrupted(subprocess.Popen):
            def wait(self, timeout=None):
                if not waited:
                    waited.append(self)
                    raise KeyboardInterrupt
                return super().wait(timeout)

        monkeypatch.setattr(subprocess, "Popen", Interrupted)

        with pytest.raises(KeyboardInterrupt):
            door.checkpoint(path)

        assert waited[0].returncode in (0, -signal.SIGKILL)

    def test_reads_paths_of_any_name(self, tmp_path):
        for name in (b"-rf", b"a b", b"new\nline", b"caf\xe9", b"quote'\"", b"{}"):
            path = tmp_path / os.fsdecode(name)
            with path.open("wb") as file:
                torch.save({"w": torch.ones(1)}, file)

            assert stored.read(path)["w"].item() == 1

    def test_that_refuses_a_path_of_any_name_prints_it_on_one_line(self, tmp_path):
        path = tmp_path / os.fsdecode(b"caf\xe9\n{}")
        path.write_bytes(b"hello")

        with pytest.raises(ModelError) as refused:
            door.checkpoint(path)

        assert str(refused.value).splitlines()[0] == f"{tmp_path}/caf\\xe9\\n{{}} is not a checkpoint"


IR_VERSION_9 = b"\x08\x09"


def nested(*fields: tuple[int, bytes]) -> bytes:
    """One ONNX file of messages in messages, each given as its field's number and what lies before the next one."""
    content = b""
    for number, before in reversed(fields):
        content = before + content
        length, rest = b"", len(content)
        while True:
            length += bytes([rest & 0x7F | (0x80 if rest > 0x7F else 0)])
            rest >>= 7
            if not rest:
                break
        content = bytes([number << 3 | 2]) + length + content
    return content


class TestGraphsOfAFewBytes:
    """ModelProto.graph is field 7, GraphProto.initializer 5, TensorProto.dims 1 and data_type 2."""

    @pytest.mark.parametrize("number", [2, 14])
    def test_with_text_in_the_place_of_a_number_are_refused(self, tmp_path, number):
        path = tmp_path / "net.onnx"
        path.write_bytes(IR_VERSION_9 + nested((7, b""), (5, bytes([number << 3 | 2, 0]))))

        with pytest.raises(UsageError, match="something else is stored where a whole number belongs"):
            door.onnx_file(path)

    @pytest.mark.parametrize(("pieces", "numbers"), [(1, 3_000_000), (100, 1000)])
    def test_with_very_many_dimensions_are_refused_before_all_are_read(self, tmp_path, pieces, numbers):
        path = tmp_path / "net.onnx"
        path.write_bytes(IR_VERSION_9 + nested((7, b""), (5, pieces * nested((1, bytes([1] * numbers))))))

        with pytest.raises(UsageError, match=r"a list of dimensions has more than 1024 numbers|has thousands of dimensions"):
            door.onnx_file(path)
