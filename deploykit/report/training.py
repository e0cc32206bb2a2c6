"""What a training came to: its curves, how good it is on each class, and which classes it takes for which."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.artifact import Artifact
from deploykit.errors import printable
from deploykit.finetune import EXAMPLES, HISTORY
from deploykit.finetune.state import Epoch
from deploykit.report import decisions, network, units
from deploykit.report.html import page
from deploykit.report.markup import Child, element
from deploykit.report.parts import Column, Result, facts, figure, table

_MOST_CLASSES = 40  # a wider table of confusions is read by nobody; the worst pairs are listed in any case
_WORST = 10


def told(made: Artifact, out: str, report: str) -> dict[str, Any]:
    """The result of `deploykit finetune` as plain JSON values."""
    history = json.loads((made.folder / HISTORY).read_text())
    best = max((Epoch(**epoch) for epoch in history), key=lambda one: one.rank)
    keys = ("model", "weights", "notes", "train_images", "val_images", "device", "processes", "augmentation", "confusion")
    return {
        "kind": "finetune",
        **{key: made.facts[key] for key in (*keys, "sheets")},
        "notes": [*made.facts["notes"], *_chosen(history)],  # type: ignore[misc]
        "classes": list(made.classes),
        "best_epoch": best.epoch,
        "best_val_accuracy": best.val_accuracy,
        "best_val_loss": best.val_loss,
        "history": history,
        "settings": dict(made.settings),
        "checkpoint": printable(made.path),
        "out": out,
        "report": report,
        "exit_code": 0,
    }


def _chosen(history: Sequence[object]) -> list[str]:
    if len(history) < 2:
        return []
    return [
        f"the best of {len(history)} epochs was chosen by these held-out images, so expect a little less of new ones; "
        "data.validate names images for deploykit run that had no part in it"
    ]


def as_text(found: Result) -> str:
    """For the terminal."""
    right = units.percent(found["best_val_accuracy"])
    lines = [
        f"{found['model']}: {right} of {found['val_images']:,} held-out images right in epoch {found['best_epoch']} "
        f"of {len(found['history'])} (loss {found['best_val_loss']:.3f}); trained on {found['train_images']:,} images",
        *(f"note: {note}" for note in found["notes"]),
        f"checkpoint: {found['checkpoint']}",
        f"report: {found['report']}",
    ]
    return "\n".join(lines) + "\n"


def render(found: Result, made: Artifact) -> str:
    """The page; its pictures are in the folder of `made`. The same result gives the same page."""
    top = element(
        "header",
        element("p", "deploykit training", class_="kicker"),
        element("h1", found["model"]),
        element("p", f"{units.percent(found['best_val_accuracy'])} of the held-out images right", class_="subtitle"),
    )
    parts = [
        ("learning", "Learning curve", network.learning({"finetune": found})),
        ("classes", "Each class", _classes(found)),
        ("confusions", "Confusions", [_worst(found), _matrix(found)]),
        ("pictures", "Decided wrong and right", _examples(found, made)),
        *([("layers", "What layers see", [_sheet(sheet, made) for sheet in found["sheets"]])] if found["sheets"] else []),
        ("settings", "Settings", facts((key, json.dumps(value)) for key, value in found["settings"].items())),
    ]
    sections = [element("section", element("h2", title), content, id=anchor) for anchor, title, content in parts]
    return page(f"{found['model']} \N{EN DASH} deploykit training", top, *sections)


def _classes(found: Result) -> Child:
    """Recall: of the images of a class, those taken for it. Precision: of those taken for it, those that are."""
    confusion: Sequence[Sequence[int]] = found["confusion"]
    columns = [Column("Class"), *(Column(name, numeric=True) for name in ("Images", "Right", "Recall", "Precision"))]
    rows = []
    for index, row in enumerate(confusion):
        right, images, taken = row[index], sum(row), sum(other[index] for other in confusion)
        shares = [units.percent(right / whole) if whole else "none" for whole in (images, taken)]
        rows.append((_name(found, index), units.count(images), units.count(right), *shares))
    return table("How good the best epoch is on each class", columns, rows)


def _worst(found: Result) -> Child:
    wrong = [
        (count, index, taken)
        for index, row in enumerate(found["confusion"])
        for taken, count in enumerate(row)
        if count and index != taken
    ]
    if not wrong:
        return element("p", "No held-out image was taken for another class.")
    rows = [
        (_name(found, index), _name(found, taken), units.count(count))
        for count, index, taken in sorted(wrong, key=lambda one: (-one[0], one[1:]))[:_WORST]
    ]
    return table("The most frequent confusions", [Column("Class"), Column("Taken for"), Column("Images", numeric=True)], rows)


def _matrix(found: Result) -> Child:
    confusion: Sequence[Sequence[int]] = found["confusion"]
    if len(confusion) > _MOST_CLASSES:
        return None
    columns = [Column("Class"), *(Column(_name(found, index), numeric=True) for index in range(len(confusion)))]
    rows = [(_name(found, index), *(units.count(count) for count in row)) for index, row in enumerate(confusion)]
    return table("Rows are the classes of held-out images, columns what they were taken for", columns, rows)


def _examples(found: Result, made: Artifact) -> Child:
    """The held-out pictures that were decided wrong with the most certainty, and some of the others."""
    content = json.loads((made.folder / EXAMPLES).read_text())
    samples = [
        {
            "png": one["png"],
            "name": one["name"],
            "label": _name(found, one["label"]),
            "reference": _name(found, one["decided"]),
            "confidence": one["probability"],
        }
        for one in content
    ]
    return decisions.samples({"samples": samples, "model": {"input": list(made.preprocess.shape)}})


def _sheet(sheet: Mapping[str, str], made: Artifact) -> Child:
    png = base64.b64encode((made.folder / sheet["file"]).read_bytes()).decode()
    what = "maps of the first held-out picture" if sheet["what"] == "activations" else "weights, which read the picture itself"
    image = element("img", src=f"data:image/png;base64,{png}", alt=f"{sheet['what']} of {sheet['layer']}")
    return figure((element("code", sheet["layer"]), f": {what}; each from its least value (black) to its largest (white)"), image)


def _name(found: Mapping[str, Any], index: int) -> str:
    classes: Sequence[str] = found["classes"]
    return classes[index] if index < len(classes) else str(index)
