"""The device half: what a device does with bundles, one command each, its answer as JSON on standard output.

    python3 device.pyz install my-net.bundle --root /opt/deploykit/my-net

In order: install, build, parity, benchmark where there is a latency to be kept, activate; each one refuses until the one
before has succeeded, and each one that has been done already does nothing. Nothing of a bundle is executed before its
signature (where signers are known), its manifest and the digest of every file have been checked.

Exit codes are those of the command line of the host: 0 done, 1 failed, 2 usage, 3 a gate failed, 4 this machine lacks what
was required, 5 a gate cannot be decided.

This module runs on devices: standard library, numpy and one runtime, Python 3.10.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from deploykit.agent.answer import Answer, probe
from deploykit.errors import DeploykitError, printable
from deploykit.jsonable import finite, to_json


def main() -> NoReturn:
    """Run the command in `sys.argv`, write its answer as JSON, and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """Run one command; its answer, or the error, goes to standard output as one JSON document."""
    # What Python imports from a zipapp it compiles each time anew, and releases, bundles and gates are most of what there is.
    if list(words) == ["probe"]:
        return _said(probe)
    import runpy

    from deploykit import benchmark

    if list(words[:1]) == [benchmark.CHILD]:
        runpy.run_module("deploykit.benchmark.process", run_name="__main__")
        return 0
    from deploykit.agent import commands

    asked = commands.parser().parse_args(words)
    return _said(lambda: asked.does(asked))


def _said(does: Callable[[], Answer]) -> int:
    """Write what a command found, or why it could not, and give its exit code."""
    try:
        answer = does()
    except DeploykitError as error:
        fix = error.fix.replace("--output", "--root")  # advice about files names the host's option
        facts = {"what": error.what, "problems": list(error.problems), "why": error.why, "fix": fix}
        answer = Answer({"error": facts}, error.exit_code)
    except OSError as error:
        named = "" if error.filename is None else f": {printable(str(error.filename))}"
        answer = Answer({"error": {"what": f"the operating system refuses{named}", "why": str(error.strerror or error)}}, 1)
    # A number that JSON has not (infinity, NaN) becomes text.
    facts = cast(dict[str, Any], finite(to_json(answer.facts)))
    sys.stdout.write(json.dumps({**facts, "exit_code": answer.code}, indent=1) + "\n")
    return answer.code
