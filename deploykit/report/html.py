"""The report of one run: `result.json` in, one HTML page out that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from deploykit.errors import UsageError
from deploykit.report import context, decisions, network, speed
from deploykit.report.markup import Child, Markup, element
from deploykit.report.parts import Result, notice, times
from deploykit.report.units import count, plural

SCHEMA = 1
# What every page of ours starts with, and hardly any other: by it a page is known that may be written anew.
PAGE_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"'


@dataclass(frozen=True)
class Section:
    """A titled part of the page, with the function that makes its content from a result."""

    anchor: str
    title: str
    content: Callable[[Result], Child]


IN_ORDER = (
    Section("gates", "Gates", decisions.gates),
    Section("latency", "Latency and throughput", speed.latency),
    Section("accuracy", "Accuracy", decisions.accuracy),
    Section("flips", "Changed decisions", decisions.flips),
    Section("learning", "Learning curve", network.learning),
    Section("samples", "Sample predictions", decisions.samples),
    Section("layers", "Engines and layers", network.layers),
    Section("export", "Export and calibration", network.export),
    Section("stages", "Stages", context.stages),
    Section("recipe", "Recipe", context.recipe),
    Section("machine", "Machine", context.machine),
    Section("reproduce", "How to reproduce", context.reproduce),
)

# The exit codes of the command line; errors.py is where they are decided.
_EXIT_CODES = {
    0: "done",
    1: "something failed",
    2: "what was asked for is wrong",
    3: "a gate failed",
    4: "this machine lacks what was required",
    5: "a gate could not be decided: too few images or processes, or a disturbed benchmark",
    130: "interrupted",
}
# The exit codes that a verdict explains by itself.
_EXPECTED_EXITS = {"pass": (0,), "fail": (0, 3), "cannot tell": (0, 5)}


def render(result: Mapping[str, Any]) -> str:
    """The page for the content of one `result.json`; the same content gives the same page.

    Values that are null, absent or empty are named as not measured, with the reason where the stages know it.
    Raises UsageError when the result has another schema than SCHEMA.
    """
    if result.get("schema") != SCHEMA:
        raise UsageError(
            f"the result has schema {result.get('schema')!r}; this deploykit reports on schema {SCHEMA}",
            fix="use the deploykit version that wrote it",
        )
    contents = [
        element("section", element("h2", section.title), section.content(result), id=section.anchor) for section in IN_ORDER
    ]
    verdict = result.get("verdict") or "no gate"
    return page(f"{_name(result)}: {verdict} \N{EN DASH} deploykit report", _top(result), *contents)


def page(title: str, *contents: Child) -> str:
    """A page of ours with these contents: style and script are in it, and it loads nothing from anywhere."""
    body = element("body", element("main", *contents), _script())
    return "<!doctype html>\n" + element("html", _head(title), body, lang="en")


def _head(title: str) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", _asset("page.css")),
    )


def _policy() -> str:
    """What the page may do: show its own pictures and styles, and run exactly its own script.

    The strings on the page come from file names, class names and recipes. They are all escaped; should one slip
    through, the browser neither runs nor loads it.
    """
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _script() -> Markup:
    return element("script", _asset("page.js"))


def _asset(name: str) -> Markup:
    return Markup(resources.files("deploykit.report").joinpath(name).read_text(encoding="utf-8"))


def _top(result: Result) -> Markup:
    model = result.get("model") or {}
    return element(
        "header",
        element("p", "deploykit report", class_="kicker"),
        element("h1", _name(result)),
        element("p", _subtitle(model), class_="subtitle"),
        _banner(result),
        _random_weights() if model.get("random") else None,
        [notice("note", (element("strong", "Note. "), note)) for note in model.get("notes") or ()],
        element("nav", [element("a", section.title, href=f"#{section.anchor}") for section in IN_ORDER], aria_label="Sections"),
    )


def _name(result: Result) -> str:
    return str(result.get("name") or "unnamed run")


def _subtitle(model: Mapping[str, Any]) -> str:
    """`lenet5 · weights: fine-tuned · 61,706 parameters · input 1 x 32 x 32 · 10 classes`."""
    if not model:
        return "The model was not loaded."
    weights = "random" if model.get("random") else model.get("weights") or "unknown"
    facts = [str(model.get("name") or "unnamed model"), f"weights: {weights}"]
    if model.get("parameters") is not None:
        facts.append(f"{count(model['parameters'])} parameters")
    if model.get("input"):
        facts.append(f"input {times(model['input'])}")
    classes = model.get("num_classes") or len(model.get("classes") or ())
    if classes:
        facts.append("1 class" if classes == 1 else f"{classes:,} classes")
    return " \N{MIDDLE DOT} ".join(facts)


def _banner(result: Result) -> Markup:
    tone, symbol, word, sentence = _verdict(result)
    headline: Sequence[str] = result.get("headline") or ()
    code = result.get("exit_code")
    return element(
        "section",
        element("span", symbol, class_="symbol", aria_hidden="true"),
        element(
            "div",
            element("p", word, class_="word"),
            element("p", sentence),
            element("ul", [element("li", fact) for fact in headline]) if headline else None,
            element("p", f"Exit code {code}: {_EXIT_CODES.get(code, 'unknown')}.", class_="exit") if code is not None else None,
        ),
        class_=f"verdict {tone}",
        aria_label="Verdict",
    )


def _verdict(result: Result) -> tuple[str, str, str, str]:
    """(tone, symbol, word, sentence); the tone is a class of page.css."""
    verdict, code = result.get("verdict"), result.get("exit_code")
    gates: Sequence[Mapping[str, Any]] = result.get("gates") or ()
    matching = sum(gate.get("verdict") == verdict for gate in gates)
    of_all = f"{matching} of {plural(len(gates), 'gate')}" if matching else "What the run required, though it lists no gate,"
    if verdict in _EXPECTED_EXITS and code not in (None, *_EXPECTED_EXITS[verdict]):
        return "unsure", "!", f"Gates: {verdict}", "The run did not end as it should: see the exit code and the stages."
    if verdict == "pass":
        return "pass", "\N{CHECK MARK}", "Pass", f"{of_all} passed."
    if verdict == "fail":
        return "fail", "\N{MULTIPLICATION X}", "Fail", f"{of_all} failed."
    if verdict == "cannot tell":
        sentence = f"{of_all} cannot be decided; the table below says why, and what would decide."
        return "unsure", "?", "Cannot tell", sentence
    if code not in (None, 0):
        return "fail", "!", "Not finished", "There is no verdict: see the exit code and the stages."
    if (result.get("model") or {}).get("random"):
        return "none", "\N{EN DASH}", "No decision gate possible", "The weights are random, so there are no decisions to judge."
    return "none", "\N{EN DASH}", "No gate", "Nothing was required of this engine, so nothing is promised about it."


def _random_weights() -> Markup:
    return notice(
        "random",
        (
            element("strong", "Random weights. "),
            "This network has learned nothing: no decision gate is possible, and its accuracy, agreement and predictions "
            "mean nothing. Latency, size and the precision of each layer are real.",
        ),
    )
