"""The HTML report: complete in itself, honest about what was not measured, safe with any name, readable on a phone."""

from __future__ import annotations

import base64
import copy
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from math import inf, nan, sin
from pathlib import Path
from typing import Any

import pytest

from deploykit import gate
from deploykit.errors import UsageError
from deploykit.report import charts, decisions, text, units
from deploykit.report.html import IN_ORDER, render
from deploykit.report.markup import element, escape

VOID = {"img", "meta"}
HOSTILE = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """A parsed page: its elements, the text a reader sees, and whatever was not closed properly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        self.unbalanced += self.open
        self.cells = [re.sub(r"\s+", " ", cell).strip() for cell in self.cells]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th", "dd", "dt", "li"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            if any(tag in ("td", "th", "dd", "dt", "li") for tag in self.open):
                self.cells[-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def full_result() -> dict[str, Any]:
    """What a whole run of a small digit classifier leaves: realistic numbers, made up by a formula."""
    classes = [str(digit) for digit in range(10)]
    return {
        "schema": 1,
        "name": "lenet_digits",
        "exit_code": 0,
        "verdict": "pass",
        "headline": ["int8 5/5 layers", "2 of 540 images decided otherwise", "1.42x faster than FP32"],
        "model": {
            "name": "lenet5",
            "weights": "fine-tuned",
            "random": False,
            "parameters": 61706,
            "input": [1, 32, 32],
            "classes": classes,
            "num_classes": 10,
            "notes": ["the checkpoint's names had the prefix 'module.', which was removed"],
        },
        "stages": [
            _stage("finetune", 7.31, "15 epochs, validation accuracy 98.4 %"),
            _stage("export", 4.1, "onnx opset 19, max|d|/max|y| 3.1e-07"),
            _stage("quantize", 1.92, "256 images, minmax, 5 of 5 layers"),
            _stage("build", 0.21, "onnxruntime fp32, onnxruntime int8"),
            {"name": "build-tensorrt-int8", "status": "not built", "seconds": 0.0, "path": "", "summary": "no NVIDIA GPU here"},
            _stage("parity", 2.4, "2 of 540 images decided otherwise"),
            _stage("benchmark", 131.0, "1.42x faster than FP32"),
        ],
        "finetune": {
            "history": [_epoch(number) for number in range(1, 16)],
            "train_images": 1000,
            "val_images": 257,
        },
        "exports": [
            {"format": "onnx", "path": "export/model.onnx", "bytes": 250_112, "relative_error": 3.1e-07, "opset": 19},
            {"format": "torchscript", "path": "export/model.pt", "bytes": 262_004, "relative_error": 0.0, "opset": None},
        ],
        "calibration": {
            "images": 256,
            "from": "the digits' calibration part",
            "method": "minmax",
            "skipped": ["holiday/broken.jpg: truncated", "holiday/notes.txt: not an image"],
            "seconds": 1.0,
            "warnings": ["class '7' has no calibration image"],
        },
        "engines": [
            _engine("onnxruntime fp32", "fp32", 250_112, {"float": {"Conv": 2, "Gemm": 3, "MaxPool": 2}}, "FusedConv", 0),
            _engine("onnxruntime int8", "int8", 70_020, {"int8": {"QLinearConv": 2, "QGemm": 3}, "float": {}}, "QLinearConv", 4),
            {
                "label": "tensorrt int8",
                "runtime": "tensorrt",
                "precision": "int8",
                "built": False,
                "why": "this machine has no NVIDIA GPU, and TensorRT engines are built where they run",
                "path": None,
                "bytes": None,
                "realised": None,
                "search": {"wanted_db": 25.0, "before_db": 31.2, "after_db": 31.2, "kept": [], "spared": [], "errors": None},
            },
        ],
        "parity": [
            {
                "label": "onnxruntime int8",
                "images": 540,
                "conversion": _error(1.2e-6, 1e-6, 120.4, images=16) | {"rule": "max|d| / max|y| <= 0.01", "verdict": "pass"},
                "quantization": _error(0.412, 0.031, 34.1, images=540),
                "agreement": 538 / 540,
                "disagreement_count": 2,
                "disagreements": [_flip("test/17", "3", "3", "8"), _flip("test/201", "9", "4", "9")],
                "accuracy": {
                    "reference": 532 / 540,
                    "engine": 531 / 540,
                    "drop_points": 100 / 540,
                    "interval_points": [-0.45, 0.93],
                    "images": 540,
                },
            }
        ],
        "gates": [
            _gate("onnxruntime int8: disagreements <= 2", "pass", 2, None, "2 of 540 images"),
            _gate(
                "onnxruntime int8: drop <= 1 points",
                "pass",
                100 / 540,
                [-0.45, 0.93],
                "observed 0.19, 95 % interval -0.45 to 0.93 on 540 images",
            ),
        ],
        "evaluated_on": {"origin": "the digits' test part", "images": 540, "labelled": True},
        "visible_drop_points": 0.71,
        "benchmark": {
            "settings": {
                "processes": 5,
                "queries": 200,
                "warmup": 5,
                "threads": 2,
                "offline_batches": [8, 32],
                "images_per_query": 1,
                "order": ["fp32", "int8", "int8", "fp32"],
            },
            "verdict": "valid",
            "warnings": [],
            "baseline": "onnxruntime fp32",
            "noise_floor": 0.004,
            "fixed_work_ns": 1_000_000,
            "engines": [
                _timed("onnxruntime fp32", 93_000, [92_100, 94_300], 10_350, 250_112),
                _timed("onnxruntime int8", 65_500, [64_900, 66_400], 14_900, 70_020),
            ],
            "ratios": [
                {
                    "label": "onnxruntime int8 / onnxruntime fp32",
                    "ratio": 0.704,
                    "interval": [0.691, 0.718],
                    "floor": 0.004,
                    "different": True,
                    "why": [],
                    "smallest_visible": 0.032,
                }
            ],
        },
        "samples": [_sample(number) for number in range(10)]
        + [_sample(17, label="3", reference="3", engine="8"), _sample(23, label="5", reference="6", engine="6")],
        "recipe": 'name = "lenet_digits"\ngate = ["disagreements <= 2", "drop <= 1 points"]\n\n[model]\nname = "lenet5"\n',
        "machine": {
            "arch": "x86_64",
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "features": ["avx2", "fma", "avx512_vnni"],
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "system": "Linux 6.1.0",
            "python": "3.11.9",
            "gpu": None,
            "versions": {"deploykit": "0.1.0", "numpy": "2.3.1", "torch": "2.15.0", "onnxruntime": "1.23.0"},
        },
        "command": "deploykit run recipe.toml",
    }


def deep_result(layers: int = 120) -> dict[str, Any]:
    """A deep network with long layer names, a failed gate and several INT8 engines."""
    result = full_result() | {"name": "efficientnet_v2_s_on_flowers_photographed_outdoors", "verdict": "fail", "exit_code": 3}
    result["gates"][1] |= {"verdict": "fail", "interval": [1.02, 2.41], "observed": 1.7}
    long = "features.5.12.block.3.0/Conv_output_quantized_with_a_very_long_name_that_has_no_place_to_break"
    rows = [_layer(f"{long}.{index}", "Conv", "int8" if index % 9 else "fp32", "QLinearConv") for index in range(layers)]
    rows = [row | {"ns": 1000.0 * index - 500 if index else None} for index, row in enumerate(rows)]
    result["engines"][1]["realised"]["layers"] = rows
    result["engines"][1]["search"] = _search([row["name"] for row in rows])
    result["parity"] = [result["parity"][0] | {"label": f"openvino int8, variant {number}"} for number in range(3)]
    return result


def fp32_only() -> dict[str, Any]:
    result = full_result()
    result["engines"] = result["engines"][:1]
    result["benchmark"] |= {"engines": result["benchmark"]["engines"][:1], "ratios": []}
    nothing: dict[str, Any] = {"calibration": None, "gates": [], "verdict": None, "parity": [], "finetune": None}
    return result | nothing | {"samples": [], "visible_drop_points": None, "headline": []}


def nothing_built() -> dict[str, Any]:
    result = full_result()
    result["engines"] = result["engines"][2:]
    result["stages"][-1] |= {"status": "skipped", "seconds": None, "path": None, "summary": "no engine was built"}
    result["stages"][-2] |= {"status": "skipped", "seconds": None, "path": None, "summary": "no engine was built"}
    nothing: dict[str, Any] = {
        "benchmark": None,
        "parity": [],
        "gates": [],
        "verdict": None,
        "visible_drop_points": None,
        "exit_code": 4,
    }
    return result | nothing | {"samples": []}


def without_labels() -> dict[str, Any]:
    result = full_result()
    result["parity"][0] |= {"accuracy": None}
    for picture in (*result["samples"], *result["parity"][0]["disagreements"]):
        picture["label"] = None
    result["gates"] = result["gates"][:1]
    return result


def random_weights() -> dict[str, Any]:
    result = full_result() | {"gates": [], "verdict": None, "finetune": None}
    result["model"] |= {"random": True, "weights": "none"}
    return result


def almost_nothing() -> dict[str, Any]:
    """A run that died before its first stage finished: every other value is null."""
    return dict.fromkeys(full_result()) | {"schema": 1, "name": "died early", "exit_code": 1}


def bare() -> dict[str, Any]:
    return {"schema": 1}


KINDS = [full_result, deep_result, fp32_only, nothing_built, without_labels, random_weights, almost_nothing, bare]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    made: dict[str, Any] = request.param()
    return made


class TestEveryPage:
    def test_closes_every_element(self, result: dict[str, Any]) -> None:
        page = Page(render(result))

        assert page.unbalanced == []

    def test_loads_nothing_from_anywhere(self, result: dict[str, Any]) -> None:
        text = render(result)
        page = Page(text)

        addresses = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
        assert all(address is not None and address.startswith(("#", "data:image/png;base64,")) for address in addresses)
        assert not re.search(r"https?://|url\(|@import", text)
        assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}

    def test_never_shows_none_nan_or_an_empty_cell(self, result: dict[str, Any]) -> None:
        page = Page(render(result))

        assert not re.search(r"\b(None|nan|NaN|inf|null|undefined)\b", page.text)
        assert "" not in page.cells

    def test_has_one_title_and_all_sections_in_order(self, result: dict[str, Any]) -> None:
        page = Page(render(result))

        assert len(page.tags("h1")) == 1
        assert [section["id"] for section in page.tags("section") if "id" in section] == [part.anchor for part in IN_ORDER]

    def test_describes_every_chart_and_captions_every_table(self, result: dict[str, Any]) -> None:
        page = Page(render(result))

        pictures = [svg for svg in page.tags("svg") if svg.get("role") == "img"]
        assert len(page.tags("title")) == 1 + len(pictures)  # the page's own, and one for each chart
        assert len(page.tags("caption")) == len(page.tags("table"))
        assert all(image["alt"] for image in page.tags("img"))

    def test_is_the_same_for_the_same_result_and_leaves_it_unchanged(self, result: dict[str, Any]) -> None:
        before = copy.deepcopy(result)

        assert render(result) == render(result)
        assert result == before


def test_the_verdict_comes_first_in_words() -> None:
    page = Page(render(full_result()))

    words = page.text
    assert words.index("Pass") < words.index("2 of 2 gates passed") < words.index("int8 5/5 layers") < words.index("Reason")


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        ("pass", 0, "Pass"),
        ("fail", 3, "Fail"),
        ("cannot tell", 5, "Cannot tell"),
        (None, 0, "No gate"),
        (None, 4, "Not finished"),
        ("pass", 4, "Gates: pass"),
    ],
)
def test_each_verdict_is_named(verdict: str | None, code: int, words: str) -> None:
    text = render(full_result() | {"verdict": verdict, "exit_code": code})

    assert f'<p class="word">{words}</p>' in text


@pytest.mark.parametrize(
    ("rule", "observed", "interval", "cells"),
    [
        ("disagreements <= 2", 2, None, ["2", "exact"]),
        ("agreement >= 99 %", 99.63, [98.66, 99.9], ["99.63 %", "98.66 to 99.90 %"]),
        ("drop <= 1 points", -0.185, [-1.04, 0.61], ["\N{MINUS SIGN}0.18 points", "\N{MINUS SIGN}1.04 to 0.61 points"]),
        ("latency <= 0.2 ms", 0.113, [0.11, 0.12], ["0.113 ms", "0.110 to 0.120 ms"]),
        ("slowdown <= 5 %", 3.2, [-0.4, 6.1], ["3.20 %", "\N{MINUS SIGN}0.40 to 6.10 %"]),
    ],
)
def test_a_gate_of_each_metric_is_told_in_the_unit_of_its_rule(
    rule: str, observed: float, interval: list[float] | None, cells: list[str]
) -> None:
    gate = _gate(f"onnxruntime int8: {rule}", "cannot tell", observed, interval, "why")

    page = Page(render(full_result() | {"gates": [gate]}))

    place = page.cells.index(f"onnxruntime int8: {rule}")
    assert page.cells[place + 2 : place + 4] == cells


def test_every_metric_of_a_gate_has_a_unit() -> None:
    assert decisions._UNITS.keys() == gate._METRICS.keys()


@pytest.mark.parametrize("rule", ["drop <= 1 points", "latency <= 0.2 ms"])
def test_what_cannot_be_told_is_blamed_on_images_by_its_own_reason_alone(rule: str) -> None:
    undecided = _gate(f"onnxruntime int8: {rule}", "cannot tell", 0.1, [0, 1], "the run is invalid: others used its cores")

    page = Page(render(full_result() | {"gates": [undecided], "verdict": "cannot tell", "exit_code": 5}))

    assert "1 of 1 gate cannot be decided; the table below says why, and what would decide." in page.text
    assert "few images;" not in page.text


def test_a_run_that_failed_after_its_gates_does_not_look_green() -> None:
    text = render(full_result() | {"exit_code": 4})

    assert 'class="verdict unsure"' in text
    assert "Exit code 4: this machine lacks what was required." in text


def test_random_weights_are_marked_and_no_gate_is_promised() -> None:
    page = Page(render(random_weights()))

    assert "No decision gate possible" in page.text
    assert "Random weights." in page.text
    assert "weights: random" in page.text


def test_the_smallest_visible_drop_is_said_in_words() -> None:
    page = Page(render(full_result()))

    assert "smallest accuracy drop that 540 images can show is 0.71 points" in page.text


def test_an_engine_that_was_not_built_is_listed_with_its_reason() -> None:
    page = Page(render(nothing_built()))

    assert page.text.count("this machine has no NVIDIA GPU") == 2  # where its latency would be, and among the engines
    assert "No engine was timed: build-tensorrt-int8 not built, no NVIDIA GPU here" not in page.text
    assert "No engine was timed: benchmark skipped, no engine was built." in page.text


def test_an_interval_around_one_is_no_difference() -> None:
    result = full_result()
    result["benchmark"]["ratios"][0] |= {"ratio": 0.98, "interval": [0.95, 1.02], "different": False}

    page = Page(render(result))

    assert "no difference can be told" in page.text
    assert "faster, ratio" not in page.text


def test_a_ratio_has_its_noise_floor_beside_it() -> None:
    assert "faster , ratio 0.704 (95 %: 0.691 to 0.718); noise floor 0.40 %" in Page(render(full_result())).text


@pytest.mark.parametrize(
    ("pooled", "told"),
    [
        ([], "its percentiles as upper bounds (99 %) of the slowest process; latency"),
        (
            ["p90", "p99"],
            "its percentiles as upper bounds (99 %): p90 and p99 of the queries measured, as one process has too few",
        ),
    ],
)
def test_percentiles_say_what_they_are_of(pooled: list[str], told: str) -> None:
    result = full_result()
    for engine in result["benchmark"]["engines"]:
        engine["percentiles_pooled"] = pooled

    assert told in Page(render(result)).text


def test_a_layer_has_its_time_and_the_error_of_its_weights_alone_where_they_were_measured() -> None:
    result = full_result()
    result["engines"][1]["realised"]["layers"][2]["ns"] = None
    result["engines"][1]["search"]["errors"]["weights"].pop("fc2")

    cells = Page(render(result)).cells
    rows = [cells[place : place + 6] for place, cell in enumerate(cells) if cell in ("conv1", "fc1", "fc2")]

    assert ["Layer", "Operator", "Precision", "Kernel", "Time", "SQNR of its weights alone"] in [
        cells[place : place + 6] for place, cell in enumerate(cells) if cell == "Layer"
    ]
    assert ["conv1", "Conv", "fp32", "QLinearConv", "12.3 µs", "25.4 dB"] in rows
    assert ["fc1", "Gemm", "int8", "QGemm", "not measured", "25.4 dB"] in rows
    assert ["fc2", "Gemm", "int8", "QGemm", "12.3 µs", "not measured"] in rows


def test_samples_beyond_the_axis_are_counted() -> None:
    result = full_result()
    result["benchmark"]["engines"][1]["latency_ns"][2][7] = 9_000_000

    page = Page(render(result))

    assert "1 of 1,000 beyond the axis, slowest 9.00 ms" in page.text


def test_ten_thousand_queries_are_thinned_and_the_page_says_so() -> None:
    result = full_result()
    for engine in result["benchmark"]["engines"]:
        engine["latency_ns"] = [[50_000 + index % 977 for index in range(10_000)] for _ in range(60)]

    text = render(result)

    assert len(text) < 2_000_000
    assert text.count('class="process"') == 2 * charts.ROWS_DRAWN
    assert f"At most {charts.ROWS_DRAWN} processes and {charts.DOTS_DRAWN} dots of each are drawn." in Page(text).text


def test_too_few_queries_for_a_percentile_are_said() -> None:
    result = full_result()
    result["benchmark"]["engines"][0]["percentiles_ns"] |= {"p90": None, "p99": None}

    assert Page(render(result)).cells.count("too few queries") == 2


def test_a_quiet_run_says_how_far_the_baseline_is_from_itself() -> None:
    text = Page(render(full_result())).text

    assert "onnxruntime fp32, measured twice, differs from itself by up to 0.4 % (95 %); less than that is no difference." in text


@pytest.mark.parametrize("floor", [None, inf])
def test_a_noise_floor_that_is_not_known_is_not_shown(floor: float | None) -> None:
    result = full_result()
    result["benchmark"]["noise_floor"] = floor

    text = Page(render(result)).text

    assert "Nothing disturbed this run." in text
    assert "differs from itself" not in text


def test_an_invalid_run_is_called_so_with_every_reason() -> None:
    result = full_result()
    result["benchmark"] |= {"warnings": ["others ran", "the clock changed"], "verdict": "invalid: others ran; the clock changed"}
    result["benchmark"]["ratios"][0] |= {"different": False, "why": ["others ran", "the clock changed"]}

    page = Page(render(result))

    assert "This run is invalid: measure again on a quiet machine." in page.text
    assert {"others ran", "the clock changed"} <= set(page.cells)
    assert "faster, ratio" not in page.text
    assert "Nothing disturbed" not in page.text


def test_a_sweep_of_batches_has_a_bar_for_each_and_the_table_its_best() -> None:
    page = Page(render(full_result()))

    assert page.text.count("images/s in batches of 8") == 4  # a bar and its title, for two engines
    assert page.text.count("images/s in batches of 32") == 4
    assert "14,900/s" in {cell.replace("\N{NO-BREAK SPACE}", " ") for cell in page.cells}


def test_a_changed_decision_shows_its_picture_and_who_is_right() -> None:
    result = full_result()

    page = Page(render(result))

    assert "FP32 3 → engine 8" in page.text
    assert "engine wrong" in page.text
    assert "FP32 wrong" in page.text
    assert [image["alt"] for image in page.tags("img")].count("test/17") == 2  # among the flips and among the samples


def test_a_thousand_changed_decisions_do_not_flood_the_page() -> None:
    result = full_result()
    result["parity"][0] |= {
        "agreement": 0.5,
        "images": 2000,
        "disagreement_count": 1000,
        "disagreements": [_flip(f"t/{i}", "1", "1", "2") for i in range(1000)],
    }

    page = Page(render(result))

    assert "1,000 of 2,000 images are decided otherwise" in page.text
    assert "These are the first 48." in page.text
    assert sum("engine wrong" in cell for cell in page.cells) == 48


def test_a_layer_in_float_shows_its_reason() -> None:
    page = Page(render(full_result()))

    assert "its input is the network's input, which stays in float" in page.cells


def test_what_was_weighed_before_an_int8_graph_was_chosen_stands_in_a_table() -> None:
    page = Page(render(full_result()))

    cells = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in page.cells]
    first = cells.index("Way to quantize")
    assert cells[first : first + 6] == ["Way to quantize", "Layers in INT8", "Size", "Latency", "SQNR", "Decision"]
    rows = [cells[first + 6 + 6 * row : first + 12 + 6 * row] for row in range(3)]
    assert [(row[0], row[1], *row[3:]) for row in rows] == [
        ("int8", "5", "41.0 µs", "22.2 dB", "not chosen"),
        ("int8 where it is faster", "3", "32.0 µs", "26.5 dB", "chosen"),
        ("float", "0", "not raced: no doubt", "200.0 dB", "not chosen"),
    ]


def test_where_there_was_one_way_nothing_was_weighed() -> None:
    result = full_result()
    for engine in result["engines"]:
        engine["candidates"] = engine.get("candidates", [])[:1]

    assert "What was weighed" not in Page(render(result)).text


def test_every_int8_engine_says_the_noise_that_was_asked_for_that_of_int8_and_that_of_what_is_shipped() -> None:
    page = Page(render(full_result()))

    cells = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in page.cells]
    asked = cells.index("Asked for")
    assert cells[asked + 4 : asked + 14] == [
        *("onnxruntime int8", "25.0 dB", "15.1 dB", "26.3 dB", "1"),
        *("tensorrt int8", "25.0 dB", "31.2 dB", "31.2 dB", "0"),
    ]


def test_what_hurts_most_comes_first_and_what_stays_in_float_for_it_is_marked() -> None:
    rows = _noise_rows(render(full_result()))

    assert [row.split(" ")[0] for row in rows[-5:]] == ["conv2", "conv1", "fc1", "fc2", "fc3"]
    assert rows[-5] == "conv2 17.0 dB alone , 63.66 % of the noise; stays in float"
    assert [row for row in rows if "stays in float" in row] == [rows[0], rows[-5]]
    assert rows[0].startswith("conv2/input")
    assert not any(row.startswith("zeros") for row in rows)


def test_bars_of_activations_and_of_weights_have_one_axis() -> None:
    figures = [part for part in render(full_result()).split("<figure>") if "causes alone" in part]

    longest = [max(map(float, re.findall(r'width="([\d.]+)%"[^>]*class="bar"', part.split("</figure>")[0]))) for part in figures]
    assert longest[0] == pytest.approx(longest[1] / 5, rel=0.01)


def test_of_many_layers_the_ten_worst_are_drawn() -> None:
    text = render(deep_result(40))

    assert len(_noise_rows(text)) == 20
    assert Page(text).text.count("The 10 worst of 40.") == 2
    assert "worst of" not in Page(render(full_result())).text


def test_a_network_that_was_not_swept_has_ratios_and_no_bars() -> None:
    result = full_result()
    result["engines"][1]["search"]["errors"] = None

    assert "Where it hurts" in Page(render(result)).text
    assert _noise_rows(render(result)) == []


@pytest.mark.parametrize("nothing", [0.0, nan])
def test_a_network_without_any_noise_has_no_bars(nothing: float) -> None:
    result = full_result()
    result["engines"][1]["search"]["errors"] = {"activations": {"image": nothing}, "weights": {}}

    assert _noise_rows(render(result)) == []


def test_random_weights_hurt_nowhere() -> None:
    result = random_weights()
    for engine in result["engines"]:
        engine["search"] = {"wanted_db": None, "before_db": None, "after_db": None, "kept": [], "spared": [], "errors": None}

    assert "Where it hurts" not in Page(render(result)).text


def _noise_rows(text: str) -> list[str]:
    """What a reader sees above each bar of noise."""
    rows = re.findall(r'<div class="above">(.*?)</div>', text)
    plain = [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip() for row in rows]
    return [row for row in plain if "of the noise" in row]


def test_hostile_names_stay_text() -> None:
    result = _replace_strings(full_result())

    page = Page(render(result))

    assert page.unbalanced == []
    assert len(page.tags("script")) == 1  # the page's own
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert HOSTILE in page.text


def test_a_picture_that_is_not_base64_is_not_put_into_an_address() -> None:
    result = full_result()
    result["samples"] = [result["samples"][0] | {"png": 'x" onerror="alert(1)'}]

    page = Page(render(result))

    assert page.tags("img") == []
    assert "picture not kept" in page.text


def test_an_engine_has_one_colour_in_every_chart() -> None:
    titles = re.findall(r'<svg class="chart (series-\d)"[^>]*><title>([^<]*)</title>', render(full_result()))
    of_int8 = {colour for colour, title in titles if title.startswith("onnxruntime int8")}
    assert len(of_int8) == 1
    assert of_int8 != {colour for colour, title in titles if title.startswith("onnxruntime fp32")}


def test_a_stage_that_was_finished_before_is_no_reason_for_an_absence() -> None:
    result = nothing_built()
    result["stages"] = [_stage("benchmark", 0.0, "timed before") | {"status": "skipped"}]

    assert "No engine was timed: not measured." in Page(render(result)).text


def test_tensors_that_are_equal_have_no_finite_noise_ratio() -> None:
    result = full_result()
    result["parity"][0]["conversion"] |= {"max_abs": 0.0, "sqnr_db": None}

    assert "∞ (identical)" in Page(render(result)).cells


def test_the_page_may_run_only_its_own_script() -> None:
    policy = Page(render(full_result())).tags("meta")[1]

    assert policy["http-equiv"] == "Content-Security-Policy"
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[\w+/]{43}='", policy["content"] or ""
    )


def test_any_text_can_be_written_as_utf8() -> None:
    text = render(full_result() | {"name": "bell\x07 half \ud800 pair"})

    assert b"bell\xef\xbf\xbd half \\ud800 pair" in text.encode()


def test_numbers_that_are_not_finite_are_not_measured() -> None:
    result = full_result()
    result["parity"][0]["quantization"] |= {"cosine": nan, "sqnr_db": inf, "max_abs": nan}
    result["finetune"]["history"][3] |= {"train_loss": nan, "val_accuracy": None}
    result["parity"][0]["accuracy"] |= {"interval_points": [nan, nan]}

    page = Page(render(result))

    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert "∞ (identical)" in page.cells
    assert units.NOT_MEASURED in page.cells


def test_another_schema_is_refused() -> None:
    with pytest.raises(UsageError, match="schema 2; this deploykit reports on schema 1"):
        render(full_result() | {"schema": 2})


def test_a_single_epoch_with_one_value_still_makes_a_curve() -> None:
    result = full_result()
    result["finetune"]["history"] = [_epoch(1)]

    assert Page(render(result)).unbalanced == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.number(0.09996), "0.100"),
        (units.number(9.996), "10.0"),
        (units.number(12_345), "12,300"),
        (units.number(3.1e-7), "3.10e\N{MINUS SIGN}7"),
        (units.number(-0.5), "\N{MINUS SIGN}0.500"),
        (units.number(0), "0"),
        (units.number(None), "not measured"),
        (units.duration(93_000), "93.0 µs"),
        (units.duration(999_900), "1.00 ms"),
        (units.duration(1_234_567), "1.23 ms"),
        (units.seconds(131.0), "2 min 11 s"),
        (units.seconds(7300), "2 h 1 min"),
        (units.size(70_020), "70.0 kB"),
        (units.size(12), "12.0 B"),
        (units.memory(8 * 2**30), "8.00 GiB"),
        (units.percent(539 / 540), "99.81 %"),
        (units.percent(0.99999), "> 99.99 %"),
        (units.percent(1.0), "100 %"),
        (units.percent(1e-6), "< 0.01 %"),
        (units.points(-0.001), "0.00 points"),
        (units.interval([92_000, 94_000], units.duration), "92.0 to 94.0 µs"),
        (units.interval([920_000, 1_400_000], units.duration), "920 µs to 1.40 ms"),
        (units.interval([-0.4, 0.8], units.points), "\N{MINUS SIGN}0.40 to 0.80 points"),
    ],
)
def test_numbers_have_a_sensible_unit_and_three_digits(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (63.2, 97.1), (-0.45, 0.93), (1e-9, 3e-9), (5.0, 1e6)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = charts.Scale(low, high).ticks()

    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert all(len(f"{tick:.6e}".rstrip("0").split("e")[0].rstrip("0")) <= 5 for tick in ticks)


def test_what_lies_outside_an_axis_lies_on_its_end() -> None:
    scale = charts.Scale(10.0, 20.0)

    assert (scale.at(5), scale.at(10), scale.at(15), scale.at(99)) == (0, 0, 50, 100)


def test_an_element_escapes_what_it_is_given() -> None:
    assert element("p", "a < b & c", class_='x" y', hidden=True, title=None) == '<p class="x&quot; y" hidden>a &lt; b &amp; c</p>'
    assert element("p", element("b", "x"), ["y", None]) == "<p><b>x</b>y</p>"
    assert escape("'") == "&#x27;"


class TestOnATerminal:
    def without_engines(self) -> dict[str, Any]:
        """Two engines of TensorRT that are not there for one reason, and their stages."""
        result = full_result()
        missing = [result["engines"][2] | {"label": f"tensorrt {kind}", "next": f"trtexec {kind}"} for kind in ("fp32", "int8")]
        why = missing[0]["why"]
        result["engines"] = [*result["engines"][:2], *missing]
        stages = [
            {"name": f"build-tensorrt-{kind}", "status": "not built", "seconds": 0.0, "summary": why} for kind in ("fp32", "int8")
        ]
        return result | {"stages": stages, "out": "runs/x", "report": "runs/x/report.html", "fastest": None, "device": None}

    def test_the_reason_for_several_missing_engines_is_told_once_with_what_builds_each(self) -> None:
        result = self.without_engines()

        told = " ".join(text.run(result).split())

        assert told.count(result["engines"][2]["why"]) == 1
        assert "no engine was built for tensorrt fp32, tensorrt int8: " in told
        assert "tensorrt fp32 by TensorRT's own tool, in runs/x: trtexec fp32" in told

    def test_an_invalid_benchmark_says_how_to_measure_again(self) -> None:
        result = self.without_engines()
        result["benchmark"]["warnings"] = ["another program took 30 % of the cores"]

        assert "try: mend that, and measure again by deploykit benchmark runs/x" in text.run(result)


class TestInABrowser:
    """The page is opened in an iframe as wide as a phone: a browser's own window cannot be that narrow."""

    @pytest.fixture
    def chromium(self) -> str:
        found = shutil.which("chromium") or shutil.which("chromium-browser")
        if found is None:
            pytest.skip("needs a browser: the Debian package chromium")
        return found

    @pytest.mark.parametrize("make", [full_result, deep_result, almost_nothing], ids=lambda make: make.__name__)
    def test_fits_a_phone_and_a_tablet_and_logs_no_error(self, chromium: str, tmp_path: Path, make: Any) -> None:
        (tmp_path / "report.html").write_text(render(make()), encoding="utf-8")

        dom, log = _open_in_frame(chromium, tmp_path, widths=(380, 700, 1280))

        for width in (380, 700, 1280):
            assert f"width {width} of {width}" in dom
        assert "CONSOLE" not in log

    def test_sorts_and_filters_layers(self, chromium: str, tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text(render(deep_result(30)), encoding="utf-8")
        act = """
            const tables = inside.querySelectorAll("table.explore"), table = tables[tables.length - 1];
            table.querySelectorAll("th button")[0].click(); table.querySelectorAll("th button")[0].click();
            const times = () => [...table.tBodies[0].rows].map((row) => row.cells[4].textContent.replace("\u00a0", " "));
            table.querySelectorAll("th button")[4].click();
            say("fastest " + times().slice(0, 3).join(", ") + "; slowest " + times().at(-1));
            table.querySelectorAll("th button")[0].click(); table.querySelectorAll("th button")[0].click();
            const input = table.parentElement.previousElementSibling.querySelector("input");
            input.value = "CONV fp32"; input.dispatchEvent(new Event("input"));
            say("first " + table.tBodies[0].rows[0].cells[0].textContent.slice(-4));
            say("shown " + table.parentElement.previousElementSibling.querySelector("output").textContent);
        """

        dom, log = _open_in_frame(chromium, tmp_path, widths=(800,), act=act)

        assert "first k.29" in dom  # numbers in names sort as numbers
        assert "fastest not measured, 500 ns, 1.50 µs; slowest 28.5 µs" in dom  # and what was measured by its size
        assert "shown 4 of 30" in dom
        assert "CONSOLE" not in log


def _open_in_frame(chromium: str, folder: Path, *, widths: Sequence[int], act: str = "") -> tuple[str, str]:
    """(the outer page after `act`, the browser's log) of report.html in a frame of each width in turn."""
    outer = folder / "outer.html"
    outer.write_text(
        f"""<!doctype html><meta charset=utf-8><iframe src=report.html></iframe><div id=said></div><script>
        const say = (text) => document.getElementById("said").append(text + "\\n");
        const frame = document.querySelector("iframe");
        frame.addEventListener("load", () => {{
            const inside = frame.contentDocument, page = inside.documentElement;
            for (const width of {list(widths)}) {{
                frame.style = `width: ${{width}}px; height: 900px; border: 0`;
                say(`width ${{page.scrollWidth}} of ${{page.clientWidth}}`);
            }}
            {act}
        }});</script>"""
    )
    switches = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync", "hide-scrollbars", "allow-file-access-from-files"]
    switches += ["enable-logging=stderr", f"user-data-dir={folder / 'profile'}", "virtual-time-budget=2000", "dump-dom"]
    done = subprocess.run(
        [chromium, "--headless", *(f"--{switch}" for switch in switches), outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(folder)},
    )
    return done.stdout, done.stderr


def _replace_strings(value: Any, key: str = "") -> Any:
    """Every text that comes from outside becomes hostile; the words that the schema itself defines stay."""
    if isinstance(value, dict):
        named = {"versions": {HOSTILE: HOSTILE}, "activations": {HOSTILE: 0.1}, "weights": {HOSTILE: 0.1}}
        return {name: _replace_strings(item, name) for name, item in value.items()} | named.get(key, {})
    if isinstance(value, list):
        return [_replace_strings(item, key) for item in value]
    return f"{HOSTILE}{value}" if isinstance(value, str) else value


def _stage(name: str, seconds: float, summary: str) -> dict[str, Any]:
    return {"name": name, "status": "done", "seconds": seconds, "path": name, "summary": summary}


def _epoch(number: int) -> dict[str, Any]:
    return {
        "epoch": number,
        "learning_rate": 0.001 / number,
        "train_loss": 1.9 / number**1.2 + 0.02,
        "val_loss": 1.7 / number + 0.09 + 0.02 * sin(number),
        "val_accuracy": 0.985 - 0.3 / number**1.3,
        "seconds": 0.49,
    }


def _engine(label: str, precision: str, size: int, counts: Any, kernel: str, int8: int) -> dict[str, Any]:
    names = [("conv1", "Conv"), ("conv2", "Conv"), ("fc1", "Gemm"), ("fc2", "Gemm"), ("fc3", "Gemm")]
    layers = [
        _layer(name, op, "int8" if len(names) - index <= int8 else "fp32", kernel if op == "Conv" else "QGemm")
        for index, (name, op) in enumerate(names)
    ]
    if int8:
        layers[0]["why"] = "its input is the network's input, which stays in float"
    return {
        "label": label,
        "runtime": "onnxruntime",
        "precision": precision,
        "built": True,
        "why": "",
        "path": f"build/{precision}/model.onnx",
        "bytes": size,
        "realised": {"int8": int8, "total": 5, "kernels": counts, "layers": layers},
        "search": _search([name for name, _ in names]) if int8 else None,
        "candidates": _candidates(size) if int8 else [],
    }


def _candidates(size: int) -> list[dict[str, Any]]:
    """Two ways that raced, and one that nobody measured."""
    return [
        {"name": "int8", "int8_layers": 5, "bytes": size, "latency_ns": 41_000.0, "sqnr_db": 22.25, "chosen": False},
        {
            "name": "int8 where it is faster",
            "int8_layers": 3,
            "bytes": 2 * size,
            "latency_ns": 32_000.0,
            "sqnr_db": 26.5,
            "chosen": True,
        },
        {"name": "float", "int8_layers": 0, "bytes": 4 * size, "latency_ns": None, "sqnr_db": 200.0, "chosen": False},
    ]


def _search(names: Sequence[str]) -> dict[str, Any]:
    """The second layer costs most and stays in float, and so does what it reads; a tensor of zeros costs nothing."""
    costs = {name: 0.02 / 7 ** abs(index - 1) for index, name in enumerate(names)}
    return {
        "wanted_db": 25.0,
        "before_db": 15.1,
        "after_db": 26.3,
        "kept": [{"layer": names[1], "before_db": 15.0, "after_db": 26.5}],
        "spared": [f"{names[1]}/input"],
        "errors": {"activations": {f"{name}/input": cost / 5 for name, cost in costs.items()} | {"zeros": 0.0}, "weights": costs},
    }


def _layer(name: str, op: str, precision: str, kernel: str) -> dict[str, Any]:
    return {"name": name, "op": op, "precision": precision, "kernel": kernel, "why": "", "ns": 12_345.0}


def _error(max_abs: float, relative: float, sqnr: float, *, images: int) -> dict[str, Any]:
    mean, cosine = max_abs / 20, 1 - relative**2
    return {"max_abs": max_abs, "mean_abs": mean, "relative": relative, "cosine": cosine, "sqnr_db": sqnr, "images": images}


def _flip(image: str, label: str, reference: str, engine: str) -> dict[str, Any]:
    return {"image": image, "label": label, "reference": reference, "engine": engine, "reference_margin": 0.41}


def _gate(rule: str, verdict: str, observed: float, interval: Any, reason: str) -> dict[str, Any]:
    return {"rule": rule, "verdict": verdict, "observed": observed, "interval": interval, "reason": reason}


def _timed(label: str, typical: int, interval: list[int], throughput: float, size: int) -> dict[str, Any]:
    latencies = [list(_latencies(typical, process)) for process in range(5)]
    return {
        "label": label,
        "latency_ns": latencies,
        "median_ns": typical,
        "interval_ns": interval,
        "end_to_end_ns": 1.1 * typical,
        "percentiles_ns": {"p90": 1.06 * typical, "p95": 1.08 * typical, "p99": 1.2 * typical},
        "offline": [
            {"batch": batch, "per_second": [share * throughput * (1 + 0.01 * sin(3 * process)) for process in range(5)]}
            for batch, share in ((8, 0.7), (32, 1.0))
        ],
        "load_ns": [4.1e6 + 1e5 * process for process in range(5)],
        "first_ns": [9e5 + 1e4 * process for process in range(5)],
        "harness_ns": 60.0,
        "peak_bytes": 61_000_000,
        "idle_bytes": 40_000_000,
        "bytes": size,
    }


def _latencies(typical: int, process: int) -> Iterator[int]:
    """Skewed like real ones: a sharp left edge, a tail to the right, processes a little apart."""
    for query in range(200):
        unit = (query * 0.6180339887 + process * 0.137) % 1
        yield round(typical * (0.985 + 0.006 * sin(5 * process) + 0.02 * unit + 0.16 * unit**9))


def _sample(number: int, *, label: str | None = None, reference: str | None = None, engine: str | None = None) -> dict[str, Any]:
    right = str(number % 10)
    return {
        "png": base64.b64encode(_png(number)).decode(),
        "name": f"test/{number}",
        "label": label or right,
        "reference": reference or right,
        "engine": engine or right,
        "confidence": 0.99 - 0.013 * number,
    }


def _png(number: int) -> bytes:
    """A 32 x 32 greyscale picture of rings."""
    pixels = b"".join(
        bytes([0, *(int(127 + 127 * sin((row - 16) ** 2 / 40 + (column - 16) ** 2 / 40 + number)) for column in range(32))])
        for row in range(32)
    )
    header = struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
