"""Networks in a user's own code: FILE.py:factory or package.module:factory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from deploykit.errors import ModelError, like, printable
from deploykit.models import arguments
from deploykit.models.architecture import Architecture, Weights
from deploykit.recipe import ModelTable

_UNTIL_KNOWN = 1000  # classes of a network that is built to be compared with a checkpoint, when its factory insists on a number


def architecture(model: ModelTable) -> Architecture:
    """Import the user's code, which runs here and nowhere before, and find the factory.

    A file is found from the current directory, and may import its neighbours; a module may stand in the current
    directory. What the code prints goes to stderr. The factory gets `model.args`, and `num_classes` when it takes one of that
    name and a number is asked for; the network's own weights are whatever the factory put there.

    Raises ModelError, with the user's file and line, when the code or the factory is missing or raises, or when the
    factory returns anything but a network.
    """
    where, _, factory_name = model.name.rpartition(":")
    if not where or not factory_name:
        raise ModelError(f"{model.name!r} names no network", fix="write FILE.py:factory or package.module:factory")
    is_file = where.endswith(".py")
    folder = Path(where).absolute().parent if is_file else Path.cwd()
    with _running(folder):
        module = _load_file(Path(where)) if is_file else _load_module(where, folder)
    code = Path(module.__file__).absolute().parent if module.__file__ else folder
    factory = _factory(module, factory_name, model.name)

    def build(classes: int | None) -> nn.Module:
        if classes is None and model.weights not in ("none", "default") and arguments.requires(factory, "num_classes"):
            classes = _UNTIL_KNOWN  # the weights say how many, and then it is built again
        asked = {"num_classes": classes} if classes is not None and arguments.takes(factory, "num_classes") else {}
        words = {**(model.args or {}), **asked}
        arguments.check(factory, words, name=model.name)
        try:
            with _running(folder):
                network = factory(**words)
        except (Exception, SystemExit) as error:
            raise ModelError(f"{model.name} failed to build the network", why=explain(error, code)) from error
        if not isinstance(network, nn.Module):
            raise ModelError(f"{model.name} returned a {type(network).__name__}", why="a factory returns a torch.nn.Module")
        return network

    return Architecture(
        name=model.name,
        build=build,
        preprocess=None,
        default_weights=lambda: Weights(
            None,
            f"as {model.name} made them",
            notes=(
                "no weights were named, so the network keeps those that its factory gave it; --weights FILE loads a checkpoint",
            ),
        ),
        takes_data_classes=False,
        folder=code,
    )


def explain(error: BaseException, folder: Path) -> str:
    """What an error in user code says, and the innermost line that led to it in a file of `folder`."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg}, at {printable(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).absolute().parent == folder]
    if not own:
        return text
    return f"{text}, at {printable(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}"


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        why, fix = ("it is not a file", "") if path.exists() else ("there is no such file", like(path))
        raise ModelError(f"cannot read the network's code {printable(path)}", why=why, fix=fix)
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.export look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{printable(path)} cannot be imported", why=explain(error, path.absolute().parent)) from error
    return module


def _load_module(name: str, folder: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ModelError(
                f"there is no module {error.name}", fix="check the name; for a file, write FILE.py:factory with its path"
            ) from error
        raise ModelError(f"{name} cannot be imported", why=_explain_import(error, name, folder)) from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} cannot be imported", why=_explain_import(error, name, folder)) from error


def _explain_import(error: BaseException, name: str, folder: Path) -> str:
    """After a failed import there is no module to ask where its code is, but its package knows."""
    package = sys.modules.get(name.rpartition(".")[0])
    places = [Path(place).absolute() for place in package.__path__] if package is not None else []
    return explain(error, places[0] if places else folder)


def _factory(module: ModuleType, name: str, full_name: str) -> Callable[..., Any]:
    file = printable(module.__file__ or module.__name__)
    if not hasattr(module, name):
        known = [
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ModelError(
            f"{full_name}: {file} has no {name!r}", fix=f"it defines {', '.join(known)}" if known else "define a factory in it"
        )
    factory: object = getattr(module, name)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelError(
            f"{full_name} is a {type(factory).__name__}, not a factory", fix=f"name a function in {file} that returns the network"
        )
    return factory


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[None]:
    """User code finds its neighbours, and what it prints stays out of stdout, which is for results."""
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def source_files(name: str) -> list[Path]:
    """The files that the network `name` is made from: what its code has imported from its own folder.

    Installed packages do not count, wherever they are. The network has to be loaded before.
    """
    where = name.rpartition(":")[0]
    module = sys.modules.get(_module_name(Path(where)) if where.endswith(".py") else where)
    if module is None or module.__file__ is None:
        return []
    own = {_root(Path(module.__file__).absolute(), where)}
    loaded = {Path(found).absolute() for each in list(sys.modules.values()) if (found := getattr(each, "__file__", None))}
    return sorted(path for path in loaded if path.is_file() and own & set(path.parents) and not _is_installed(path))


def _root(file: Path, where: str) -> Path:
    """The folder of FILE.py; for package.module the one that holds the package."""
    if where.endswith(".py"):
        return file.parent
    inside = file.parent if file.name == "__init__.py" else file
    return inside.parents[where.count(".")]


def _is_installed(path: Path) -> bool:
    """A virtual environment may well lie in the user's folder."""
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _module_name(path: Path) -> str:
    """Not the bare stem: a file called torch.py or types.py must not take the place of another module."""
    return f"deploykit_user_{path.stem}"
