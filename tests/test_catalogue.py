"""`deploykit models`: that its numbers are those of the networks, and what its filters keep."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as library

from deploykit import models
from deploykit.models import torchvision
from deploykit.recipe import ModelTable

COUNTED = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "squeezenet1_1", "densenet121", "googlenet", "inception_v3"),
    *(
        "efficientnet_b0",
        "shufflenet_v2_x1_0",
        "resnext50_32x4d",
        "mnasnet1_0",
        "vgg16",
        "alexnet",
        "convnext_tiny",
        "vit_b_16",
        "vit_h_14",
    ),
)


@pytest.mark.parametrize("name", COUNTED)
def test_torchvisions_parameters_and_multiplications_are_those_that_are_counted(name):
    entry = next(entry for entry in models.catalogue() if entry.name == name)
    with torch.device("meta"):
        network = torchvision.architecture(ModelTable(name=name, weights="none")).build(None).eval()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *entry.input_size, device="meta"))

    assert entry.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert entry.gmacs == pytest.approx(counter.get_total_flops() / 2e9, rel=0.01, abs=0.001)
    assert entry.gmacs == library.get_model_weights(name).DEFAULT.meta["_ops"]


@pytest.mark.parametrize(("asked", "side"), [(None, 518), (224, 224)])
def test_a_vision_transformer_is_built_for_the_input_that_it_gets(asked, side):
    with torch.device("meta"):
        network = torchvision.architecture(ModelTable(name="vit_h_14", weights="none"), asked).build(None).eval()

    assert network(torch.zeros(1, 3, side, side, device="meta")).shape == (1, 1000)


class TestTheCommand:
    def found(self, deploykit, *words: object) -> list[dict]:
        outcome = deploykit("models", *words, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    def test_an_entry_has_size_work_input_and_weights(self, deploykit):
        (entry,) = self.found(deploykit, "inception_v3")

        assert entry["parameters"] == 23_834_568
        assert entry["gmacs"] == 5.713
        assert entry["input_size"] == [3, 299, 299]
        assert (entry["source"], entry["weights"]) == ("torchvision", "Inception_V3_Weights.IMAGENET1K_V1")

    def test_filters_keep_what_is_all_of_them(self, deploykit):
        every = self.found(deploykit)
        kept = self.found(deploykit, "--from", "torchvision", "--most-parameters", 6, "--most-gmacs", "0.5", "--with-weights")

        assert kept == [
            entry
            for entry in every
            if entry["source"] == "torchvision" and entry["parameters"] <= 6e6 and entry["gmacs"] <= 0.5 and entry["weights"]
        ]
        assert {"mobilenet_v2", "squeezenet1_1"} <= {entry["name"] for entry in kept}
        assert len(kept) < len(every) / 3

    def test_our_own_classics_are_listed_by_their_source(self, deploykit):
        names = {entry["name"] for entry in self.found(deploykit, "--from", "deploykit")}

        assert {"lenet5", "lenet5_rgb", "lenet5_1998", "alexnet_2012", "network_in_network", "inception_resnet_small"} <= names
        assert "resnet18" not in names

    def test_filters_that_leave_nothing_are_said(self, deploykit):
        outcome = deploykit("models", "resnet", "--most-gmacs", "0.00001")

        assert outcome.code == 2
        assert "networks is all of that" in outcome.err
