"""The command line: a command parses, calls one function, prints one result.

Results go to standard output, as JSON with `--json`; progress and errors go to standard error. Options take their
help, defaults and ranges from `recipe`. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from typing import NoReturn

import click

from deploykit.cli import bundles, ci, compare, devices, look, make, targets
from deploykit.errors import DeploykitError, UsageError

_INTERRUPTED, _TERMINATED = 130, 143


def main() -> NoReturn:
    """Run the command line and exit with the code that design and documentation promise."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        _tell_ci(UsageError(error.format_message()))
        sys.exit(2)
    except DeploykitError as error:
        click.echo(f"error: {error}", err=True)
        if "--json" in sys.argv:
            facts = {"what": error.what, "problems": error.problems, "why": error.why, "fix": error.fix}
            click.echo(json.dumps({"error": facts, "exit_code": error.exit_code}))
        _tell_ci(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; what a run had finished is kept, and the same command goes on from there", err=True)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        _tell_ci(error)
        raise
    finally:
        # torch leaves millions of objects; the interpreter would look through them to free what ends with the process.
        gc.freeze()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="deploykit")
def cli() -> None:
    """From a PyTorch CNN to a verified engine on the device.

    Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 a gate failed, 4 this machine lacks what was required, 5 too few
    images or processes to decide a gate, 130 interrupted.
    """


for _command in (
    *(make.run_command, make.finetune_command, make.export_command),
    *(compare.benchmark_command, compare.parity_command, compare.bisect_command, compare.compare_command),
    *(look.inspect_command, look.models_command, look.doctor_command, look.clean_command, look.recipe_group),
    *(bundles.pack_command, bundles.verify_command),
    *(devices.deploy_command, devices.rollback_command, devices.status_command, devices.device_group),
    *(targets.targets_command, targets.predict_command, targets.plan_command),
):
    cli.add_command(_command)


def _tell_ci(error: Exception) -> None:
    """CI reads of errors, too, where the command that was named has gates."""
    command = cli.commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None and "junit" in {parameter.name for parameter in command.params}:
        ci.tell_of(error)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    """SIGTERM unwinds like an exception, so that half-written directories are removed."""
    sys.exit(_TERMINATED)
