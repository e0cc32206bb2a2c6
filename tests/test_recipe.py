"""What a recipe may say, how it is told what is wrong with it, and that writing one down loses nothing."""

from __future__ import annotations

import json
import math
import os
import runpy
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
import tomllib
from hypothesis import settings
from hypothesis import strategies as st

from deploykit import recipe
from deploykit.errors import RecipeError
from deploykit.recipe import Recipe, declared, dump, load, parse

ROOT = Path(__file__).parents[1]
BASE = Path("/recipes")
LEAST = {"name": "run", "model": {"name": "lenet5"}}


def parsed(content: dict[str, Any] | None = None, **tables: Any) -> Recipe:
    return parse(LEAST | (content or {}) | tables, base=BASE, source="the recipe")


def problems(content: dict[str, Any] | None = None, **tables: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parsed(content, **tables)
    assert caught.value.exit_code == 2
    return caught.value.problems


def file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


LEAST_TOML = 'name = "run"\n[model]\nname = "lenet5"\n'
KEYS = {dotted: (item, hint) for dotted, item, hint in declared()}
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


def values(dotted: str) -> st.SearchStrategy[Any]:
    """Any value that a key allows by its type and range."""
    item, hint = KEYS[dotted]
    return _values(hint, item.metadata, TEXTS.filter(lambda text: not text.startswith("~")))


def _values(hint: Any, metadata: typing.Mapping[str, Any], texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(arguments)
    if typing.get_origin(hint) is tuple:
        return st.lists(_values(arguments[0], metadata, texts), min_size=1, max_size=3, unique=True)
    if typing.get_origin(hint) is Mapping:
        return st.dictionaries(st.from_regex("[a-z_]{1,5}", fullmatch=True), st.integers(-9, 9), max_size=2)
    if arguments:
        return st.one_of(*(_values(option, metadata, texts) for option in arguments if option is not type(None)))
    if hint is str:
        return texts
    if hint is bool:
        return st.booleans()
    low, high = metadata["low"], metadata["high"]
    return st.integers(low, high) if hint is int else st.floats(low, high) | st.integers(math.ceil(low), math.floor(high))


def given(dotted: str, value: Any) -> dict[str, Any]:
    """A recipe with folders of images and that one key."""
    content: dict[str, Any] = {"name": "run", "model": {"name": "lenet5"}, "data": {"train": "train", "calibrate": "calibrate"}}
    table, _, key = dotted.rpartition(".")
    (content.setdefault(table, {}) if table else content)[key] = value
    if dotted == "quantize.percentile":
        content["quantize"]["method"] = "percentile"
    if table == "tensorrt":
        content["build"] = {"runtimes": ["tensorrt"]}
    if dotted == "tensorrt.dla_core":
        content["export"] = {"batch": 1}
    if dotted == "data.root":
        content["data"] = {"name": "mnist", "root": value}
    if dotted == "finetune.views":
        content["finetune"] |= {"mode": "head", "cache_features": True}
    if dotted == "finetune.head_epochs":
        content["finetune"]["epochs"] = 10_000
    return content


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes of every shape, without the combinations that contradict themselves."""
    content: dict[str, Any] = {}
    for dotted in KEYS:
        table, _, key = dotted.rpartition(".")
        if dotted in ("name", "model.name") or draw(st.booleans()):
            (content.setdefault(table, {}) if table else content)[key] = draw(values(dotted))
    content.pop("gate", None)
    for key in ("name", "root"):
        content.get("data", {}).pop(key, None)
    for key in ("float_type", "float32", "jetpack", "keep"):
        content.get("build", {}).pop(key, None)
    runtimes = content.get("build", {}).pop("runtimes", [])
    if known := [name for name in runtimes if not recipe.OFFERS[name].no_int8]:
        content["build"]["runtimes"] = known
    content.get("quantize", {}).pop("cpu", None)
    for key in ("mode", "cache_features", "views"):
        content.get("finetune", {}).pop(key, None)
    for key in ("exporter", "cross_check", "size", "input"):
        content.get("export", {}).pop(key, None)
    content.get("data", {}).pop("held_out", None)
    content.pop("tensorrt", None)
    content["name"] = content["name"].replace("/", "-").replace(".", "-")
    if content.get("quantize", {}).get("percentile") is not None:
        content["quantize"]["method"] = "percentile"
    content.setdefault("export", {})["formats"] = ["onnx"]
    content.setdefault("data", {}).update(train="train", calibrate="calibrate")
    for key in {"mean", "std", "channels"} & set(content.get("preprocess", {})):
        del content["preprocess"][key]
    return content


class TestReading:
    @pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
    def test_every_recipe_that_is_shipped_can_be_read(self, path):
        assert load(path).name == path.stem

    def test_two_keys_are_enough(self, tmp_path):
        least = load(file(tmp_path, LEAST_TOML))

        assert (least.name, least.model.name, least.model.weights) == ("run", "lenet5", "default")
        assert (least.finetune, least.quantize) == (None, None)

    def test_an_empty_table_asks_for_a_stage_with_its_defaults(self, tmp_path):
        asked = load(file(tmp_path, LEAST_TOML + "[finetune]\n[data]\nname = 'digits'\n"))

        assert asked.finetune == recipe.FinetuneTable()

    def test_a_whole_number_will_do_for_a_number(self):
        rate = parsed(data={"name": "digits"}, finetune={"learning_rate": 1}).finetune.learning_rate

        assert (rate, type(rate)) == (1.0, float)

    def test_paths_are_relative_to_the_recipes_own_folder(self, tmp_path, monkeypatch):
        (tmp_path / "sub").mkdir()
        path = file(tmp_path / "sub", f"{LEAST_TOML}weights = 'best.pth'\n[data]\ntrain = '../train'\nvalidate = '/data/val'\n")
        monkeypatch.chdir(tmp_path)

        read = load(Path("sub") / path.name)

        assert read.model.weights == str(tmp_path / "sub" / "best.pth")
        assert (read.data.train, read.data.validate) == (str(tmp_path / "sub" / ".." / "train"), "/data/val")

    def test_a_tilde_is_the_home_directory(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")

        assert parsed(data={"train": "~/train"}).data.train == "/home/me/train"

    def test_the_words_of_weights_are_not_paths(self):
        assert parsed(model={"name": "lenet5", "weights": "none"}).model.weights == "none"

    def test_a_recipe_lives_happily_in_a_folder_whose_name_is_not_utf8(self, tmp_path):
        folder = tmp_path / os.fsdecode(b"caf\xe9")
        folder.mkdir()

        assert load(file(folder, LEAST_TOML)).name == "run"
        with pytest.raises(RecipeError, match=r"caf\\xe9/recipe.toml has 1 problem"):
            load(file(folder, LEAST_TOML + "weight = 1"))


class TestWritingDown:
    @settings(max_examples=60, deadline=None)
    @hypothesis.given(content=contents())
    def test_what_is_dumped_is_parsed_to_the_same_recipe(self, content):
        asked = parsed(content)

        again = parse(tomllib.loads(dump(asked)), base=Path("/elsewhere"), source="the dump")

        assert again == asked
        assert dump(again) == dump(asked)

    def test_a_dump_says_the_defaults_too_so_that_it_can_be_reviewed(self):
        assert "calibration_images = 64" in dump(parsed())


class TestProblems:
    def test_all_problems_are_told_at_once_each_with_its_table_and_key(self, tmp_path):
        path = file(
            tmp_path,
            """
            nam = "run"
            [model]
            name = 5
            wieghts = "best.pth"
            classes = 0
            [finetune]
            epochs = "many"
            learning_rate = nan
            [export]
            formats = ["onnx", "tflite"]
            [quantise]
            """,
        )

        with pytest.raises(RecipeError) as caught:
            load(path)

        assert str(caught.value).startswith(f"{path} has 9 problems\n")
        assert set(caught.value.problems) == {
            "the recipe: unknown key 'nam'; did you mean 'name'?",
            "the recipe: unknown key 'quantise'; did you mean 'quantize'?",
            "the recipe: 'name' is missing (name of the run: its report's title and its default output folder)",
            "[model]: unknown key 'wieghts'; did you mean 'weights'?",
            "model.name: expected text, got 5",
            "model.classes: 0 is not between 1 and 1000000",
            "finetune.epochs: expected a whole number, got 'many'",
            "finetune.learning_rate: nan is not between 1e-08 and 100",
            "export.formats: expected 'onnx' or 'torchscript', got 'tflite'",
        }

    def test_a_key_that_resembles_none_is_answered_with_all_there_are(self):
        assert problems(data={"zzz": 1}) == (
            "[data]: unknown key 'zzz'; known are name, root, download, train, held_out, calibrate, validate, "
            "calibration_images, skip_bad_images, seed",
        )

    def test_a_missing_table_is_asked_for(self):
        with pytest.raises(RecipeError, match=r"the recipe: 'model' is missing \(a table\)"):
            parse({"name": "run"}, base=BASE, source="the recipe")

    @pytest.mark.parametrize("value", [5, "lenet5", [1], None, True])
    def test_what_is_no_table_is_no_table(self, value):
        assert problems(model=value) == (f"model: expected a table, got {value!r}",)

    @pytest.mark.parametrize(
        "dotted", [dotted for dotted, (_, hint) in KEYS.items() if bool not in (hint, *typing.get_args(hint))]
    )
    def test_true_is_not_one(self, dotted):
        (found,) = problems(given(dotted, True))

        assert found.startswith(f"{dotted}: expected ")
        assert found.endswith("got True")

    @pytest.mark.parametrize("value", [0, 1, "true"])
    def test_one_is_not_true(self, value):
        assert problems(benchmark={"enabled": value}) == (f"benchmark.enabled: expected true or false, got {value!r}",)

    def test_a_number_with_a_point_is_not_a_whole_number(self):
        assert problems(export={"opset": 19.0, "samples": 4.0}) == (
            "export.opset: expected 19, got 19.0",
            "export.samples: expected a whole number, got 4.0",
        )

    @pytest.mark.parametrize("dotted", [dotted for dotted, (item, _) in KEYS.items() if item.metadata["low"] is not None])
    def test_every_range_holds_its_ends_and_nothing_beyond(self, dotted):
        item, hint = KEYS[dotted]
        low, high = item.metadata["low"], item.metadata["high"]
        hints = (hint, *typing.get_args(hint))
        is_list = any(typing.get_origin(option) is tuple for option in hints)
        beyond = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan, math.inf, -math.inf]
        if int in hints:
            beyond = [low - 1, high + 1]

        for value in (low, high):
            parsed(given(dotted, [value] if is_list else value))
        for value in beyond:
            found = problems(given(dotted, [value] if is_list else value))
            assert found == (f"{dotted}: {value!r} is not between {low} and {high}",)

    @pytest.mark.parametrize("digits", [400, 5000])
    @pytest.mark.parametrize(("table", "key"), [("finetune", "learning_rate"), ("model", "classes"), ("model", "name")])
    def test_numbers_of_any_length_are_refused_like_others(self, digits, table, key):
        (found,) = problems({table: {**LEAST.get(table, {}), key: 10**digits}})

        assert found.startswith(f"{table}.{key}: ")
        assert len(found) < 130

    @pytest.mark.parametrize("text", ["", "a\0b"])
    @pytest.mark.parametrize(("table", "key"), [("model", "name"), ("model", "weights"), ("data", "calibrate")])
    def test_text_that_names_nothing_is_refused(self, text, table, key):
        # An empty path would be the recipe's own folder: `--calibrate "$DIR"` with a variable that is not set.
        assert problems({table: {**LEAST.get(table, {}), key: text}}) == (
            f"{table}.{key}: {text!r} names nothing; leave the key out, or give it a value",
        )

    def test_a_home_directory_that_is_not_known_is_refused(self):
        (found,) = problems(data={"train": "~nobody-of-that-name/train"})

        assert found.startswith("data.train: '~nobody-of-that-name/train' starts with the home directory of a user")

    def test_a_path_that_is_not_utf8_is_refused_because_it_could_not_be_written_down(self):
        assert problems(data={"train": os.fsdecode(b"caf\xe9")}) == (
            "data.train: caf\\xe9 is not UTF-8, and recipes are; rename it or make a link to it",
        )

    def test_long_values_are_quoted_in_short(self):
        (found,) = problems(model=["x" * 10_000])

        assert len(found) < 100

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"name = ", "at end of document|Invalid value"),
            (b"name = 'a'\nname = 'b'", "Cannot overwrite"),
            (b"name = '\xff'", "can't decode byte 0xff"),
            (b"\x00\x01\x02", "Invalid statement"),
            (b"name = " + b"[" * 100_000, "recursion"),
            (b"name = " + b"9" * 5000, "digits"),
        ],
    )
    def test_what_is_not_toml_is_said_to_be_not_toml(self, tmp_path, content, why):
        with pytest.raises(RecipeError, match=rf"recipe\.toml is not valid TOML\n  why: .*({why})"):
            load(file(tmp_path, content))

    def test_a_number_of_thousands_of_digits_in_another_base_is_refused(self, tmp_path):
        with pytest.raises(RecipeError, match="a number of thousands of digits is not between 1 and 1000000"):
            load(file(tmp_path, LEAST_TOML + "classes = 0x" + "f" * 5000))

    def test_a_huge_file_is_not_read(self, tmp_path):
        path = file(tmp_path, "")
        os.truncate(path, 1 << 40)

        with pytest.raises(RecipeError, match="is not a recipe\n  why: it is larger than 1048576 bytes"):
            load(path)

    @pytest.mark.parametrize(("name", "why"), [("nothing.toml", "no such file or directory"), (".", "is a directory")])
    def test_what_is_no_file_is_named(self, tmp_path, name, why):
        with pytest.raises(RecipeError, match=f"cannot read the recipe {tmp_path / name}\n  why: {why}"):
            load(tmp_path / name)


class TestTheBenchmarkTableAlone:
    def test_is_checked_like_a_whole_recipes(self):
        with pytest.raises(RecipeError) as caught:
            recipe.benchmark_table({"processes": 0, "offline_batches": [8, 0], "speed": 1}, "the command line")

        assert caught.value.what == "the command line has 3 problems"
        assert set(caught.value.problems) >= {
            "benchmark.processes: 0 is not between 1 and 1000",
            "benchmark.offline_batches: 0 is not between 1 and 4096",
        }

    def test_has_the_defaults_of_a_recipe(self):
        assert recipe.benchmark_table({}, "the command line") == parsed().benchmark
        assert recipe.benchmark_table({"offline_batches": [1, 2]}, "the command line").measured()["offline_batches"] == (1, 2)


class TestContradictions:
    def test_a_rule_of_time_needs_a_benchmark_of_an_engine_and_one_to_compare_with(self):
        found = problems(gate=["slowdown <= 5 %", "latency <= 5 ms"], benchmark={"enabled": False}, build={"runtimes": []})

        assert found == (
            "gate 'slowdown <= 5 %' needs a benchmark, and benchmark.enabled is false",
            "gate 'slowdown <= 5 %' needs an engine to measure: set build.runtimes",
            "gate 'slowdown <= 5 %' compares INT8 with FP32, but there is no [quantize] table",
            "gate 'latency <= 5 ms' needs a benchmark, and benchmark.enabled is false",
            "gate 'latency <= 5 ms' needs an engine to measure: set build.runtimes",
        )

    def test_a_rule_of_latency_needs_neither_int8_nor_labels(self):
        assert [str(rule) for rule in parsed(gate=["latency <= 5 ms"]).rules] == ["latency <= 5 ms"]

    def test_all_contradictions_are_told_at_once(self):
        found = problems(
            gate=["drop <= 0.5 points", "drops <= 1"],
            model={"name": "lenet5", "weights": "none"},
            export={"formats": ["torchscript", "torchscript"]},
            preprocess={"channels": "RGB", "mean": [0.5], "std": [1, 1, 1, 1]},
            build={"runtimes": ["tensorrt", "onnxruntime"], "float_type": "fp16"},
        )

        assert [text.partition(":")[0].partition(",")[0] for text in found] == [
            "gate 'drop <= 0.5 points' compares INT8 with FP32",
            "gate 'drop <= 0.5 points' needs labelled images that were not calibrated on",
            "gate 'drop <= 0.5 points' judges decisions",
            "gate",
            "build.runtimes = ['tensorrt'",
            'build.float_type = "fp16" (--fp16) with build.runtimes "onnxruntime"',
            "export.formats = ['torchscript'",
            "preprocess.mean has 1 values for 3 channels (RGB)",
            "preprocess.std has 4 values for 3 channels (RGB)",
        ]

    @pytest.mark.parametrize(
        ("tables", "wanted"),
        [
            ({"finetune": {}}, "[finetune] needs training images: set data.train or data.name"),
            (
                {"finetune": {"mode": "head first", "epochs": 3}, "data": {"train": "train"}},
                "finetune.head_epochs = 3 leaves none of the 3 epochs for the other layers",
            ),
            (
                {"finetune": {"cache_features": True}, "data": {"train": "train"}},
                'finetune.cache_features needs a backbone that stays as it is: mode = "head" or "head first", and no unfreeze',
            ),
            (
                {"finetune": {"views": 2}, "data": {"train": "train"}},
                "finetune.views = 2 is for cache_features; without it every epoch sees new views",
            ),
            (
                {"data": {"held_out": "val"}},
                "data.held_out is for images beside those of data.train: set that too, or leave it out",
            ),
            (
                {"quantize": {}},
                "[quantize] needs calibration images: set data.calibrate (--calibrate DIR) or data.name",
            ),
            (
                {"quantize": {}, "data": {"name": "digits"}, "build": {"runtimes": []}},
                "[quantize] follows the rules of a runtime: set build.runtimes (INT8 means another graph for each)",
            ),
            (
                {"data": {"name": "digits", "train": "photos"}},
                "data.name = 'digits' brings its own parts: remove data.train",
            ),
            (
                {"export": {"formats": []}, "build": {"runtimes": []}},
                "export.formats is empty: name onnx, torchscript or both",
            ),
            (
                {"build": {"runtimes": ["tensorrt", "tensorrt"]}},
                "build.runtimes = ['tensorrt', 'tensorrt'] names one of them twice",
            ),
            (
                {"build": {"keep": "fastest"}, "benchmark": {"enabled": False}},
                'build.keep = "fastest" needs a benchmark, and benchmark.enabled is false',
            ),
            *(
                (
                    {"build": {"keep": "fastest", **nothing_to_choose_from}},
                    'build.keep = "fastest" chooses among CPU engines: set build.runtimes, build.engine "auto" or "require"',
                )
                for nothing_to_choose_from in ({"engine": "skip"}, {"runtimes": []})
            ),
            (
                {"quantize": {"cpu": "any"}, "data": {"name": "digits"}, "build": {"runtimes": ["tensorrt"]}},
                "quantize.cpu = 'any' means nothing for TensorRT, which runs on a GPU: leave it out",
            ),
            (
                {"tensorrt": {"optimization_level": 5}},
                'tensorrt.optimization_level means nothing without a TensorRT engine: add "tensorrt" to build.runtimes, '
                "or leave it out",
            ),
            (
                {"tensorrt": {"batch": [4, 1, 8]}, "build": {"runtimes": ["tensorrt"]}},
                "tensorrt.batch = [4, 1, 8]: name smallest, best and largest batch in this order, or one size for all",
            ),
            (
                {"tensorrt": {"dla_core": 0}, "build": {"runtimes": ["tensorrt"]}},
                "tensorrt.dla_core with batches [1, 1, 32]: a DLA core runs one size; set export.batch to a number",
            ),
            (
                {"build": {"runtimes": ["tensorrt"], "jetpack": "6.1"}},
                "build.jetpack = '6.1' is about TensorRT on build.target (--target): set both, with \"tensorrt\" in "
                "build.runtimes, or leave it out",
            ),
            (
                {"tensorrt": {"gpu_fallback": False}, "build": {"runtimes": ["tensorrt"]}},
                "tensorrt.gpu_fallback = false is about DLA: set dla_core, or leave it out",
            ),
        ],
    )
    def test_each_says_what_to_set(self, tables, wanted):
        assert problems(tables) == (wanted,)


class TestOverrides:
    @pytest.mark.parametrize(
        ("dotted", "text", "table", "key", "wanted"),
        [
            ("export.batch", "4", "export", "batch", 4),
            ("export.batch", "dynamic", "export", "batch", "dynamic"),
            ("export.formats", '["onnx", "torchscript"]', "export", "formats", ("onnx", "torchscript")),
            ("benchmark.enabled", "false", "benchmark", "enabled", False),
            ("finetune.learning_rate", "1e-4", "finetune", "learning_rate", 1e-4),
            ("model.name", "resnet18", "model", "name", "resnet18"),
            ("model.name", "'quoted'", "model", "name", "quoted"),
        ],
    )
    def test_a_value_is_toml_and_a_bare_word_is_text(self, tmp_path, dotted, text, table, key, wanted):
        path = file(tmp_path, LEAST_TOML + "[data]\nname = 'digits'\n[export]\nbatch = 2")

        found = getattr(getattr(load(path, {dotted: text}), table), key)

        assert (found, type(found)) == (wanted, type(wanted))

    def test_other_keys_of_the_table_stay(self, tmp_path):
        path = file(tmp_path, LEAST_TOML + "classes = 7")

        assert load(path, {"model.seed": "3"}).model == replace(load(path).model, seed=3)

    def test_the_content_that_was_passed_in_is_not_changed(self):
        content = {"name": "run", "model": {"name": "lenet5"}}

        parse(content, base=BASE, source="the recipe", overrides={"model.name": "resnet18"})

        assert content == LEAST

    @pytest.mark.parametrize(
        ("dotted", "text", "wanted"),
        [
            ("export.bacth", "4", "[export]: unknown key 'bacth'; did you mean 'batch'?"),
            ("exprot.batch", "4", "the recipe: unknown key 'exprot'; did you mean 'export'?"),
            ("name.x", "4", "name: expected text, got {'x': 4}"),
            ("export.batch.x", "4", "export.batch: expected a whole number or 'dynamic', got {'x': 4}"),
            ("export.samples", "", "export.samples: expected a whole number, got ''"),
            ("export.samples", "1, 2", "export.samples: expected a whole number, got '1, 2'"),
            ("export.samples", "[" * 100_000, f"export.samples: expected a whole number, got '{'[' * 56}..."),
            ("export.samples", "9" * 5000, f"export.samples: expected a whole number, got '{'9' * 56}..."),
            (
                "data.train",
                os.fsdecode(b"\xff"),
                "data.train: \\xff is not UTF-8, and recipes are; rename it or make a link to it",
            ),
        ],
    )
    def test_they_are_checked_like_the_file(self, tmp_path, dotted, text, wanted):
        with pytest.raises(RecipeError) as caught:
            load(file(tmp_path, LEAST_TOML), {dotted: text})

        assert caught.value.problems == (wanted,)


class TestDeclarations:
    @pytest.mark.parametrize("dotted", KEYS)
    def test_every_key_has_help_that_fits_in_a_line_of_help(self, dotted):
        help = KEYS[dotted][0].metadata["help"]

        assert help
        assert help == help.strip().rstrip(".")

    @pytest.mark.parametrize("dotted", KEYS)
    def test_every_default_is_a_value_that_could_be_given(self, dotted):
        item, _ = KEYS[dotted]
        if item.default is MISSING or item.default is None:
            return
        value = list(item.default) if isinstance(item.default, tuple) else item.default

        found: Any = parsed(given(dotted, value))

        for name in dotted.split("."):
            found = getattr(found, name)
        assert found == item.default

    def test_all_keys_of_all_tables_are_declared(self):
        tables = [value for value in vars(recipe).values() if isinstance(value, type) and value.__name__.endswith("Table")]

        assert len(KEYS) == len(set(KEYS)) == 2 + sum(len(fields(table)) for table in tables)

    def test_the_manuals_page_is_what_the_declarations_say(self):
        page = (ROOT / "docs" / "recipe.md").read_text()

        assert page == runpy.run_path(str(ROOT / "docs" / "make_recipe_md.py"))["page"](), "run python docs/make_recipe_md.py"
        rows = page.splitlines()
        for dotted, (item, _) in KEYS.items():
            key, help = dotted.rpartition(".")[2], item.metadata["help"].replace("|", "\\|")
            (row,) = (row for row in rows if row.startswith(f"| `{key}` |") and row.endswith(f"| {help} |"))
            if item.default is not MISSING and item.default is not None:
                assert f"| `{json.dumps(item.default)}` |" in row


class TestContradictionsOfOneTable:
    def test_a_percentile_without_the_method_is_not_ignored(self):
        (found,) = problems(quantize={"percentile": 99.0}, data={"calibrate": "photos"})

        assert found == "quantize.percentile means nothing with method = 'mse': leave it out or change the method"

    @pytest.mark.parametrize("name", ["a/b", "..", "/tmp"])
    def test_a_name_that_is_no_folder_name_is_refused(self, name):
        (found,) = problems({**LEAST, "name": name})

        assert found == f"name = {name!r} cannot be the name of a folder"


class TestPathsThatAreTyped:
    def test_they_are_relative_to_where_they_are_typed(self, tmp_path):
        path = file(tmp_path, LEAST_TOML + "[data]\ncalibrate = 'photos'\n")

        read = load(path, {"data.validate": "labelled", "model.weights": "best.pth"}, overrides_base=tmp_path / "here")

        assert read.data.calibrate == str(tmp_path / "photos")
        assert read.data.validate == str(tmp_path / "here" / "labelled")
        assert read.model.weights == str(tmp_path / "here" / "best.pth")

    def test_a_users_file_is_a_path_and_a_networks_name_is_not(self, tmp_path):
        assert (
            load(file(tmp_path, LEAST_TOML.replace("lenet5", "nets/mine.py:build"))).model.name
            == f"{tmp_path}/nets/mine.py:build"
        )
        assert load(file(tmp_path, LEAST_TOML.replace("lenet5", "package.mine:build"))).model.name == "package.mine:build"


class TestARuleOfLatency:
    @pytest.mark.parametrize(
        ("build", "is_left"),
        [
            ({"target": "orin-nano", "engine": "skip"}, True),
            ({"target": "orin-nano"}, False),
            ({"engine": "skip"}, False),
        ],
    )
    def test_is_left_to_the_device_only_where_the_recipe_names_it_and_builds_nothing_here(self, build, is_left):
        content = {"name": "run", "gate": ["latency <= 5 ms"], "model": {"name": "lenet5"}, "build": build}

        found = recipe.parse(content, base=Path("/"), source="a test")

        assert [str(rule) for rule in found.left_to_the_device] == ["latency <= 5 ms"] * is_left
