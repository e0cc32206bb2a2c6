"""The head of every family of torchvision and of many of timm, and the auxiliary heads of the two that have them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torchvision
from torch import nn

from deploykit.artifact import Preprocess
from deploykit.errors import UsageError
from deploykit.finetune import auxiliary, layers
from deploykit.models import Model, load, with_classes
from deploykit.recipe import FinetuneTable, ModelTable, PreprocessTable

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

# The same of timm, whose networks of one family end alike.
TIMMS = {
    "convnext_atto": ("head.fc", "head"),
    "densenet121": ("classifier", "classifier"),
    "edgenext_xx_small": ("head.fc", "head"),
    "efficientnet_b0": ("classifier", "classifier"),
    "efficientvit_b0": ("head.classifier.4", "head"),
    "ghostnet_050": ("classifier", "classifier"),
    "mobilenetv3_small_050": ("classifier", "classifier"),
    "mobilenetv4_conv_small_035": ("classifier", "classifier"),
    "regnety_002": ("head.fc", "head"),
    "resnet18": ("fc", "fc"),
    "swin_tiny_patch4_window7_224": ("head.fc", "head"),
    "vgg11": ("head.fc", "head"),
    "vit_tiny_patch16_224": ("head", "head"),
}
# Two heads, of which the second learned from a teacher; the answer is their mean.
DISTILLED = {
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
    "efficientformer_l1": ("head", "head_dist"),
    "levit_128s": ("head.linear", "head_dist.linear"),
    "repvit_m0_9": ("head.head.l", "head.head_dist.l"),
}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="wants timm (pip install timm)")


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


def of_timm(name: str) -> Model:
    """Without numbers in it, and so without a download."""
    import timm

    with torch.device("meta"):
        return Model(timm.create_model(name), name, HOW, (), 1000, "random", is_random=True, notes=())


@needs_timm
@pytest.mark.parametrize("name", TIMMS)
def test_the_head_of_a_network_of_timm_is_found_and_replaced_like_torchvisions(name):
    model = of_timm(name)

    assert (layers.head_of(model, "last"), layers.head_of(model, "classifier")) == TIMMS[name]

    changed = with_classes(model, ("a", "b", "c"), seed=0).module.to("meta").eval()
    assert changed(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 3)


@needs_timm
@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_network_gets_two_new_heads_and_says_how_they_are_trained(name):
    model = of_timm(name)

    with pytest.raises(UsageError, match=f"{name} has 2 heads, {DISTILLED[name][0]} and ") as caught:
        layers.head_of(model, "last")
    assert ("finetune.head = 'classifier'" in caught.value.fix) == (name == "repvit_m0_9")

    changed = with_classes(model, ("a", "b", "c"), seed=0)
    assert [changed.module.get_submodule(head).out_features for head in DISTILLED[name]] == [3, 3]
    assert " and ".join(DISTILLED[name]) in changed.notes[-1]
    assert changed.module.to("meta").eval()(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 3)


@needs_timm
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_byobnet", ["head.fc"]),
        ("test_convnext", ["head.fc"]),
        ("test_efficientnet", ["classifier"]),
        ("test_resnet", ["fc"]),
        ("test_vit", ["head"]),
        ("levit_128s", ["head.linear", "head_dist.linear"]),
    ],
)
def test_a_new_head_learns_and_the_rest_of_a_network_of_timm_is_as_it_was(name, heads):
    table = ModelTable(name=f"timm:{name}", weights="none", args={"img_size": 32} if name.startswith("levit") else {})
    model = load(table, PreprocessTable(crop=160 if name.startswith("test") else 32))
    before = {key: value.clone() for key, value in model.module.state_dict().items()}

    changed = with_classes(model, ("a", "b", "c"), seed=0)

    after, new = changed.module.state_dict(), {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert {key for key in before if before[key].shape != after[key].shape} == new
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - new)

    is_one = len(heads) == 1
    layers.choose(changed, FinetuneTable(mode="head" if is_one else "all"), head_only=is_one)
    changed.module.train()(torch.randn(2, 3, *changed.preprocess.crop)).square().sum().backward()
    learning = {key for key, value in changed.module.named_parameters() if value.grad is not None}
    assert new == learning if is_one else new < learning


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
