"""`--arg KEY=VALUE`: what reaches the function that builds the network, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import models, recipe
from deploykit.errors import ModelError, RecipeError
from deploykit.recipe import ModelTable, PreprocessTable

USER_INPUT = PreprocessTable(crop=8, mean=(0.5,), std=(0.5,), channels="L")
NET = """
    from torch import nn

    def build(width=4, act="relu", layers=(1, 2), *, bias: bool = True, num_classes=3):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, width, bias=bias), nn.Linear(width, num_classes))
        network.got = {"width": width, "act": act, "layers": layers, "bias": bias}
        return network
    """


@pytest.fixture
def net(tmp_path) -> str:
    (tmp_path / "net.py").write_text(dedent(NET))
    return f"{tmp_path / 'net.py'}:build"


def load(name: str, **args: object) -> models.Model:
    return models.load(ModelTable(name=name, weights="none", args=args), USER_INPUT)


class TestAUsersFactory:
    def test_it_gets_the_arguments_by_name(self, net):
        model = load(net, width=16, act="gelu", bias=False)

        assert model.module.got == {"width": 16, "act": "gelu", "layers": (1, 2), "bias": False}
        assert model.module[1].out_features == 16

    def test_a_wrong_name_is_answered_with_the_signature(self, net):
        with pytest.raises(ModelError) as caught:
            load(net, widht=16)

        assert "cannot be called with widht=16" in caught.value.what
        assert "unexpected keyword argument 'widht'" in caught.value.why
        assert "build(width=4, act='relu', layers=(1, 2), *, bias: bool = True, num_classes=3)" in caught.value.fix

    def test_a_missing_argument_is_answered_with_the_signature(self, tmp_path):
        (tmp_path / "net.py").write_text("def build(width): ...\n")

        with pytest.raises(ModelError, match=r"missing a required argument: 'width'(.|\n)*build\(width\)"):
            load(f"{tmp_path / 'net.py'}:build")

    def test_the_number_of_classes_has_its_own_key(self, net):
        with pytest.raises(ModelError, match=r"num_classes is model\.classes(.|\n)*--classes"):
            load(net, num_classes=5)

    def test_a_class_may_be_the_factory(self, tmp_path):
        text = """
            from torch import nn

            class Net(nn.Linear):
                def __init__(self, width):
                    super().__init__(8, width)

                def forward(self, x):
                    return super().forward(x.mean((1, 2)))
            """
        (tmp_path / "net.py").write_text(dedent(text))

        assert load(f"{tmp_path / 'net.py'}:Net", width=6).num_classes == 6

    def test_they_are_there_when_the_network_is_built_again_for_a_checkpoints_classes(self, net, tmp_path):
        import torch

        trained = models.load(ModelTable(name=net, weights="none", args={"width": 9}, classes=7), USER_INPUT).module
        torch.save(trained.state_dict(), tmp_path / "best.pth")

        model = models.load(ModelTable(name=net, weights=str(tmp_path / "best.pth"), args={"width": 9}), USER_INPUT)

        assert (model.num_classes, model.module.got["width"]) == (7, 9)


class TestPublishedNetworks:
    @pytest.mark.parametrize("name", ["resnet18", "fcn_resnet50"])
    def test_they_are_what_their_name_says(self, name):
        with pytest.raises(ModelError, match=rf"{name} cannot be called with width=2(.|\n)*{name}\(\)"):
            models.load(ModelTable(name=name, weights="none", args={"width": 2}))

    def test_a_classic_of_ours_says_what_it_takes(self):
        with pytest.raises(ModelError, match=r"alexnet_2012\(num_classes: 'int' = 1000, groups: 'int' = 1\)"):
            models.load(ModelTable(name="alexnet_2012", weights="none", args={"group": 2}))


class TestRecipes:
    def parsed(self, args: object) -> recipe.Recipe:
        content = {"name": "run", "model": {"name": "net.py:build", "args": args}}
        return recipe.parse(content, base=Path("/r"), source="the recipe")

    @settings(deadline=None, max_examples=40)
    @given(
        st.dictionaries(
            st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True),
            st.recursive(
                st.booleans()
                | st.integers(-(2**63), 2**63 - 1)
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=3,
        )
    )
    def test_arguments_survive_being_written_down(self, args):
        written = recipe.dump(self.parsed(args))

        assert tomllib.loads(written)["model"]["args"] == args
        assert recipe.parse(tomllib.loads(written), base=Path("/r"), source="again").model.args == args

    @pytest.mark.parametrize(
        ("typed", "value"),
        [
            ("64", 64),
            ("0.5", 0.5),
            ("true", True),
            ("[1, 2]", [1, 2]),
            ("gelu", "gelu"),
            ("'64'", "64"),
        ],
    )
    def test_they_are_typed_by_the_rules_of_toml(self, tmp_path, typed, value):
        (tmp_path / "recipe.toml").write_text('name = "run"\n[model]\nname = "net.py:build"\n')

        assert recipe.load(tmp_path / "recipe.toml", {"model.args.x": typed}).model.args == {"x": value}

    @pytest.mark.parametrize(
        ("args", "problem"),
        [
            (3, "model.args: expected a table, got 3"),
            ({"a b": 1}, "model.args: 'a b' cannot be the name of a parameter"),
            ({"x": float("nan")}, "model.args.x: expected text, a finite number"),
            ({"x": {"y": 1}}, "model.args.x: expected text"),
            ({"x": 2**70}, "model.args.x: expected text"),
            ({"x": tomllib.loads("x = 2020-01-01")["x"]}, "model.args.x: expected text"),
        ],
    )
    def test_what_is_no_argument_is_refused_with_its_key(self, args, problem):
        with pytest.raises(RecipeError) as caught:
            self.parsed(args)

        assert caught.value.problems[0].startswith(problem)


class TestOnTheCommandLine:
    def test_an_export_takes_arguments_and_its_recipe_keeps_them(self, deploykit, net, tmp_path):
        keys = ["crop=8", "mean=[0.5]", "std=[0.5]", "channels=L"]
        words = [word for key in keys for word in ("--set", f"preprocess.{key}")]

        outcome = deploykit(
            *("export", net, "--to", "onnx", "--weights", "none", "--arg", "width=16", "--arg", "act=gelu"),
            *(*words, "--output", tmp_path / "run", "--json"),
        )

        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["model"]["parameters"] == 64 * 16 + 16 + 16 * 3 + 3
        assert recipe.load(tmp_path / "run/recipe.toml").model.args == {"width": 16, "act": "gelu"}

    def test_what_is_no_pair_is_refused(self, deploykit, net):
        outcome = deploykit("export", net, "--to", "onnx", "--arg", "width")

        assert outcome.code == 2
        assert "--arg 'width' is not of the form KEY=VALUE" in outcome.err
