"""What `deploykit.models.checkpoint` reads, what it refuses, and how weights are fitted to a network."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from deploykit.errors import ModelError
from deploykit.models.checkpoint import StateDict, fit, load_state_dict


class Net(nn.Module):
    """A convolution, a BatchNorm and a head."""

    def __init__(self, num_classes: int = 4, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)


def build(classes: int | None) -> nn.Module:
    return Net() if classes is None else Net(classes)


def saved(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state_dict[name]) for name, tensor in module.state_dict().items())


class TouchesAMarker:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


class TestReading:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_plain_state_dict_is_read_in_both_formats_of_torch(self, tmp_path, legacy):
        wanted = Net().state_dict()

        read = load_state_dict(saved(tmp_path / "net.pth", wanted, legacy=legacy))

        assert list(read) == list(wanted)
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)

    def test_safetensors_are_read(self, tmp_path):
        wanted = Net().state_dict()
        safetensors.torch.save_file(wanted, tmp_path / "net.safetensors")

        read = load_state_dict(tmp_path / "net.safetensors")

        assert all(torch.equal(read[name], wanted[name]) for name in wanted)

    @pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "net", "anything"])
    def test_weights_are_found_under_any_entry_beside_what_training_left(self, tmp_path, entry):
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
        training = {"epoch": 3, "best_prec1": torch.tensor(91.0), "optimizer": optimizer, "rng": {"cpu": torch.get_rng_state()}}
        path = saved(tmp_path / "run.pth", {**training, entry: Net().state_dict()})

        assert set(load_state_dict(path)) == set(Net().state_dict())

    def test_two_sets_of_weights_are_listed_and_weights_key_picks_one(self, tmp_path):
        average = {name: torch.zeros_like(tensor) for name, tensor in Net().state_dict().items()}
        path = saved(tmp_path / "run.pth", {"model": Net().state_dict(), "model_ema": average})

        with pytest.raises(ModelError, match=r"several sets(.|\n)*model: 9 tensors(.|\n)*model_ema: 9(.|\n)*model.weights_key"):
            load_state_dict(path)
        assert not load_state_dict(path, "model_ema")["head.weight"].any()

    def test_a_weights_key_that_is_not_there_is_answered_with_those_that_are(self, tmp_path):
        path = saved(tmp_path / "run.pth", {"model": Net().state_dict()})

        with pytest.raises(ModelError, match=r"no weights under 'ema'(.|\n)*model holds weights"):
            load_state_dict(path, "ema")

    def test_a_checkpoint_with_only_an_optimizer_lists_its_entries(self, tmp_path):
        path = saved(tmp_path / "optimizer.pth", {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3})

        with pytest.raises(ModelError, match="its entries are optimizer, epoch"):
            load_state_dict(path)

    def test_versions_of_modules_are_kept(self, tmp_path):
        path = saved(tmp_path / "net.pth", Net().state_dict())

        assert load_state_dict(path).versions["bn"] == {"version": 2}


class TestRefusing:
    def test_a_malicious_pickle_is_refused_and_never_runs(self, tmp_path):
        marker = tmp_path / "marker"
        evil = {"weight": torch.ones(1), "payload": TouchesAMarker(marker)}
        bare = tmp_path / "bare.pkl"
        bare.write_bytes(pickle.dumps(evil["payload"], protocol=2))

        for path in (saved(tmp_path / "zip.pth", evil), saved(tmp_path / "legacy.pth", evil, legacy=True), bare):
            with pytest.raises(ModelError, match=r"refused to load .*: it wants posix.system(.|\n)*can run any code"):
                load_state_dict(path)

        assert not marker.exists()

    def test_a_pickle_of_another_program_is_refused_without_advice_to_trust_it(self, tmp_path):
        path = tmp_path / "bare.pkl"
        path.write_bytes(pickle.dumps({"weight": 1}, protocol=4))

        with pytest.raises(ModelError, match=r"bare\.pkl(.|\n)*torch\.save did not write") as caught:
            load_state_dict(path)
        assert "weights_only" not in str(caught.value)

    def test_a_pickled_module_is_refused_with_its_class(self, tmp_path):
        path = saved(tmp_path / "whole.pth", nn.Linear(2, 2))

        with pytest.raises(ModelError, match=r"torch\.nn\.modules\.linear\.Linear(.|\n)*model\.state_dict\(\)"):
            load_state_dict(path)

    @pytest.mark.parametrize(
        ("member", "kind"),
        [
            ("constants.pkl", "TorchScript"),
            ("archive_format", "exported program"),
            ("serialized_exported_program.json", "exported"),
        ],
    )
    def test_programs_are_refused_before_torch_sees_them(self, tmp_path, member, kind):
        with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
            archive.writestr("net/data.pkl", b"")
            archive.writestr(f"net/{member}", b"")

        with pytest.raises(ModelError, match=kind):
            load_state_dict(tmp_path / "net.pt")

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.999])
    def test_a_truncated_file_is_named(self, tmp_path, legacy, kept):
        path = saved(tmp_path / "net.pth", Net(width=50).state_dict(), legacy=legacy)
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])

        with pytest.raises(ModelError, match=r"net\.pth"):
            load_state_dict(path)

    def test_truncated_safetensors_are_named(self, tmp_path):
        path = tmp_path / "net.safetensors"
        path.write_bytes(safetensors.torch.save(Net().state_dict())[:-5])

        with pytest.raises(ModelError, match=r"net\.safetensors"):
            load_state_dict(path)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "it is empty"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
            (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"hello", "starts with b'hello'"),
            (b"\x80\x02garbage", "damaged"),
        ],
    )
    def test_files_of_another_kind_are_called_what_they_are(self, tmp_path, content, why):
        (tmp_path / "net.pth").write_bytes(content)

        with pytest.raises(ModelError, match=rf"net\.pth(.|\n)*{why}"):
            load_state_dict(tmp_path / "net.pth")

    @pytest.mark.parametrize(("offset", "byte"), [(0, 0xFF), (6, 0xFF), (46, 0x92)], ids=["signature", "version", "name"])
    def test_a_damaged_table_of_contents_is_a_damaged_file(self, tmp_path, offset, byte):
        path = saved(tmp_path / "net.pth", Net().state_dict())
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02") + offset] = byte
        path.write_bytes(content)

        with pytest.raises(ModelError, match=r"net\.pth(.|\n)*truncated or damaged"):
            load_state_dict(path)

    def test_an_ordinary_zip_is_not_a_checkpoint(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
            archive.writestr("readme.txt", "hello")

        with pytest.raises(ModelError, match="zip archive without a checkpoint"):
            load_state_dict(tmp_path / "net.zip")

    def test_a_missing_file_and_a_directory_are_named(self, tmp_path):
        with pytest.raises(ModelError, match=r"nowhere\.pth(.|\n)*no such file"):
            load_state_dict(tmp_path / "nowhere.pth")
        with pytest.raises(ModelError, match="it is a directory"):
            load_state_dict(tmp_path)

    def test_an_unreadable_file_is_named(self, tmp_path, monkeypatch):
        path = saved(tmp_path / "net.pth", Net().state_dict(), legacy=True)

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(io, "open", refuse)  # root may read everything, so permissions alone would not do
        monkeypatch.setattr(Path, "open", refuse)

        with pytest.raises(ModelError, match=r"net\.pth(.|\n)*permission denied"):
            load_state_dict(path)

    def test_nan_and_infinite_weights_are_named(self, tmp_path):
        state_dict = Net().state_dict()
        state_dict["bn.running_var"][1] = float("nan")
        state_dict["head.bias"][0] = float("inf")

        with pytest.raises(ModelError, match=r"2: bn\.running_var, head\.bias"):
            load_state_dict(saved(tmp_path / "net.pth", state_dict))

    def test_values_that_are_not_tensors_are_named(self, tmp_path):
        path = saved(tmp_path / "net.pth", {**Net().state_dict(), "epoch": 3})

        with pytest.raises(ModelError, match=r"1: epoch \(int\)"):
            load_state_dict(path)

    def test_a_single_tensor_is_not_a_checkpoint(self, tmp_path):
        with pytest.raises(ModelError, match="it holds a Tensor"):
            load_state_dict(saved(tmp_path / "net.pth", torch.ones(3)))


class TestFitting:
    def test_what_was_saved_is_what_the_network_holds(self, tmp_path):
        wanted = Net().state_dict()

        module, notes = fit(build, load_state_dict(saved(tmp_path / "net.pth", wanted)), source="net.pth")

        assert same(module, wanted)
        assert notes == ()

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.module."])
    def test_names_of_wrappers_are_taken_off(self, prefix):
        wanted = Net().state_dict()
        versions = {f"{prefix}bn": {"version": 2}}

        wrapped = StateDict({prefix + name: tensor for name, tensor in wanted.items()}, versions)

        assert same(fit(build, wrapped, source="net.pth")[0], wanted)

    def test_versions_of_modules_lose_the_wrapper_too(self):
        seen: list[int | None] = []

        class Versioned(nn.Linear):
            def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
                seen.append(local_metadata.get("version"))
                super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

        wrapped = {f"module.0.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}
        fit(lambda _: nn.Sequential(Versioned(2, 2)), StateDict(wrapped, {"": {}, "module.0": {"version": 7}}), source="net.pth")

        assert seen == [7]

    def test_the_counter_of_weight_averaging_is_left_out(self):
        average = torch.optim.swa_utils.AveragedModel(Net())

        module, _ = fit(build, StateDict.of(average.state_dict()), source="ema.pth")

        assert same(module, average.module.state_dict())

    def test_a_wrapper_that_does_not_lead_to_the_network_stays_in_the_message(self):
        with pytest.raises(ModelError, match=r"1 unexpected: module\.other\.weight"):
            fit(build, StateDict({"module.other.weight": torch.ones(1)}), source="net.pth")

    def test_files_from_before_batches_were_counted_load(self):
        old = {name: tensor for name, tensor in Net().state_dict().items() if "num_batches_tracked" not in name}

        for versions in (None, {"bn": {"version": 2}}):
            module, notes = fit(build, StateDict(old, versions), source="old.pth")
            assert torch.equal(module.state_dict()["conv.weight"], old["conv.weight"])
            assert notes == ()

    def test_the_network_is_built_with_the_checkpoints_number_of_classes(self):
        wanted = Net(num_classes=7).state_dict()

        module, notes = fit(build, StateDict(wanted), source="net.pth")

        assert same(module, wanted)
        assert notes == ("net.pth has 7 classes, so the network was built with 7",)

    def test_a_number_of_classes_that_was_asked_for_is_not_changed(self):
        with pytest.raises(ModelError, match=r"7 classes \(tensor head\.weight\), the network has 5(.|\n)*model\.classes = 7"):
            fit(build, StateDict(Net(7).state_dict()), source="net.pth", classes=5)

    def test_a_network_that_cannot_change_its_number_of_classes_says_so(self):
        with pytest.raises(ModelError, match=r"7 classes (.|\n)*network has 4(.|\n)*num_classes"):
            fit(lambda _: Net(), StateDict(Net(7).state_dict()), source="net.pth")

    def test_another_width_is_not_taken_for_another_number_of_classes(self):
        with pytest.raises(ModelError, match=r"does not fit(.|\n)*conv\.weight is float32 5x1x3x3, the network has float32 3x1"):
            fit(build, StateDict(Net(width=5).state_dict()), source="net.pth")

    def test_another_kernel_size_is_not_taken_for_another_number_of_classes(self):
        weights = {**Net().state_dict(), "conv.weight": torch.ones(3, 1, 5, 5)}

        with pytest.raises(ModelError, match=r"does not fit(.|\n)*1 different: conv\.weight is float32 3x1x5x5"):
            fit(build, StateDict(weights), source="net.pth")

    def test_missing_and_unexpected_names_are_counted_and_the_first_ten_listed(self):
        extra = {f"extra.{index}": torch.ones(1) for index in range(12)}
        weights = {name: tensor for name, tensor in Net().state_dict().items() if name != "head.bias"}

        with pytest.raises(ModelError) as caught:
            fit(build, StateDict({**weights, **extra}), source="net.pth")

        assert "1 missing: head.bias" in str(caught.value)
        assert "12 unexpected: extra.0; " in str(caught.value)
        assert "extra.9; ..." in str(caught.value)
        assert "extra.10" not in str(caught.value)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_float_types_become_float32_with_a_note(self, dtype):
        module, notes = fit(build, StateDict(Net().to(dtype).state_dict()), source="net.pth")

        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
        assert notes == (f"net.pth stores {str(dtype)[6:]}; the weights were converted to float32",)

    def test_integer_weights_are_not_cast_to_float(self):
        weights = {**Net().state_dict(), "conv.weight": torch.ones(3, 1, 3, 3, dtype=torch.int8)}

        with pytest.raises(ModelError, match=r"conv\.weight is int8 3x1x3x3, the network has float32"):
            fit(build, StateDict(weights), source="net.pth")
