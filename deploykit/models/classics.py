"""Our own classics by name: how to build each, what it takes, how large it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import nn

from deploykit.errors import ModelError
from deploykit.models import alexnet, arguments, cifar_resnet, inception_resnet, lenet, network_in_network
from deploykit.models.architecture import Architecture
from deploykit.recipe import ModelTable, PreprocessTable


@dataclass(frozen=True)
class Classic:
    """A network of ours. `parameters` and `gmacs` (10^9 multiply-accumulates of one input) are those of its own number of
    classes; a test counts both."""

    build: Callable[..., nn.Module]
    preprocess: PreprocessTable
    parameters: int
    gmacs: float


def _cifar_resnet(depth: int, parameters: int, gmacs: float) -> Classic:
    return Classic(partial(cifar_resnet.cifar_resnet, depth), cifar_resnet.PREPROCESS, parameters, gmacs)


CLASSICS: Mapping[str, Classic] = MappingProxyType(
    {
        "lenet5": Classic(lenet.lenet5, lenet.PREPROCESS, 61_706, 0.000417),
        "lenet5_rgb": Classic(lenet.lenet5_rgb, lenet.PREPROCESS_RGB, 62_006, 0.000652),
        "lenet5_1998": Classic(lenet.lenet5_1998, lenet.PREPROCESS_1998, 60_850, 0.000328),
        "alexnet_2012": Classic(alexnet.alexnet_2012, alexnet.PREPROCESS, 62_378_344, 1.135256),
        "network_in_network": Classic(network_in_network.network_in_network, network_in_network.PREPROCESS, 966_986, 0.222487),
        "inception_resnet_small": Classic(
            inception_resnet.inception_resnet_small, inception_resnet.PREPROCESS, 187_370, 0.025659
        ),
        "cifar_resnet20": _cifar_resnet(20, 269_722, 0.040552),
        "cifar_resnet32": _cifar_resnet(32, 464_154, 0.068863),
        "cifar_resnet44": _cifar_resnet(44, 658_586, 0.097175),
        "cifar_resnet56": _cifar_resnet(56, 853_018, 0.125486),
        "cifar_resnet110": _cifar_resnet(110, 1_727_962, 0.252888),
    }
)


def architecture(model: ModelTable, preprocess: PreprocessTable) -> Architecture:
    """The classic `model.name`, which is one of `CLASSICS`, with `model.args`; LeNet-5 takes colour when it is asked to.

    Raises ModelError when it does not take the arguments.
    """
    classic, given = CLASSICS[model.name], dict(model.args or {})
    if arguments.takes(classic.build, "channels") and preprocess.channels is not None:
        given.setdefault("channels", len(preprocess.channels))
    arguments.check(classic.build, given, name=model.name)

    def build(classes: int | None) -> nn.Module:
        words = given if classes is None else {**given, "num_classes": classes}
        try:
            return classic.build(**words)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{model.name} cannot be built with these arguments", why=str(error)) from error

    return Architecture(name=model.name, build=build, preprocess=classic.preprocess, default_weights=None)
