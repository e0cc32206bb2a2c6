"""The process whose instructions are counted: inferences of one graph, each of them told from all the rest.

Run as a module it reads a request as JSON from standard input and answers in JSON. What counts is outside: callgrind, or a
plugin of qemu.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError

# callgrind collects while this function runs (--toggle-collect). `counting` compiles it: callgrind does not see calls that come
# straight from libffi, so a function of the C library that is called from here would not do.
BRACKET, DOOR = "deploykit_counted", "deploykit_bracket"
# getpriority refuses this number and so does nothing, and no program would ask for it: the plugin of qemu sees the system call.
MARK = 0x4D41524B
Work = Callable[[], None]


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the graph `request["graph"]` on each of the inputs in `request["inputs"]` (an .npz), one image a query.

    The inputs run once before, so that what is done only the first time is not counted.
    """
    from deploykit.runtimes import onnxruntime

    with np.load(request["inputs"], allow_pickle=False) as arrays:
        inputs = {name: arrays[f"arr_{number}"] for number, name in enumerate(request["names"])}
    size = request["images_per_query"]
    queries = [
        {name: np.ascontiguousarray(array[start : start + size]) for name, array in inputs.items()}
        for start in range(0, len(next(iter(inputs.values()))), size)
    ]
    session = onnxruntime.optimized(Path(request["graph"]), threads=1)
    told_apart = bracket_of(Path(request["bracket"])) if request["bracket"] else between_marks
    # A collection in the middle of an inference would be counted with it.
    gc.disable()
    for is_counted in (False, True):
        for query in queries:
            session.feed(query)
            (told_apart if is_counted else _plainly)(session.execute)
    return {"queries": len(queries), "onnxruntime": onnxruntime.VERSION, "python": sys.version.partition(" ")[0]}


def bracket_of(library: Path) -> Callable[[Work], None]:
    """What does some work inside a call of `BRACKET`, which is in `library`."""
    door = getattr(ctypes.CDLL(str(library)), DOOR)
    door.restype = None
    calls_back = ctypes.CFUNCTYPE(None)

    def within_bracket(work: Work) -> None:
        failed: list[BaseException] = []

        def called() -> None:
            try:
                work()
            except BaseException as error:  # an exception cannot pass through C; it is raised below
                failed.append(error)

        door(calls_back(called))
        if failed:
            raise failed[0]

    return within_bracket


def between_marks(work: Work) -> None:
    """Do the work between two system calls that a plugin of qemu recognises."""
    mark = ctypes.CDLL(None).getpriority
    mark(MARK, 0)
    work()
    mark(MARK, 1)


def _plainly(work: Work) -> None:
    work()


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
    except DeploykitError as error:
        sys.exit(str(error))
