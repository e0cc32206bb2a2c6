"""The head of every family of torchvision, and the auxiliary heads of the two that have them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from deploykit.artifact import Preprocess
from deploykit.errors import UsageError
from deploykit.finetune import auxiliary, layers
from deploykit.models import Model, with_classes

HOW = Preprocess(resize=None, crop=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, fit="stretch")
# One of each family: the last layer, and the block that it stands in.
FAMILIES = {
    "alexnet": ("classifier.6", "classifier"),
    "convnext_tiny": ("classifier.2", "classifier"),
    "densenet121": ("classifier", "classifier"),
    "efficientnet_b0": ("classifier.1", "classifier"),
    "efficientnet_v2_s": ("classifier.1", "classifier"),
    "googlenet": ("fc", "fc"),
    "inception_v3": ("fc", "fc"),
    "maxvit_t": ("classifier.5", "classifier"),
    "mnasnet0_5": ("classifier.1", "classifier"),
    "mobilenet_v2": ("classifier.1", "classifier"),
    "mobilenet_v3_small": ("classifier.3", "classifier"),
    "regnet_y_400mf": ("fc", "fc"),
    "resnet18": ("fc", "fc"),
    "resnext50_32x4d": ("fc", "fc"),
    "shufflenet_v2_x0_5": ("fc", "fc"),
    "squeezenet1_0": ("classifier.1", "classifier"),
    "swin_t": ("head", "head"),
    "vgg11": ("classifier.6", "classifier"),
    "vit_b_16": ("heads.head", "heads"),
    "wide_resnet50_2": ("fc", "fc"),
}


def network(name: str, **options: object) -> Model:
    """Without numbers in it, so that it is built in no time."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes with its widths while it is built
        module = torchvision.models.get_model(name, weights=None, **options)
    return Model(module, name, HOW, (), 1000, "random", is_random=True, notes=())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_the_last_layer_or_its_block_and_a_new_one_has_the_datas_classes(name):
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = network(name, **options)

    assert (layers.head_of(model, "last"), layers.head_of(model, "classifier")) == FAMILIES[name]

    head = with_classes(model, ("a", "b", "c"), seed=0).module.get_submodule(FAMILIES[name][0])
    assert getattr(head, "out_features", getattr(head, "out_channels", None)) == 3


def test_a_wrapper_around_a_network_is_not_its_head():
    model = network("vgg11")
    wrapped = Model(nn.Sequential(model.module), "wrapped", HOW, (), 1000, "random", is_random=True, notes=())

    assert layers.head_of(wrapped, "classifier") == "0.classifier"


@pytest.mark.parametrize(("name", "heads"), [("googlenet", {"aux1", "aux2"}), ("inception_v3", {"AuxLogits"})])
def test_auxiliary_heads_are_there_while_it_trains_and_gone_afterwards(name, heads):
    model = network(name, aux_logits=False, init_weights=False)
    before = set(model.module.state_dict())

    with auxiliary.attached(model, wanted=True, seed=0):
        grown = set(model.module.state_dict()) - before

    assert {key.partition(".")[0] for key in grown} == heads
    assert set(model.module.state_dict()) == before


def test_both_auxiliary_heads_of_googlenet_answer_in_training_alone():
    module = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=False, init_weights=False)
    model = Model(module, "googlenet", HOW, (), 3, "random", is_random=True, notes=())

    with auxiliary.attached(model, wanted=True, seed=0), torch.no_grad():
        logits, others = auxiliary.parts_of(module.train()(torch.zeros(2, 3, 64, 64)))
        plain, none = auxiliary.parts_of(module.eval()(torch.zeros(2, 3, 64, 64)))

    assert [tuple(one.shape) for one in (logits, *others, plain)] == [(2, 3)] * 4
    assert none == ()


def test_another_network_has_no_auxiliary_heads():
    with (
        pytest.raises(UsageError, match="resnet18 has no auxiliary heads"),
        auxiliary.attached(network("resnet18"), wanted=True, seed=0),
    ):
        pass
