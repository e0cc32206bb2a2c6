"""Every key of a recipe, declared once: name, type, default, range and help.

Each table is a dataclass; each key is a field. The command line takes its options' defaults, ranges and help from here, and
`docs/recipe.md` is generated from it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from deploykit.gate import Rule, parse_rule

Portable = Literal["onnx", "torchscript"]
FloatType = Literal["fp32", "tf32", "fp16", "bf16"]

# What may stand before the colon of a network's name and is no code of the user's.
SCHEMES = ("timm", "ensemble")


@dataclass(frozen=True)
class Offer:
    """What a recipe may ask of a runtime: the float types of its engines, why there are no others, which portable file they are
    built from, and why there is no INT8."""

    floats: tuple[FloatType, ...]
    no_other: str = ""
    made_of: Portable = "onnx"
    no_int8: str = ""


# `runtimes.REGISTRY` has the modules; this page of it is read where no runtime is loaded.
OFFERS: Mapping[str, Offer] = {
    "onnxruntime": Offer(("fp32",), "on a CPU it has no float16 kernels for convolutions and would cast every layer to float32"),
    "openvino": Offer(("fp32",), "its engines here compute in float32 whatever the graph holds"),
    "tensorrt": Offer(
        ("fp32", "fp16"),
        "TensorRT takes TF32 for its fp32 as it sees fit, and graphs have opset 19, in which no convolution is of bfloat16",
    ),
    "onnxruntime_cuda": Offer(
        ("fp32", "tf32", "fp16"),
        "graphs have opset 19, in which no convolution is of bfloat16",
        no_int8="its CUDA kernels compute in float between Q and DQ",
    ),
    "torchscript_cuda": Offer(("fp32", "tf32", "fp16", "bf16"), made_of="torchscript", no_int8="TorchScript holds no Q/DQ"),
}


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
    channels_last: bool | Literal["auto"] = setting(
        "keep channels last in memory; auto: on a CPU for networks with depthwise convolutions, on a GPU with autocast", "auto"
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

    formats: tuple[Portable, ...] = setting("which files to write", ("onnx",))
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
    samples: int | None = setting(
        "golden samples stored with each file; when absent 16, or of large pictures as many as have the pixels of 16 of "
        "224 x 224, at least 2. Of maps of scores and masks no more are stored than fit 64 MiB",
        None,
        low=1,
        high=4096,
    )


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

    runtimes: tuple[Literal["onnxruntime", "openvino", "tensorrt", "onnxruntime_cuda", "torchscript_cuda"], ...] = setting(
        "which engines to build", ("onnxruntime",)
    )
    keep: Literal["all", "fastest"] = setting(
        "fastest: of the engines that no gate fails, the one with the lowest latency is copied to the folder `fastest`", "all"
    )
    target: str | None = setting(
        "the board that it is meant for, by name (`deploykit targets`) or as a TOML file; what it cannot run is refused at once",
        None,
    )
    jetpack: str | None = setting(
        "the JetPack release on that board, such as 7.2.2; absent: it has to work with the oldest that builds our engines",
        None,
    )
    engine: Literal["auto", "require", "skip"] = setting(
        "auto: build where this machine can, say so where not; require: else exit 4; skip: portable files only", "auto"
    )
    float_type: Literal["fp32", "tf32", "fp16", "bf16"] = setting(
        "what engines compute in, with INT8 what stays float: all bits of float32, TF32 (ten bits of what is multiplied), half "
        "precision or bfloat16; refused for runtimes that have no such kernels",
        "fp32",
    )
    float32: tuple[str, ...] = setting(
        "with float_type fp16: operators, and nodes by name or pattern, that stay in float32: 'Sigmoid', 'head.*'; beside "
        "softmax, exponentials, powers, sums over axes and NMS, which always do",
        (),
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

    @property
    def left_to_the_device(self) -> tuple[Rule, ...]:
        """Rules of latency that the board alone can judge: the recipe names it, and says that no engine is built here."""
        if self.build.target is None or self.build.engine != "skip":
            return ()
        return tuple(rule for rule in self.rules if rule.metric == "latency")


def declared() -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key as (dotted name, dataclass field, type), in the order of declaration."""
    hints = typing.get_type_hints(Recipe)
    for top in fields(Recipe):
        table = table_class(hints[top.name])
        if table is None:
            yield top.name, top, hints[top.name]
        else:
            inner = typing.get_type_hints(table)
            for item in fields(table):
                yield f"{top.name}.{item.name}", item, inner[item.name]


def table_class(hint: Any) -> type[Any] | None:
    """The dataclass of a table, where a key's type is one or None; None for any other key."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and is_dataclass(option):
            return option
    return None
