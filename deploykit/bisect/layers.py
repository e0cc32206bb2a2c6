"""The layers of a graph, each run by itself on the tensors of another graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deploykit.artifact import Tensors
from deploykit.bisect import graph as graphs
from deploykit.bisect.graph import Graph
from deploykit.bisect.opening import Opening, Session
from deploykit.errors import StageError, UsageError


class Layers:
    """All layers of a graph that can run, in one session. `refused` says of the others what the runtime said, by tensor."""

    def __init__(self, graph: Graph, anchors: Sequence[str], ranks: Mapping[str, int], opening: Opening) -> None:
        self.refused: dict[str, str] = {}
        self._graph, self._anchors, self._ranks, self._opening = graph, anchors, ranks, opening
        try:
            self._session, self._given = self._opened(None)
        except (StageError, UsageError):
            self._leave_out(None)

    def run(self, values: Tensors) -> Tensors:
        """What each layer makes of `values`, the anchors by name; nothing where it cannot run."""
        try:
            return self._run(self._session, self._given, values)
        except (StageError, UsageError):
            self._leave_out(values)
            return self._run(self._session, self._given, values)

    def _leave_out(self, values: Tensors | None) -> None:
        """Go on without the layers that a session of their own cannot open, or, given values, run on them."""
        tensors = [name for name in self._anchors if name in self._graph.producers and name not in self.refused]
        for name in tensors:
            try:
                session, given = self._opened([name])
                try:
                    if values is not None:
                        self._run(session, given, values)
                finally:
                    session.close()
            except (StageError, UsageError) as error:
                self.refused[name] = error.why.strip() or error.what
        self._session, self._given = self._opened([name for name in tensors if name not in self.refused])

    def _opened(self, tensors: Sequence[str] | None) -> tuple[Session, Mapping[str, str]]:
        content, given = graphs.alone(self._graph, self._anchors, self._ranks, tensors)
        return self._opening(content), given

    @staticmethod
    def _run(session: Session, given: Mapping[str, str], values: Tensors) -> Tensors:
        session.feed({inner: np.ascontiguousarray(values[name]) for name, inner in given.items()})
        session.execute()
        return session.views()
