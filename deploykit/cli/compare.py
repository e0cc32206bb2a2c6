"""Commands that compare: benchmark, parity, bisect, compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import click

from deploykit import recipe as recipes
from deploykit.cli.ci import for_ci
from deploykit.cli.options import argument_option, arguments_of, json_option, pairs, progress_bars, recipe_option
from deploykit.errors import UsageError, printable
from deploykit.gate import Rule, parse_rule

_OF_TWO_SIDES = {
    "model__weights": "--weights",
    "gates": "--gate",
    "layouts": "--layout",
    "words": "--arg",
    "by_position": "--by-position",
} | {name: f"--{name}" for name in ("labelled", "tolerance", "stress", "preprocess", "size", "literal", "cast", "trust")}


@click.command("benchmark")
@click.argument("names", nargs=-1, metavar="[ENGINES]...")
@recipe_option("--processes", "benchmark.processes")
@recipe_option("--queries", "benchmark.queries")
@recipe_option("--warmup", "benchmark.warmup")
@click.option("--offline-batch", "offline_batches", multiple=True, type=int, help="Images in one offline query; several sweep.")
@recipe_option("--offline-seconds", "benchmark.offline_seconds")
@recipe_option("--seed", "benchmark.seed")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the raw samples, which --baseline reads.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="Compare with an earlier run of this machine.")
@click.option(
    "--fail-on",
    metavar="PERCENT",
    help="Largest slowdown allowed, such as 5%; short for --gate 'slowdown <= 5 %'. With --metric instructions, how many more.",
)
@click.option("--gate", "gates", multiple=True, metavar="RULE", help="A rule of time, such as 'latency <= 5 ms'.")
@click.option(
    "--size", type=click.IntRange(1, 8192), metavar="PIXELS", help="Height and width where an ONNX file leaves them open."
)
@click.option(
    "--times", multiple=True, metavar="[NAME=]FILE", help="Instead of engines: what trtexec --exportTimes wrote elsewhere."
)
@click.option(
    "--export-times", type=click.Path(path_type=Path), metavar="FILE", help="Write the times of one engine as trtexec does."
)
@click.option(
    "--metric",
    type=click.Choice(["time", "instructions"]),
    default="time",
    help="instructions: count what an inference executes, which no neighbour disturbs: a gate for shared machines, never a time.",
)
@click.option(
    "--scenario",
    type=click.Choice(["single-stream", "multi-stream", "server"]),
    default="single-stream",
    help="MLPerf's: one query after the other, --streams at once, or at random moments.  [default: single-stream]",
)
@click.option("--streams", type=click.IntRange(1, 256), help="Queries at once (multi-stream: 8) or sessions (server: 1).")
@click.option("--rate", type=click.FloatRange(1e-3, 1e6), metavar="PER_SECOND", help="Arrivals of the server scenario.")
@click.option(
    "--p99", type=click.FloatRange(1e-3, 1e6), metavar="MS", help="Search the highest rate that holds this p99 instead."
)
@click.option(
    "--instances", type=click.IntRange(1, 256), default=1, help="So many processes side by side, each on cores of its own."
)
@click.option(
    "--isa", metavar="CPU", help="Count instructions in qemu for this CPU (see parity --isa), not in callgrind for this one."
)
@click.option(
    "--calibrate-predictor",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep what was measured of this device, for predict --measured FILE, which is then fitted to it.",
)
@click.option("--trust", is_flag=True, help="Load engines that are TorchScript, which runs the program in them.")
@click.option("--arm-root", type=click.Path(path_type=Path), metavar="DIR", help="As for parity --isa, for ARM CPUs.")
@click.option("--roots", help="Folder on a device with a folder of releases for each network.  [default: /opt/deploykit]")
@click.option("--python", help="The device's Python, 3.10 or newer.  [default: python3]")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="Instead of your own ssh_config(5).")
@for_ci("benchmark")
def benchmark_command(
    names: tuple[str, ...],
    offline_batches: tuple[int, ...],
    output: Path | None,
    baseline: Path | None,
    fail_on: str | None,
    gates: tuple[str, ...],
    size: int | None,
    metric: str,
    isa: str | None,
    arm_root: Path | None,
    scenario: str,
    streams: int | None,
    rate: float | None,
    p99: float | None,
    instances: int,
    times: tuple[str, ...],
    export_times: Path | None,
    calibrate_predictor: Path | None,
    trust: bool,
    roots: str | None,
    python: str | None,
    ssh_config: Path | None,
    **values: Any,
) -> Mapping[str, Any]:
    """Measure engines in fresh processes, and compare.

    ENGINES are folders of engines, runs with all their engines, bundles, or ONNX files of anybody, which are built for ONNX
    Runtime first; of several graphs in a bundle, BUNDLE:onnxruntime-int8 names one. The first is the baseline, unless there is a
    --baseline file. A run that something disturbed is invalid, and a gate then cannot tell.

    With --calibrate-predictor the first may be a device, ssh://[user@]host[:port], and the others bundles that are deployed
    there: their releases are measured on it, one after the other, while it is leased.
    """
    table: dict[str, Any] = {key.partition("__")[2]: value for key, value in values.items() if value is not None}
    if offline_batches:
        table["offline_batches"] = list(offline_batches)
    files = {"baseline": baseline, "output": output, "size": size}
    asked: dict[str, Any] = {"streams": streams, "rate": rate, "p99": p99, "instances": instances if instances > 1 else None}
    rest: dict[str, Any] = {
        "metric": metric,
        "scenario": scenario,
        "isa": isa,
        "arm_root": arm_root,
        "export_times": export_times,
    }
    rest["trust"] = trust or None
    reaching = {"roots": roots, "python": python, "ssh_config": ssh_config}
    if names and "://" in names[0]:
        _refuse_beside_a_device(
            {**table, **files, **asked, **rest, "times": times or None, "gate": gates or None, "fail_on": fail_on}
        )
        return _on_a_device(names, table, calibrate_predictor, reaching)
    if any(value is not None for value in reaching.values()):
        raise UsageError(
            "--roots, --python and --ssh-config are about a device", fix="name it first, as ssh://[user@]host[:port]"
        )
    engines = tuple(map(Path, names))
    if calibrate_predictor is not None:
        _refuse_beside_calibration({"times": times or None, "scenario": scenario, "metric": metric, "instances": instances})
    if times:
        _refuse_beside_times(engines, {**table, **files, **asked, **rest})
        return _of_times(times, _rules_of_time(gates, fail_on))
    if not engines:
        raise UsageError("nothing is named to be measured", fix="deploykit benchmark ENGINE, or --times FILE")
    if metric == "instructions":
        scenarios = {
            "scenario": None if scenario == "single-stream" else scenario,
            "export_times": export_times,
            "trust": trust or None,
        }
        scenarios |= asked
        _refuse_beside_instructions({**table, **{key: value for key, value in scenarios.items() if value is not None}}, gates)
        return _instructions(engines, fail_on, isa=isa, arm_root=arm_root, **files)
    if isa is not None or arm_root is not None:
        raise UsageError("--isa and --arm-root are about instructions", fix="add --metric instructions")
    files |= {"times": export_times, "scenario": _scenario(scenario, table, **asked), "trust": trust}
    return _timed(engines, _rules_of_time(gates, fail_on), table, calibrate_predictor, **files)


def _scenario(name: str, table: Mapping[str, Any], *, streams: Any, rate: Any, p99: Any, instances: int | None) -> Any:
    """The scenario that options ask for. Raises UsageError with every option that means nothing in it, or is missing."""
    from deploykit.benchmark.scenarios import Scenario

    offline = [key for key in ("offline_batches", "offline_seconds") if key in table]
    problems = ["--rate and --p99 are for --scenario server"] * (name != "server" and (rate, p99) != (None, None))
    problems += ["--streams is for --scenario multi-stream and server"] * (name == "single-stream" and streams is not None)
    problems += ["--scenario server wants --rate or --p99, and one of them"] * (
        name == "server" and (rate is None) == (p99 is None)
    )
    problems += ["--instances are single-stream each"] * (instances is not None and name != "single-stream")
    problems += ["offline throughput is measured beside single-stream latency alone"] * (
        name != "single-stream" and bool(offline)
    )
    problems += ["--offline-batch means nothing to --instances"] * (instances is not None and "offline_batches" in table)
    if problems:
        raise UsageError("these options do not go together", problems=problems)
    bound_ns = None if p99 is None else round(1e6 * p99)
    usual = 8 if name == "multi-stream" else 1
    return Scenario(cast(Any, name), streams or usual, rate, bound_ns, instances or 1)


@click.command("compare")
@click.argument("runs", nargs=2, type=click.Path(path_type=Path), metavar="RUN_A RUN_B")
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Write the page here, as HTML.")
@json_option
def compare_command(runs: tuple[Path, Path], output: Path, as_json: bool) -> None:
    """Compare what two runs found, on one page.

    RUN_A and RUN_B are folders of runs, or their result.json. The page says first whether B is better or worse, and names what
    cannot be compared: times of two machines, or decisions about other images. There is no gate, so the exit code is 0.
    """
    from deploykit.report import compare, text

    found = compare.compare_runs(*runs, output)
    click.echo(json.dumps(found) if as_json else text.compared(found), nl=as_json)


def _of_times(names: tuple[str, ...], rules: list[Rule]) -> Mapping[str, Any]:
    from deploykit.timing import times

    return times.read(names, rules)


def _refuse_beside_times(engines: tuple[Path, ...], words: Mapping[str, Any]) -> None:
    """Raise UsageError for engines, and for options about a measurement: it has been made already."""
    usual = {"metric": "time", "scenario": "single-stream"}
    problems = [f"{path} would be measured here" for path in engines]
    problems += [
        f"--{name.replace('_', '-')} is about measuring" for name, value in words.items() if value not in (None, usual.get(name))
    ]
    if problems:
        raise UsageError("--times and these do not go together", problems=problems)


def _refuse_beside_calibration(words: Mapping[str, Any]) -> None:
    """Raise UsageError for a measurement that says nothing of how long one query takes alone."""
    usual = {"metric": "time", "scenario": "single-stream", "instances": 1}
    problems = [f"--{name} {value}" for name, value in words.items() if value not in (None, usual.get(name))]
    if problems:
        why = "the predictor is fitted on single queries that are measured here"
        raise UsageError("--calibrate-predictor does not go together with these", why=why, problems=problems)


def _refuse_beside_a_device(words: Mapping[str, Any]) -> None:
    """Raise UsageError for options that the device half does not know; what it measures is single queries."""
    usual = {"metric": "time", "scenario": "single-stream"}
    known = ("processes", "queries")
    problems = [
        f"--{name.replace('_', '-')}"
        for name, value in words.items()
        if value not in (None, usual.get(name)) and name not in known
    ]
    if problems:
        fix = "leave them out, or run deploykit benchmark on the device"
        raise UsageError("a device is not measured with these", problems=problems, fix=fix)


def _on_a_device(
    names: tuple[str, ...], table: Mapping[str, Any], calibration: Path | None, reaching: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Calibrate the predictor for a device, by releases that are installed there."""
    from deploykit import remote
    from deploykit.cli.devices import owner
    from deploykit.forecast import measured, over

    address, *bundles = names
    if calibration is None:
        why = "a device's latency is gated when a bundle is deployed there, by the rules in its recipe"
        raise UsageError("a device is measured here for the predictor alone", why=why, fix="add --calibrate-predictor FILE")
    settings, file = recipes.benchmark_table(table, "the command line"), measured.File(calibration)
    where = {key: reaching[key] for key in ("roots", "python") if reaching[key] is not None}
    connection = remote.connect(address, ssh_config=reaching["ssh_config"])
    try:
        with progress_bars() as progress:
            found = over.measure(connection, list(map(Path, bundles)), settings, file, owner=owner(), progress=progress, **where)
    finally:
        connection.close()
    return found


def _timed(
    engines: tuple[Path, ...], rules: list[Rule], table: Mapping[str, Any], calibration: Path | None, **files: Any
) -> Mapping[str, Any]:
    from deploykit import timing

    settings = recipes.benchmark_table(table, "the command line")
    keeper = None
    if calibration is not None:
        from deploykit import forecast
        from deploykit.forecast import measured

        keeper = measured.Keeper(measured.File(calibration), forecast.target_of("local"))
    with progress_bars() as progress:
        found = timing.measure(engines, settings, rules, keeper=keeper, progress=progress, **files)
    return (
        found
        if keeper is None
        else {**found, "calibration": {"file": printable(keeper.file.path), "measurements": keeper.file.count}}
    )


def _instructions(engines: tuple[Path, ...], fail_on: str | None, **words: Any) -> Mapping[str, Any]:
    from deploykit.timing import instructions

    limit = None if fail_on is None else _rules_of_time((), fail_on)[0].limit
    with progress_bars() as progress:
        return instructions.measure(engines, limit=limit, progress=progress, **words)


def _refuse_beside_instructions(table: Mapping[str, Any], gates: tuple[str, ...]) -> None:
    """Raise UsageError for options that are about time."""
    problems = [f"--{key.replace('_', '-').removesuffix('es' * (key == 'offline_batches'))} is about time" for key in table]
    problems += [f"--gate {gate!r} is about time" for gate in gates]
    if problems:
        fix = "deploykit benchmark A B --metric instructions --fail-on 0.5%"
        raise UsageError("--metric instructions and these do not go together", problems=problems, fix=fix)


@click.command("parity")
@click.argument("what", nargs=-1, required=True, metavar="A B | PATH")
@click.option(
    "--isa",
    "cpus",
    multiple=True,
    metavar="CPU",
    help="Emulate this CPU: haswell (AVX2 without VNNI), nehalem (SSE4.2), cortex-a72 or cortex-a76 (ARM "
    "without and with an int8 dot product). May be given several times; wants one PATH.",
)
@click.option("--data", "images", type=click.Path(path_type=Path), metavar="DIR", help="Images to compare on.")
@click.option(
    "--arm-root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with a 64-bit ARM Python and ONNX Runtime, as `deploykit device emulate` makes it; for ARM CPUs.",
)
@click.option("--labelled", is_flag=True, help="The sub-folders of --data are the classes: compare the accuracy of both as well.")
@click.option("--gate", "gates", multiple=True, metavar="RULE", help="A rule of decisions, such as 'agreement >= 99 %'.")
@click.option("--tolerance", type=click.FloatRange(0, 1e9), help="Largest max|d| / max|A|, instead of that of the precisions.")
@click.option("--stress", is_flag=True, help="Feed what breaks engines as well: extremes, other batches, threads, wrong arrays.")
@recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@click.option(
    "--preprocess",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a picture becomes an input, as in the recipe's table [preprocess].",
)
@click.option(
    "--size", type=click.IntRange(1, 8192), metavar="PIXELS", help="Height and width where an ONNX file leaves them open."
)
@click.option("--layout", "layouts", multiple=True, metavar="A|B=nhwc", help="This side has its channels last.")
@click.option("--literal", multiple=True, type=click.Choice(["A", "B"]), help="Execute this ONNX graph without any optimization.")
@click.option("--cast", is_flag=True, help="Feed each side its own floating-point type.")
@click.option("--by-position", is_flag=True, help="Inputs and outputs of both are in one order, whatever they are called.")
@click.option("--trust", is_flag=True, help="Load TorchScript, which runs the program in it.")
@argument_option
@for_ci("parity")
def parity_command(
    what: tuple[str, ...], cpus: tuple[str, ...], images: Path | None, arm_root: Path | None, **words: Any
) -> Mapping[str, Any]:
    """Prove that two things answer alike, or one graph on other CPUs.

    A and B are each an artifact's folder or file (ONNX, TorchScript, engine), a bundle, anybody's ONNX or TorchScript file, or a
    PyTorch network by name or FILE.py:factory. Both are fed the images of --data, else golden samples, else generated inputs.
    Exit code 3 when B's answers are further from A's than the precision of both explains, when anything is not a number, when
    one was made from another network than the other, when layers that were meant for int8 do not run in it, or when classes are
    in another order.

    With --isa, PATH is a run, or the artifact of its quantization. Its graph runs on ONNX Runtime here and in an emulator
    (qemu-user), on its golden samples and on the images of --data. Exit code 3 when an image is decided otherwise, or when
    answers are more than one step of the last quantized tensor apart.
    """
    if cpus:
        _refuse_beside_isa(what, words)
        from deploykit import isa

        with progress_bars() as progress:
            return isa.compare(Path(what[0]), cpus, images=images, arm_root=arm_root, progress=progress)
    if len(what) != 2:
        fix = "deploykit parity A B, or deploykit parity PATH --isa haswell"
        raise UsageError(f"parity compares two things, and {len(what)} {'is' if len(what) == 1 else 'are'} named", fix=fix)
    if arm_root is not None:
        raise UsageError("--arm-root is for --isa")
    return _crosscheck((what[0], what[1]), images, **words)


@click.command("bisect")
@click.argument("a")
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--data", "images", type=click.Path(path_type=Path), metavar="DIR", help="Images to compare on.")
@click.option("--images", "count", type=click.IntRange(1), default=32, help="At most so many of them.  [default: 32]")
@click.option("--weights", metavar="default|none|FILE", help="A is a PyTorch network, with these weights.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    help="Where B runs, with every tensor an output; wants TensorRT and a GPU.  [default: onnxruntime]",
)
@for_ci("bisect")
def bisect_command(a: str, b: Path, images: Path | None, count: int, weights: str | None, runtime: Any) -> Mapping[str, Any]:
    """Find the first layer of B that is wrong.

    A is right: an ONNX file, an artifact, or with --weights a network by name or FILE.py:factory. B is an ONNX file or artifact
    of the same network, in float or INT8. Each layer of B runs alone on A's activations; exit code 3 when one is off by more
    than its precision explains. Without --data, A's golden samples are compared, or else noise.
    """
    from deploykit.bisect import command

    with progress_bars() as progress:
        return command.compare(a, b, images=images, count=count, weights=weights, runtime=runtime, progress=progress)


def _rules_of_time(gates: tuple[str, ...], fail_on: str | None) -> list[Rule]:
    """The rules on the command line. Raises UsageError with every one that is none, or is not one of time."""
    rules, problems = _parsed(gates)
    if fail_on is not None:
        slowdown, wrong = _parsed([f"slowdown <= {fail_on.strip().removesuffix('%').strip()} %"])
        rules += slowdown
        problems += [f"--fail-on {fail_on!r} is no percentage, such as 5%"] * bool(wrong)
    problems += [f"'{rule}' is about answers; `deploykit run` judges it" for rule in rules if not rule.is_of_time]
    if problems:
        raise UsageError("these are no rules of time", problems=problems, fix="--gate 'latency <= 5 ms' --fail-on 5%")
    return rules


def _crosscheck(names: tuple[str, str], images: Path | None, **words: Any) -> Mapping[str, Any]:
    """`parity A B` as its options say."""
    from deploykit import crosscheck

    said = crosscheck.Said(
        weights=words["model__weights"] or "default",
        preprocess=pairs("--preprocess", words["preprocess"], "crop=224"),
        size=words["size"],
        literal=words["literal"],
        layouts=_layouts(words["layouts"]),
        trust=words["trust"],
        args=arguments_of(words["words"]),
        cast=words["cast"],
        by_position=words["by_position"],
    )
    with progress_bars() as progress:
        return crosscheck.compare_two(
            *names,
            said,
            images=images,
            labelled=words["labelled"],
            rules=_rules(words["gates"]),
            tolerance=words["tolerance"],
            stressed=words["stress"],
            progress=progress,
        )


def _refuse_beside_isa(what: tuple[str, ...], words: Mapping[str, Any]) -> None:
    """Raise UsageError for a second path, and for options that are about two sides."""
    problems = [f"{len(what)} things are named; emulated CPUs are compared on one graph"] * (len(what) != 1)
    problems += [f"{_OF_TWO_SIDES[name]} is for parity A B" for name, value in words.items() if _is_said(value)]
    if problems:
        raise UsageError("--isa and these do not go together", problems=problems)


def _is_said(value: object) -> bool:
    """Whether an option was given; 0 is a value, although it equals False."""
    return value is not None and value is not False and value != ()


def _layouts(texts: tuple[str, ...]) -> dict[str, Any]:
    found = pairs("--layout", texts, "B=nhwc")
    problems = [f"{key}={value}" for key, value in found.items() if key not in ("A", "B") or value not in ("nchw", "nhwc")]
    if problems:
        raise UsageError("--layout names a side, A or B, and nchw or nhwc", problems=problems)
    return found


def _rules(texts: tuple[str, ...]) -> list[Rule]:
    """The rules on the command line. Raises UsageError with every one that is none."""
    rules, problems = _parsed(texts)
    if problems:
        raise UsageError("these are no gate rules", problems=problems)
    return rules


def _parsed(texts: Iterable[str]) -> tuple[list[Rule], list[str]]:
    """The rules, and what is wrong with each text that is none."""
    rules, problems = [], []
    for text in texts:
        try:
            rules.append(parse_rule(text))
        except ValueError as error:
            problems.append(str(error))
    return rules, problems
