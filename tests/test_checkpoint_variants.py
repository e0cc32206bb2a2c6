"""Checkpoints as trainers leave them: wrapped, averaged, beside losses and optimizers, in other number types, as programs."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploykit import models
from deploykit.errors import ModelError
from deploykit.models import script
from deploykit.models.checkpoint import fit, load_state_dict
from deploykit.models.lenet import lenet5
from deploykit.models.state_dict import StateDict
from deploykit.recipe import ModelTable

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


class Net(nn.Module):
    """A convolution, a BatchNorm and a head."""

    def __init__(self, num_classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 3, 3)
            self.bn = nn.BatchNorm2d(3)
            self.head = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def build(classes: int | None) -> nn.Module:
    return Net() if classes is None else Net(classes)


def trained(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(Net(seed=seed).state_dict())


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "run.ckpt")
    return folder / "run.ckpt"


def fitted(tensors: Mapping[str, torch.Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    return fit(build, StateDict(tensors), source="run.ckpt")


def holds(module: nn.Module, wanted: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, wanted[name]) for name, tensor in module.state_dict().items())


def lightning(state_dict: Mapping[str, torch.Tensor], **more: object) -> dict[str, object]:
    """What Lightning's Trainer.save_checkpoint writes (lightning.ai/docs, "Contents of a checkpoint")."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3, 1, 3, 3)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "epoch": 3,
        "global_step": 300,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": dict(state_dict),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3, "class_weights": torch.tensor([0.3, 0.7])},
        **more,
    }


class TestLightning:
    @pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod."])
    def test_the_network_is_found_beside_optimizers_callbacks_and_hyper_parameters(self, tmp_path, prefix):
        path = saved(tmp_path, lightning(under(prefix, trained())))

        module, notes = fit(build, load_state_dict(path), source="run.ckpt")

        assert holds(module, trained())
        assert notes == ()

    def test_what_is_beside_the_network_in_the_module_is_left_out_and_named(self, tmp_path):
        path = saved(tmp_path, lightning({**under("model.", trained()), "criterion.weight": torch.ones(4)}))

        module, notes = fit(build, load_state_dict(path), source="run.ckpt")

        assert holds(module, trained())
        assert notes == ("of run.ckpt the weights under model. were taken; left out: criterion.weight",)

    def test_the_average_that_its_callback_keeps_is_not_taken_by_itself(self, tmp_path):
        content = lightning(trained(), current_model_state=trained(2), averaging_state={"n_averaged": torch.tensor(3)})

        with pytest.raises(ModelError, match=r"several sets(.|\n)*state_dict: 9 tensors(.|\n)*current_model_state: 9"):
            load_state_dict(saved(tmp_path, content))
        assert torch.equal(load_state_dict(tmp_path / "run.ckpt", "state_dict")["head.bias"], trained()["head.bias"])


class TestAverages:
    @pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
    def test_an_average_beside_the_weights_is_chosen_by_its_name_and_never_guessed(self, tmp_path, entry):
        path = saved(tmp_path, {"state_dict": trained(1), entry: trained(2), "epoch": 3})

        with pytest.raises(ModelError, match=rf"several sets(.|\n)*{entry}: 9 tensors(.|\n)*model\.weights_key"):
            load_state_dict(path)
        assert holds(fit(build, load_state_dict(path, entry), source="run.ckpt")[0], trained(2))

    @pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema", "ema"])
    def test_an_average_alone_is_what_the_file_holds(self, tmp_path, entry):
        path = saved(tmp_path, {entry: trained(), "epoch": 3})

        assert holds(fit(build, load_state_dict(path), source="run.ckpt")[0], trained())

    @pytest.mark.parametrize("counter", ["n_averaged", "steps"])
    def test_the_counter_of_an_averaged_model_is_left_out(self, counter):
        module, notes = fitted({**under("module.", trained()), counter: torch.tensor(300)})

        assert holds(module, trained())
        assert notes == ()

    @pytest.mark.parametrize("name", ["steps", "epochs"])
    def test_only_a_whole_number_of_that_name_is_a_counter(self, name):
        value = torch.ones(3) if name == "steps" else torch.tensor(3)

        with pytest.raises(ModelError, match=f"1 unexpected: {name}"):
            fitted({**trained(), name: value})

    def test_an_average_inside_an_entry_is_found_and_named_by_both(self, tmp_path):
        path = saved(tmp_path, {"ema": {"state_dict": trained(), "decay": 0.999}, "epoch": 3})

        assert set(load_state_dict(path)) == set(trained())
        assert set(load_state_dict(path, "ema.state_dict")) == set(trained())

    def test_two_networks_in_one_set_of_names_are_told_apart_by_the_key(self, tmp_path):
        path = saved(tmp_path, {"state_dict": {**under("online.", trained(1)), **under("ema_model.module.", trained(2))}})

        with pytest.raises(
            ModelError, match=r"several networks(.|\n)*online\. 9(.|\n)*ema_model\. 9(.|\n)*weights_key, such as online"
        ):
            fit(build, load_state_dict(path), source="run.ckpt")
        for key in ("ema_model", "ema_model.", "state_dict.ema_model", "ema_model.module"):
            assert holds(fit(build, load_state_dict(path, key), source="run.ckpt")[0], trained(2))

    def test_one_network_under_two_names_is_no_choice(self):
        module, _ = fitted({**under("model.", trained()), **under("alias.", trained())})

        assert holds(module, trained())

    def test_a_key_that_leads_nowhere_names_what_there_is(self, tmp_path):
        path = saved(tmp_path, {"state_dict": under("model.", trained()), "epoch": 3})

        with pytest.raises(ModelError, match=r"no weights under 'teacher'(.|\n)*state_dict holds weights"):
            load_state_dict(path, "teacher")


class TestNamesOfParts:
    def test_a_backbone_and_a_head_whose_names_fit_are_put_together(self):
        tensors = {**under("backbone.", trained()), "head.head.weight": trained()["head.weight"], "head.head.bias": torch.ones(4)}
        del tensors["backbone.head.weight"], tensors["backbone.head.bias"]

        module, notes = fitted(tensors)

        assert holds(module, {**trained(), "head.bias": torch.ones(4)})
        assert notes == ("run.ckpt: backbone. and head. were taken off the names of the weights",)

    def test_a_head_outside_the_backbone_keeps_its_name(self):
        tensors = {name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in trained().items()}

        assert holds(fitted(tensors)[0], trained())

    def test_a_head_of_another_name_would_be_a_guess_and_is_refused_with_both_names(self):
        tensors = {
            **under("backbone.", trained()),
            "cls_head.fc_cls.weight": torch.ones(4, 3),
            "cls_head.fc_cls.bias": torch.ones(4),
        }
        del tensors["backbone.head.weight"], tensors["backbone.head.bias"]

        with pytest.raises(ModelError) as caught:
            fitted(tensors)

        assert "under backbone. it has 6 of the network's 8 weights" in caught.value.why
        assert "which of cls_head.fc_cls.weight, cls_head.fc_cls.bias are head.weight, head.bias" in caught.value.why

    def test_a_compiled_part_in_the_middle_of_a_name_is_found(self):
        tensors = {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in trained().items()}

        assert holds(fitted(tensors)[0], trained())

    def test_old_names_are_brought_up_to_date_below_a_wrapper_too(self):
        known = models.torchvision.architecture(ModelTable(name="googlenet", weights="x.pth"))
        wanted = models.load(ModelTable(name="googlenet", weights="none")).module.state_dict()
        wrapped = {**under("module.", wanted), "module.aux1.fc1.weight": torch.ones(2)}

        module, _ = fit(known.build, StateDict(wrapped), source="run.ckpt", adapt=known.adapt)

        assert torch.equal(module.state_dict()["fc.weight"], wanted["fc.weight"])

    @settings(deadline=None, max_examples=25)
    @given(prefixes=st.lists(st.sampled_from(WRAPPERS), max_size=3), extra=st.booleans())
    def test_any_pile_of_wrappers_comes_off_whatever_is_beside_it(self, prefixes, extra):
        tensors = under("".join(prefixes), trained())
        if extra and set(prefixes) - {"_orig_mod."}:
            tensors["loss.weight"] = torch.ones(2)

        assert holds(fitted(tensors)[0], trained())

    @settings(deadline=None, max_examples=25)
    @given(
        lost=st.sampled_from([name for name in trained() if "num_batches" not in name]), prefix=st.sampled_from(["", *WRAPPERS])
    )
    def test_a_file_that_lacks_a_weight_never_fits(self, lost, prefix):
        tensors = {name: tensor for name, tensor in trained().items() if name != lost}

        with pytest.raises(ModelError, match="does not fit"):
            fitted({**under(prefix, tensors), "loss.weight": torch.ones(2)})


class TestNumberTypes:
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_8_bit_floats_have_a_scale_somewhere_and_are_not_cast(self, dtype):
        with pytest.raises(ModelError, match=r"conv\.weight is float8_\w+ 3x1x3x3, the network has float32"):
            fitted({**trained(), "conv.weight": torch.ones(3, 1, 3, 3).to(dtype)})

    def test_a_double_that_float32_cannot_hold_is_infinite(self, tmp_path):
        tensors = {**trained(), "head.bias": torch.full((4,), 1e300, dtype=torch.float64)}

        with pytest.raises(ModelError, match=r"NaN or infinite(.|\n)*head\.bias"):
            load_state_dict(saved(tmp_path, tensors))


class TestPrograms:
    @pytest.fixture
    def program(self, tmp_path) -> Path:
        with script_warnings_ignored():
            torch.jit.save(torch.jit.script(lenet5()), str(tmp_path / "lenet5.pt"))
        return tmp_path / "lenet5.pt"

    def test_weights_in_a_program_are_refused_without_trust_and_never_loaded(self, program, monkeypatch):
        monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))

        with pytest.raises(ModelError, match=r"TorchScript(.|\n)*--trust"):
            models.load(ModelTable(name="lenet5", weights=str(program)))

    def test_with_trust_they_are_taken_and_a_note_says_that_the_program_ran(self, program):
        model = models.load(ModelTable(name="lenet5", weights=str(program), trust=True))

        with script_warnings_ignored():
            wanted = torch.jit.load(str(program)).state_dict()
        assert holds(model.module, wanted)
        assert model.notes == ("the program in lenet5.pt was run to read its weights",)

    def test_a_frozen_program_has_no_weights_by_name(self, tmp_path):
        with script_warnings_ignored():
            torch.jit.save(torch.jit.freeze(torch.jit.script(lenet5().eval())), str(tmp_path / "frozen.pt"))

        with pytest.raises(ModelError, match=r"no weights by name(.|\n)*frozen"):
            load_state_dict(tmp_path / "frozen.pt", trust=True)

    def test_trust_changes_nothing_for_files_that_hold_weights_alone(self, tmp_path):
        path = saved(tmp_path, trained())

        assert set(load_state_dict(path, trust=True)) == set(trained())

    def test_a_damaged_program_is_named(self, program):
        with zipfile.ZipFile(program) as archive:
            code = next(member for member in archive.infolist() if member.filename.endswith(".py"))
        content = bytearray(program.read_bytes())
        start = content.index(code.filename.encode(), code.header_offset) + len(code.filename)
        content[start : start + code.compress_size] = bytes(code.compress_size)
        program.write_bytes(content)

        with pytest.raises(ModelError, match=r"lenet5\.pt(.|\n)*damaged"):
            load_state_dict(program, trust=True)

    def test_one_weight_of_a_program_that_changed_is_damage_too(self, program):
        networks.flip_a_bit_of_the_largest_member(program)

        with pytest.raises(ModelError, match=r"lenet5\.pt(.|\n)*damaged(.|\n)*data/4"):
            load_state_dict(program, trust=True)

    def test_a_file_that_is_no_zip_is_no_program(self, tmp_path):
        (tmp_path / "some.pt").write_bytes(b"PK\x03\x04 cut off")

        assert not script.is_script(tmp_path / "some.pt")


@contextmanager
def script_warnings_ignored() -> Iterator[None]:
    """torch deprecates what makes these files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
