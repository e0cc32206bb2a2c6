"""The process in which a file of somebody else's is read: first it gives up what it does not need, then it reads.

Its standard input is the file, its current directory is empty and its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deploykit.intake import confine
from deploykit.intake.refused import Refused

Reader = Callable[[BinaryIO], Any]


def main() -> None:
    """Read the request in the first argument, answer in `answer.json`."""
    request = json.loads(sys.argv[1])
    given_up = {"network": confine.leave_the_network(), "folders": confine.write_only_here()}
    reader = READERS[request["task"]]()
    confine.limit(request["cpu_s"], request["memory_bytes"])
    with os.fdopen(0, "rb", closefd=False) as file:
        answer = {"answer": given_up} if request["task"] == "nothing" else _asked(reader, file)
    Path("answer.json").write_text(json.dumps(answer))


def _asked(reader: Reader, file: BinaryIO) -> Mapping[str, Any]:
    try:
        return {"answer": reader(file)}
    except Refused as refused:
        facts = {"why": refused.why, "told": refused.told, "fix": refused.fix, "problems": list(refused.problems)}
        return {"refused": facts}


def _checkpoint() -> Reader:
    from deploykit.intake import checkpoint

    return checkpoint.read


def _graph() -> Reader:
    from deploykit.intake import graphs

    return graphs.facts()


def _session() -> Reader:
    from deploykit.intake import graphs

    return graphs.rehearsal()


def _nothing() -> Reader:
    return lambda _: None


# Each imports what it needs and gives the function that reads, so that start-up comes before the limits.
READERS: dict[str, Callable[[], Reader]] = {
    "checkpoint": _checkpoint,
    "graph": _graph,
    "session": _session,
    "nothing": _nothing,
}
