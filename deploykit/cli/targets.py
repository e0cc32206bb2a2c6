"""Commands about devices that nobody has yet: targets, predict, plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from deploykit.cli.options import json_option
from deploykit.errors import UsageError, printable, translating_os_errors

_target_option = click.option(
    "--target",
    metavar="NAME|FILE",
    help="A board: deploykit targets lists them; a TOML file; or local, this machine.  [default: what --measured is about]",
)
_mode_option = click.option("--power-mode", metavar="MODE", help="A power mode of the board, by name or number.")
_size_option = click.option(
    "--size", type=click.IntRange(1, 8192), metavar="PIXELS", help="Height and width where the file leaves them open."
)
_measured_option = click.option(
    "--measured",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measurements on this very device: what deploykit benchmark --calibrate-predictor wrote, or JSON of "
    '[{"model": "resnet18", "precision": "fp16", "batch": 1, "latency_ms": 2.5}].',
)


@click.command("targets")
@click.argument("name", default="")
@click.option("--toml", is_flag=True, help="Print the board's file, to begin one of your own with.")
@json_option
def targets_command(name: str, toml: bool, as_json: bool) -> None:
    """List the boards that are known, or all that is known of one.

    NAME is a board, local for this machine, or a TOML file of yours, which is checked.
    """
    from deploykit import forecast, targets
    from deploykit.jsonable import to_json
    from deploykit.report import forecast as text

    if not name:
        if toml:
            raise UsageError("--toml prints one board's file", fix="deploykit targets orin-nano --toml")
        boards = [targets.find(each) for each in targets.names()]
        click.echo(json.dumps([to_json(board) for board in boards], indent=1) if as_json else text.targets(boards), nl=as_json)
        return
    if toml and name == "local":
        raise UsageError("this machine has no file", fix="deploykit targets x86-avx2 --toml is one to begin with")
    board = forecast.target_of(name)
    if toml:
        click.echo(targets.source(name).read_text(), nl=False)
    else:
        click.echo(json.dumps(to_json(board), indent=1) if as_json else text.target(board), nl=as_json)


@click.command("predict")
@click.argument("model")
@_target_option
@_mode_option
@click.option("--precision", type=click.Choice(["int8", "fp16", "fp32"]), help="Otherwise INT8 for a graph with Q/DQ, else FP32.")
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Images in one query.")
@_size_option
@_measured_option
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the roofline.")
@json_option
def predict_command(
    model: str,
    target: str | None,
    power_mode: str | None,
    precision: str | None,
    batch: int,
    size: int | None,
    measured: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Predict the latency of a network on a board, with an interval.

    MODEL is a bundle, an artifact's folder, an ONNX file, or a name of deploykit models. The interval holds the measured
    latency in 80 of 100 cases; where published measurements do not cover the case, the answer says so.
    """
    from deploykit import forecast
    from deploykit.jsonable import to_json
    from deploykit.report import forecast as text

    board = forecast.target_of(target, power_mode, measured)
    found = forecast.predict(model, board, precision=precision, batch=batch, size=size, measured=measured)
    if picture is not None:
        with translating_os_errors("write", picture):
            picture.write_text(text.roofline(found, board))
    click.echo(json.dumps(to_json(found), indent=1) if as_json else text.prediction(found), nl=as_json)
    if picture is not None and not as_json:
        click.echo(f"roofline: {printable(picture)}")


@click.command("plan")
@click.argument("model")
@_target_option
@_mode_option
@click.option("--budget", required=True, metavar="TIME", help="Of one query, such as 5ms.")
@_size_option
@_measured_option
@click.option("--no-relatives", is_flag=True, help="Only this network, not its smaller relatives.")
@json_option
def plan_command(
    model: str,
    target: str | None,
    power_mode: str | None,
    budget: str,
    size: int | None,
    measured: Path | None,
    no_relatives: bool,
    as_json: bool,
) -> None:
    """List what keeps a latency on a board: precisions, batches, smaller relatives of the network."""
    from deploykit import forecast
    from deploykit.jsonable import to_json
    from deploykit.report import forecast as text

    budget_ns = forecast.budget_of(budget)
    board = forecast.target_of(target, power_mode, measured)
    found = forecast.plan(model, board, budget_ns, size=size, relatives=not no_relatives, measured=measured)
    facts = [to_json(replace(choice, prediction=replace(choice.prediction, layers=()))) for choice in found]
    click.echo(json.dumps(facts, indent=1) if as_json else text.choices(found, budget_ns), nl=as_json)
