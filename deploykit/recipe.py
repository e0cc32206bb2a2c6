"""A recipe: everything a run does, as one frozen value read from TOML. The only place where a parameter is declared.

Each table is a dataclass; each key is a field with its default, range and help text. The command line takes its
options' defaults, ranges and help from here, and `docs/recipe.md` is generated from it. Unknown keys, wrong types
and values out of range are collected and raised together. Relative paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from deploykit.errors import RecipeError, printable
from deploykit.gate import Rule, parse_rule
from deploykit.jsonable import to_json

_SIZE_LIMIT_BYTES = 1 << 20
# What may stand before the colon of a network's name and is no code of the user's.
SCHEMES = ("timm", "ensemble")


def setting(help: str, default: Any = MISSING, *, low: float | None = None, high: float | None = None, path: bool = False) -> Any:
    """Declare a key: help text, default, inclusive range; `path` marks text that names a file or folder."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "path": path})


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    """Which network, with which weights."""

    name: str = setting(
        "a torchvision classifier, a classic of ours such as lenet5 or cifar_resnet20, timm:NAME, ensemble:NAME+NAME, "
        "FILE.py:factory or module:factory",
        path=True,
    )
    args: Mapping[str, Any] | None = setting(
        "arguments by name for the function that builds the network: a user's factory, or one of ours that takes some", None
    )
    weights: str = setting("default (the library's best), none (random, seeded) or a checkpoint file", "default", path=True)
    weights_key: str | None = setting(
        "which entry of a checkpoint, or which prefix of its names, holds the weights, when it has several", None
    )
    trust: bool = setting("take weights from a TorchScript file, which runs the program in it", False)
    classes: int | None = setting(
        "number of classes; taken from the weights or the data when absent", None, low=1, high=1_000_000
    )
    seed: int = setting("seed of random weights", 0, low=0, high=2**32 - 1)

    @property
    def is_user_code(self) -> bool:
        """Whether the name is of the form FILE.py:factory or package.module:factory."""
        return ":" in self.name and self.name.partition(":")[0] not in SCHEMES


@dataclass(frozen=True, kw_only=True)
class PreprocessTable:
    """How a picture becomes an input. Keys that are absent come with the weights."""

    resize: int | None = setting("the shorter side is resized to this many pixels", None, low=1, high=8192)
    crop: int | None = setting("side of the centre crop: the input size in pixels", None, low=1, high=8192)
    fit: Literal["crop", "stretch"] | None = setting("crop the centre, or stretch the whole picture to the input size", None)
    mean: tuple[float, ...] | None = setting("mean of each channel on the 0..1 scale", None, low=0, high=1)
    std: tuple[float, ...] | None = setting("standard deviation of each channel on the 0..1 scale", None, low=1e-6, high=10)
    channels: Literal["RGB", "L"] | None = setting("RGB, or L for greyscale", None)
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = setting("how the picture is resized", None)
    frames: int | None = setting(
        "frames of a clip, for a network that takes clips; a picture becomes one by a crop that moves across it",
        None,
        low=1,
        high=1024,
    )


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """Images: a built-in set by name, or folders."""

    name: Literal["digits", "mnist", "fashion_mnist", "emnist", "cifar10", "cifar100", "imagenet"] | None = setting(
        "a data set with parts of its own: the built-in digits, or one that lies in root as torchvision lays it out", None
    )
    root: str | None = setting("folder of the data set that name names; the digits need none", None, path=True)
    download: bool = setting("fetch the data set into root when it is not there; ImageNet cannot be fetched", False)
    train: str | None = setting("folder of training images, one sub-folder a class", None, path=True)
    held_out: str | None = setting(
        "folder of labelled images on which the best epoch is chosen; without it a tenth of train, of each class", None, path=True
    )
    calibrate: str | None = setting("folder of images for calibration; labels are not needed", None, path=True)
    validate: str | None = setting(
        "folder of labelled images, one sub-folder a class (its name or ImageNet synset)", None, path=True
    )
    calibration_images: int = setting("how many images to calibrate on", 64, low=1, high=1_000_000)
    skip_bad_images: bool = setting("leave out files that are not readable images, and count them", False)
    seed: int = setting("seed of the split and of the choice of calibration images", 0, low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class FinetuneTable:
    """Training on the data's train part."""

    mode: Literal["all", "head", "head first"] = setting(
        "what learns: every layer, the head alone, or the head for head_epochs and then every layer at a lower rate", "all"
    )
    head: Literal["last", "classifier"] = setting(
        "what the head is: the last layer, or the whole block that it stands in, such as VGG's classifier", "last"
    )
    freeze: tuple[str, ...] = setting("modules that stay as they are, by name or pattern: 'layer1', 'features.[0-3].*'", ())
    unfreeze: tuple[str, ...] = setting("modules that learn although mode or freeze would keep them as they are", ())
    epochs: int = setting("passes over the training images, those of the head included", 10, low=1, high=10_000)
    head_epochs: int = setting('with mode = "head first": how many of the epochs are the head\'s', 3, low=1, high=10_000)
    rest_rate: float = setting(
        'with mode = "head first": the later learning rate as a share of the head\'s', 0.1, low=1e-6, high=1
    )
    cache_features: bool = setting(
        "compute what a frozen backbone gives its head once, and train the head on that; augmentation is then fixed views", False
    )
    views: int = setting("with cache_features: how many augmented views of each image are kept", 1, low=1, high=1000)
    batch: int = setting("images in one step", 32, low=1, high=65_536)
    optimizer: Literal["adamw", "sgd"] = setting("AdamW, or SGD with Nesterov's momentum", "adamw")
    momentum: float = setting("momentum of SGD", 0.9, low=0, high=0.999)
    learning_rate: float = setting("peak learning rate", 1e-3, low=1e-8, high=100)
    weight_decay: float = setting("weight decay; decoupled with AdamW", 0.01, low=0, high=10)
    schedule: Literal["cosine", "one-cycle", "step"] = setting(
        "how the learning rate goes after warm-up: half a cosine to zero, one cycle, or a tenth after each third", "cosine"
    )
    warmup: float = setting("share of the steps in which the learning rate rises", 0.1, low=0, high=1)
    clip_norm: float | None = setting(
        "largest norm of a step's gradient; a larger one is scaled down to it", None, low=1e-6, high=1e6
    )
    ema: float | None = setting(
        "decay of an average of the weights over steps, which is then what is kept", None, low=0, high=0.99999
    )
    patience: int | None = setting("stop after so many epochs without a better one", None, low=1, high=10_000)
    label_smoothing: float = setting("share of the target spread over all classes", 0.0, low=0, high=0.9)
    class_weights: Literal["none", "balanced"] = setting("balanced: rare classes weigh more, in inverse proportion", "none")
    dropout: float | None = setting("share that every dropout layer drops, instead of its own", None, low=0, high=0.95)
    aux_loss: float | None = setting(
        "share of the loss of auxiliary heads, for googlenet (0.3 in its paper) and inception_v3 (0.4); without it they are "
        "left out, and in no case are they exported",
        None,
        low=1e-3,
        high=1,
    )
    shift: int = setting("augmentation: random shift by up to this many input pixels", 0, low=0, high=1024)
    augment: tuple[Literal["crop", "flip", "rotate", "colour", "trivial", "rand"], ...] = setting(
        "augmentation by torchvision: random resized crop, mirror, rotation, colour jitter, TrivialAugment, RandAugment", ()
    )
    mix: Literal["none", "mixup", "cutmix"] = setting("augmentation of a batch: two images and their labels in one", "none")
    device: Literal["auto", "cpu", "cuda"] = setting("where to train; auto: a GPU if there is one", "auto")
    autocast: bool = setting("compute in bfloat16 where that is safe; a CPU without its instructions is slower with it", False)
    channels_last: bool = setting(
        "keep channels last in memory; depthwise convolutions on a CPU may be several times faster or slower", False
    )
    deterministic: bool = setting("refuse operations that have no deterministic implementation", False)
    show: tuple[str, ...] = setting(
        "layers, by name or pattern, that the page shows: their maps of one picture, and the weights of those that read it",
        (),
    )
    seed: int = setting("seed of shuffling, augmentation and a new head", 0, low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class ExportTable:
    """The portable files."""

    formats: tuple[Literal["onnx", "torchscript"], ...] = setting("which files to write", ("onnx",))
    batch: int | Literal["dynamic"] = setting("dynamic, or a fixed number of images", "dynamic", low=1, high=65_536)
    opset: Literal[19] = setting("ONNX opset; 19 is the newest that TensorRT 10.3 reads and carries FP16 scales", 19)
    exporter: Literal["auto", "new", "legacy"] = setting(
        "which of torch's exporters to ONNX: the new one (torch.export), the legacy one (TorchScript tracing), or the one that "
        "our own table names for this network",
        "auto",
    )
    cross_check: bool = setting("run both exporters on the same weights and inputs, and keep what passes", False)
    size: Literal["fixed", "dynamic"] = setting(
        "whether height and width are the preprocessing's, or any; refused for networks whose layers fix them", "fixed"
    )
    input: Literal["float", "uint8 NHWC", "uint8 NCHW"] = setting(
        "what a program feeds: normalised floats, or bytes in that layout, which the file scales and normalises itself, exactly",
        "float",
    )
    tolerance: float = setting("largest max|d| / max|y| between an exported file and PyTorch", 1e-4, low=1e-7, high=1)
    samples: int = setting("golden samples stored with each file", 16, low=1, high=4096)


@dataclass(frozen=True, kw_only=True)
class QuantizeTable:
    """Post-training quantization to INT8 as Q/DQ in the graph."""

    method: Literal["minmax", "percentile", "entropy", "mse"] = setting(
        "how a range is chosen from what was observed: all of it, all but a share at either end, the least divergence of the "
        "quantized distribution, the least squared error",
        "mse",
    )
    cpu: Literal["this", "any", "arm64"] = setting(
        "which CPUs the INT8 graph is for. this: such as run here; any: 7-bit weights, whose sums saturate on no x86 or ARM CPU; "
        "arm64: 64-bit ARM alone, best with an int8 dot product",
        "this",
    )
    float_layers: tuple[str, ...] = setting("layers to leave in float, by name or pattern: 'fc/Gemm', 'layer4.*'", ())
    rounding: Literal["nearest", "together"] = setting(
        "how weights become integers: each the nearest, or all of an output so that it changes least on calibration images, "
        "with the bias that takes what is left on average; random weights are always rounded to the nearest",
        "together",
    )
    equalize: bool = setting(
        "whether channels of very different ranges are scaled alike first, where much is to gain; the float answers stay", True
    )
    target_sqnr_db: float = setting(
        "signal-to-noise ratio at the output, INT8 against FP32 on calibration images, below which the most sensitive layers "
        "stay in float; 0 keeps none",
        25.0,
        low=0,
        high=200,
    )
    most_float_percent: float = setting(
        "at most this share of the layers stays in float for it, or for the gate", 10.0, low=0, high=100
    )
    speed: bool = setting(
        "keep layers in float that are faster so on this machine, all of them if INT8 as a whole is not faster; measured where "
        'an engine can be built here, and for cpu = "this" alone',
        True,
    )
    sensitivity: bool = setting("measure what every tensor and layer costs, for the report, even if the ratio is good", False)
    percentile: float | None = setting(
        "with method percentile: the share of the values that a range keeps, in percent; 99.99 when absent",
        None,
        low=90,
        high=100,
    )


@dataclass(frozen=True, kw_only=True)
class BuildTable:
    """Engines."""

    runtimes: tuple[Literal["onnxruntime", "openvino", "tensorrt"], ...] = setting("which engines to build", ("onnxruntime",))
    keep: Literal["all", "fastest"] = setting(
        "fastest: of the engines that no gate fails, the one with the lowest latency is copied to the folder `fastest`", "all"
    )
    target: str | None = setting(
        "the board that it is meant for, by name (`deploykit targets`) or as a TOML file; what it cannot run is refused at once",
        None,
    )
    engine: Literal["auto", "require", "skip"] = setting(
        "auto: build where this machine can, say so where not; require: else exit 4; skip: portable files only", "auto"
    )
    float_type: Literal["fp32", "fp16"] = setting(
        "what stays float in TensorRT's graphs: fp16 types them in half precision", "fp32"
    )
    threads: int = setting("threads of a CPU engine; 0 takes the cores this process may use", 0, low=0, high=1024)


@dataclass(frozen=True, kw_only=True)
class TensorRtTable:
    """How TensorRT's engines are built, here or on the device that gets the bundle; their precision is in the graph."""

    batch: tuple[int, ...] = setting(
        "smallest, best and largest batch of a graph with a dynamic one (the optimization profile), or one for all",
        (1, 1, 32),
        low=1,
        high=65_536,
    )
    workspace_mib: int | None = setting(
        "most scratch memory of a layer, in MiB; absent: a quarter of what is free", None, low=1, high=1 << 20
    )
    optimization_level: int = setting("0 builds fast, 5 tries the most tactics; 3 is TensorRT's own default", 3, low=0, high=5)
    timing_cache: bool = setting("whether what was timed before is used, and kept for later builds", True)
    dla_core: int | None = setting("run on this DLA core what can; absent: on the GPU", None, low=0, high=15)
    gpu_fallback: bool = setting("with dla_core: what cannot run there runs on the GPU; else the build fails", True)
    version_compatible: bool = setting(
        "the engine runs on later TensorRT versions too; it then holds code for the CPU, so load only what you trust", False
    )
    hardware: Literal["this", "same compute capability", "ampere and newer"] = setting(
        "on which other GPUs the engine runs, at some cost in speed; the second from TensorRT 10.9 on", "this"
    )

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch."""
        return self.batch[0], self.batch[len(self.batch) // 2], self.batch[-1]


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """Latency and throughput, each sample of processes fresh and in random order."""

    processes: int = setting(
        "fresh processes for each engine, and as many again for the baseline; 5 make an interval", 10, low=1, high=1000
    )
    queries: int = setting("timed single-stream queries in each process", 30, low=1, high=1_000_000)
    warmup: int = setting("untimed queries first", 5, low=0, high=100_000)
    offline_batches: tuple[int, ...] = setting("images in one offline query; several make a batch sweep", (8,), low=1, high=4096)
    offline_seconds: float = setting("how long each process measures offline throughput", 0.5, low=0, high=3600)
    seed: int = setting("seed of the order of processes and of the bootstrap", 0, low=0, high=2**32 - 1)
    enabled: bool = setting("whether to measure at all", True)

    def measured(self) -> dict[str, Any]:
        """The arguments of `benchmark.benchmark`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "enabled"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Tables that are None are stages that do not happen."""

    name: str = setting("name of the run: its report's title and its default output folder")
    gate: tuple[str, ...] = setting("rules an engine must pass, such as 'drop <= 0.5 points' or 'slowdown <= 5 %'", ())
    model: ModelTable = field()
    preprocess: PreprocessTable = field(default=PreprocessTable())
    data: DataTable = field(default=DataTable())
    finetune: FinetuneTable | None = field(default=None)
    export: ExportTable = field(default=ExportTable())
    quantize: QuantizeTable | None = field(default=None)
    build: BuildTable = field(default=BuildTable())
    tensorrt: TensorRtTable = field(default=TensorRtTable())
    benchmark: BenchmarkTable = field(default=BenchmarkTable())

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The parsed gate rules."""
        return tuple(parse_rule(text) for text in self.gate)


def load(path: Path, overrides: Mapping[str, str] | None = None, *, overrides_base: Path | None = None) -> Recipe:
    """Read a TOML file; `overrides` maps `table.key` to a value in TOML syntax (bare words are text).

    Relative paths are relative to the recipe's folder; those in `overrides` to `overrides_base`, if it is given.

    Raises RecipeError with all problems at once: unreadable file, TOML syntax, unknown keys, types, ranges, meaning.
    """
    import tomllib  # not in Python 3.10, where the device half still imports this module's floor

    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise RecipeError(f"{printable(path)} is not a recipe", why=f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content: dict[str, Any] = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:  # TOML syntax, not UTF-8, a number of thousands of digits, deep nesting
        raise RecipeError(f"{printable(path)} is not valid TOML", why=str(error)) from error
    return parse(content, base=path.parent, source=printable(path), overrides=overrides, overrides_base=overrides_base)


def shipped(name: str) -> Path | None:
    """The file of a recipe that comes with deploykit, by its bare name; None when there is none of that name."""
    # Beside the package in a checkout, inside it in a wheel.
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parent / "recipes"):
        path = folder / f"{name}.toml"
        if path.parent == folder and path.is_file():
            return path
    return None


def parse(
    content: Mapping[str, Any],
    *,
    base: Path,
    source: str,
    overrides: Mapping[str, str] | None = None,
    overrides_base: Path | None = None,
) -> Recipe:
    """Check a mapping and make a Recipe of it; `source` names it in messages.

    Relative paths are taken from `base`, those in `overrides` from `overrides_base`: what stands in a file is relative to
    the file, what is typed is relative to where it is typed.

    Raises RecipeError listing every problem with its table and key.
    """
    problems: list[str] = []
    paths = {name for name, item, _ in declared() if item.metadata.get("path")}
    for dotted, text in (overrides or {}).items():
        value = _toml_value(text)
        if dotted in paths and isinstance(value, str) and overrides_base is not None:
            value = _text(value, dotted, overrides_base.absolute(), problems)
        content = _overridden(content, dotted.split("."), value)
    values = _table(Recipe, content, "", base.absolute(), problems)
    if problems:
        raise RecipeError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
    recipe = Recipe(**values)
    problems = list(_contradictions(recipe))
    if problems:
        raise RecipeError(f"{source} asks for what cannot be done", problems=problems)
    return recipe


def benchmark_table(content: Mapping[str, Any], source: str) -> BenchmarkTable:
    """The benchmark table alone, checked like a whole recipe's. Raises RecipeError listing every problem."""
    problems: list[str] = []
    values = _table(BenchmarkTable, content, "benchmark", Path(), problems)
    if problems:
        raise RecipeError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
    return BenchmarkTable(**values)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, keys at their default included, so that it says everything; `parse` gives it back."""
    import tomli_w

    return tomli_w.dumps(typing.cast(Mapping[str, Any], _without_none(to_json(recipe))))


def declared() -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key as (dotted name, dataclass field, type), in the order of declaration."""
    hints = typing.get_type_hints(Recipe)
    for top in fields(Recipe):
        table = _table_class(hints[top.name])
        if table is None:
            yield top.name, top, hints[top.name]
        else:
            inner = typing.get_type_hints(table)
            for item in fields(table):
                yield f"{top.name}.{item.name}", item, inner[item.name]


def _contradictions_of_training(table: FinetuneTable) -> Iterator[str]:
    if table.mode == "head first" and table.head_epochs >= table.epochs:
        yield f"finetune.head_epochs = {table.head_epochs} leaves none of the {table.epochs} epochs for the other layers"
    if table.cache_features and (table.mode == "all" or table.unfreeze):
        yield 'finetune.cache_features needs a backbone that stays as it is: mode = "head" or "head first", and no unfreeze'
    if table.cache_features and table.mix != "none":
        yield f"finetune.mix = {table.mix!r} mixes pictures, and with cache_features there are none: leave one of them out"
    if table.aux_loss is not None and table.mode == "head":
        yield 'finetune.aux_loss is for the layers below the auxiliary heads, and with mode = "head" they do not learn'
    if table.views > 1 and not table.cache_features:
        yield f"finetune.views = {table.views} is for cache_features; without it every epoch sees new views"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What each key allows but all of them together do not mean anything."""
    for text in recipe.gate:
        try:
            rule = parse_rule(text)
        except ValueError as error:
            yield f"gate: {error}"
            continue
        if rule.is_of_time:
            yield from _contradictions_of_time(recipe, rule)
            continue
        if recipe.quantize is None:
            yield f"gate {text!r} compares INT8 with FP32, but there is no [quantize] table"
        if recipe.data.validate is None and recipe.data.name is None:
            yield f"gate {text!r} needs labelled images that were not calibrated on: set data.validate (--validate DIR)"
        if recipe.model.weights == "none" and recipe.finetune is None:
            yield f'gate {text!r} judges decisions, and random weights (model.weights = "none") decide nothing'
    if Path(recipe.name).name != recipe.name or recipe.name == "..":
        yield f"name = {recipe.name!r} cannot be the name of a folder"
    if recipe.quantize is not None and recipe.quantize.percentile is not None and recipe.quantize.method != "percentile":
        yield f"quantize.percentile means nothing with method = {recipe.quantize.method!r}: leave it out or change the method"
    if recipe.finetune is not None and recipe.data.name is None and recipe.data.train is None:
        yield "[finetune] needs training images: set data.train or data.name"
    if recipe.finetune is not None:
        yield from _contradictions_of_training(recipe.finetune)
    if recipe.data.name not in (None, "digits") and recipe.data.root is None:
        yield f"data.name = {recipe.data.name!r} lies in a folder: set data.root (--root DIR)"
    if recipe.data.root is not None and recipe.data.name in (None, "digits"):
        yield "data.root is the folder of a data set by name: set data.name to it, or leave it out"
    if recipe.data.held_out is not None and recipe.data.train is None:
        yield "data.held_out is for images beside those of data.train: set that too, or leave it out"
    trains = recipe.finetune is not None and recipe.data.train is not None  # then training images are calibrated on
    if recipe.quantize is not None and recipe.data.name is None and recipe.data.calibrate is None and not trains:
        yield "[quantize] needs calibration images: set data.calibrate (--calibrate DIR) or data.name"
    if recipe.quantize is not None and not recipe.build.runtimes:
        yield "[quantize] follows the rules of a runtime: set build.runtimes (INT8 means another graph for each)"
    if recipe.quantize is not None and recipe.quantize.cpu != "this" and list(recipe.build.runtimes) == ["tensorrt"]:
        yield f"quantize.cpu = {recipe.quantize.cpu!r} means nothing for TensorRT, which runs on a GPU: leave it out"
    if recipe.build.runtimes and "onnx" not in recipe.export.formats:
        yield f'build.runtimes = {list(recipe.build.runtimes)} are built from ONNX: add "onnx" to export.formats'
    if recipe.build.float_type == "fp16" and list(recipe.build.runtimes) != ["tensorrt"]:
        yield (
            'build.float_type = "fp16" is for build.runtimes = ["tensorrt"] alone: ONNX Runtime on a CPU has no float16 '
            "kernels for convolutions and would cast every layer to float32, and so does OpenVINO here"
        )
    if recipe.build.float_type == "fp16" and recipe.export.input != "float":
        yield (
            f'export.input = {recipe.export.input!r} with build.float_type = "fp16": scaling the bytes would be rounded to '
            "half precision, and it is to be exact; feed floats, or leave float_type at fp32"
        )
    yield from _contradictions_of_tensorrt(recipe)
    if recipe.export.size == "dynamic" and "openvino" in recipe.build.runtimes:
        yield 'export.size = "dynamic" with build.runtimes "openvino": its engines are compiled for the sizes of one input'
    if recipe.export.cross_check and recipe.export.exporter != "auto":
        yield f"export.cross_check runs both exporters, and export.exporter = {recipe.export.exporter!r} asks for one"
    if recipe.export.cross_check and "onnx" not in recipe.export.formats:
        yield 'export.cross_check is about ONNX: add "onnx" to export.formats'
    if recipe.build.keep == "fastest" and not recipe.benchmark.enabled:
        yield 'build.keep = "fastest" needs a benchmark, and benchmark.enabled is false'
    if recipe.build.keep == "fastest" and (recipe.build.engine == "skip" or not {*recipe.build.runtimes} - {"tensorrt"}):
        yield 'build.keep = "fastest" chooses among CPU engines: set build.runtimes, build.engine "auto" or "require"'
    if recipe.data.name is not None:
        for key in ("train", "calibrate", "validate"):
            if getattr(recipe.data, key) is not None:
                yield f"data.name = {recipe.data.name!r} brings its own parts: remove data.{key}"
    if not recipe.export.formats:
        yield "export.formats is empty: name onnx, torchscript or both"
    for key, names in (("export.formats", recipe.export.formats), ("build.runtimes", recipe.build.runtimes)):
        if len(set(names)) < len(names):
            yield f"{key} = {list(names)} names one of them twice"
    channels, statistics = recipe.preprocess.channels, ("mean", "std")
    for key in statistics:
        values = getattr(recipe.preprocess, key)
        if values is not None and channels is not None and len(values) != len(channels):
            yield f"preprocess.{key} has {len(values)} values for {len(channels)} channels ({channels})"


def _contradictions_of_tensorrt(recipe: Recipe) -> Iterator[str]:
    table, fixed = recipe.tensorrt, recipe.export.batch
    if "tensorrt" not in recipe.build.runtimes:
        changed = [item.name for item in fields(table) if getattr(table, item.name) != item.default]
        for name in changed:
            yield f'tensorrt.{name} means nothing without a TensorRT engine: add "tensorrt" to build.runtimes, or leave it out'
        return
    if len(table.batch) not in (1, 3) or list(table.batch) != sorted(table.batch):
        yield f"tensorrt.batch = {list(table.batch)}: name smallest, best and largest batch in this order, or one size for all"
    if table.dla_core is not None and fixed == "dynamic" and len(set(table.batch)) != 1:
        yield f"tensorrt.dla_core with batches {list(table.batch)}: a DLA core runs one size; set export.batch to a number"
    if table.dla_core is None and not table.gpu_fallback:
        yield "tensorrt.gpu_fallback = false is about DLA: set dla_core, or leave it out"


def _contradictions_of_time(recipe: Recipe, rule: Rule) -> Iterator[str]:
    if not recipe.benchmark.enabled:
        yield f"gate '{rule}' needs a benchmark, and benchmark.enabled is false"
    if not recipe.build.runtimes:
        yield f"gate '{rule}' needs an engine to measure: set build.runtimes"
    if rule.metric == "slowdown" and recipe.quantize is None:
        yield f"gate '{rule}' compares INT8 with FP32, but there is no [quantize] table"


def _table(cls: type[Any], content: Any, where: str, base: Path, problems: list[str]) -> dict[str, Any]:
    name = f"[{where}]" if where else "the recipe"
    if not isinstance(content, Mapping):
        problems.append(f"{where}: expected a table, got {_quote(content)}")
        return {}
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    for key in content:
        if key not in known:
            problems.append(f"{name}: unknown key {key!r}{_nearest(key, known)}")
    values: dict[str, Any] = {}
    for key, item in known.items():
        dotted = f"{where}.{key}" if where else key
        table = _table_class(hints[key])
        if key not in content:
            if item.default is MISSING:
                problems.append(f"{name}: {key!r} is missing ({item.metadata.get('help', 'a table')})")
        elif table is not None:
            inner = _table(table, content[key], dotted, base, problems)
            if not problems:
                values[key] = table(**inner)
        else:
            values[key] = _value(hints[key], item, content[key], dotted, base, problems)
    return values


def _value(hint: Any, item: Field[Any], value: Any, dotted: str, base: Path, problems: list[str]) -> Any:
    """One key's value in its declared type, or a problem."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{dotted}: expected a list, got {_quote(value)}")
            return ()
        return tuple(_value(arguments[0], item, entry, dotted, base, problems) for entry in value)
    options = [
        option for option in (arguments if origin in (types.UnionType, typing.Union) else (hint,)) if option is not type(None)
    ]
    for option in options:
        if typing.get_origin(option) is tuple:
            return _value(option, item, value, dotted, base, problems)
        if typing.get_origin(option) is Mapping and isinstance(value, Mapping):
            return _arguments(value, dotted, problems)
        if typing.get_origin(option) is Literal and any(
            value == word and type(value) is type(word) for word in typing.get_args(option)
        ):
            return value
        if option is float and type(value) in (int, float):
            return float(value) if _in_range(item, value, dotted, problems) else value
        if option is type(value):
            if option is int:
                _in_range(item, value, dotted, problems)
            if option is str:
                return _text(value, dotted, base if item.metadata["path"] else None, problems)
            return value
    problems.append(f"{dotted}: expected {' or '.join(map(_type_name, options))}, got {_quote(value)}")
    return value


def _arguments(content: Mapping[str, Any], dotted: str, problems: list[str]) -> dict[str, Any]:
    """A table of arguments by name, whose values are of TOML's plain types."""
    problems += [f"{dotted}: {_quote(key)} cannot be the name of a parameter" for key in content if not key.isidentifier()]
    problems += [
        f"{dotted}.{key}: expected text, a finite number, true, false or a list of these, got {_quote(value)}"
        for key, value in content.items()
        if not _is_plain(value)
    ]
    return dict(content)


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as TOML and as JSON: 64-bit whole numbers, no dates, no NaN."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return _is_utf8(value) if isinstance(value, str) else isinstance(value, float) and abs(value) < float("inf")


def _text(value: str, dotted: str, base: Path | None, problems: list[str]) -> str:
    """Text as it is or, with a `base`, as a path taken from there."""
    if not value or "\0" in value:
        problems.append(f"{dotted}: {_quote(value)} names nothing; leave the key out, or give it a value")
    elif not _is_utf8(value):
        problems.append(f"{dotted}: {printable(value)} is not UTF-8, and recipes are; rename it or make a link to it")
    elif base is not None:
        try:
            return _located(value, dotted, base)
        except RuntimeError:
            problems.append(f"{dotted}: {_quote(value)} starts with the home directory of a user that is not known here")
    return value


def _located(value: str, dotted: str, base: Path) -> str:
    """A path taken from `base`; words that are not paths, and the names of networks, stay as they are."""
    if dotted == "model.weights" and value in ("default", "none"):
        return value
    if dotted != "model.name":
        return str(base / Path(value).expanduser())
    file, _, factory = value.rpartition(":")
    return f"{base / Path(file).expanduser()}:{factory}" if file.endswith(".py") else value


def _in_range(item: Field[Any], value: Any, dotted: str, problems: list[str]) -> bool:
    low, high = item.metadata["low"], item.metadata["high"]
    # Written so that NaN, which compares false with everything, is out of every range.
    inside = (low is None or value >= low) and (high is None or value <= high)
    if not inside:
        problems.append(f"{dotted}: {_quote(value)} is not between {low} and {high}")
    return inside


def _overridden(content: Mapping[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of `content` with the value at that path; tables on the way are made."""
    head, *rest = keys
    if not rest:
        return {**content, head: value}
    inner = content.get(head, {})
    return {**content, head: _overridden(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _toml_value(text: str) -> Any:
    """A value in TOML's syntax; a bare word is text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _table_class(hint: Any) -> type[Any] | None:
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and is_dataclass(option):
            return option
    return None


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _is_utf8(value: Any) -> bool:
    """Paths from a command line can hold bytes that are not; a recipe with them could not be written down."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is Mapping:
        return "a table"
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(option))
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(option, str(option))


def _quote(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write down whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
