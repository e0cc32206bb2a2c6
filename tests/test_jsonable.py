"""What has a JSON form, and that a digest depends on what is said and not on how."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from deploykit.jsonable import digest, to_json


class Colour(str, Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    where: Path


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    """The same value with the keys of every mapping in another order."""
    if isinstance(value, dict):
        keys = random.Random(0).sample(list(value), len(value))
        return {key: shuffled(value[key]) for key in keys}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


class TestToJson:
    @settings(deadline=None)
    @hypothesis.given(value=VALUES)
    def test_what_is_json_already_stays_what_it_is(self, value):
        assert to_json(value) == value
        assert json.loads(json.dumps(to_json(value))) == value

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            (Colour.RED, "red"),
            ((1, (2, 3)), [1, [2, 3]]),
            (Path("a/b"), "a/b"),
            (Path(os.fsdecode(b"caf\xe9")), "caf\\xe9"),
            (Point(1, Path("a")), {"x": 1, "where": "a"}),
            ({Colour.RED: 1}, {"red": 1}),
            ({1: "one"}, {"1": "one"}),
            (np.float32(0.5), 0.5),
            (np.bool_(True), True),
            (np.array([[1, 2], [3, 4]], np.uint8), [[1, 2], [3, 4]]),
            ([Point(1, Path("a")), {"n": np.int64(3)}], [{"x": 1, "where": "a"}, {"n": 3}]),
        ],
    )
    def test_our_own_values_have_a_plain_form(self, value, wanted):
        found = to_json(value)

        assert found == wanted
        assert json.loads(json.dumps(found)) == wanted

    @pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), Point, 1j, {"deep": [object()]}, {object(): 1}])
    def test_what_is_not_understood_is_refused_by_its_type_and_never_becomes_text(self, value):
        with pytest.raises(TypeError, match=r"no JSON form for (set|bytes|object|type|complex)"):
            to_json(value)


class TestDigest:
    @settings(deadline=None)
    @hypothesis.given(value=VALUES)
    def test_the_order_of_keys_does_not_matter(self, value):
        assert digest(shuffled(value)) == digest(value)

    @settings(deadline=None)
    @hypothesis.given(one=VALUES, other=VALUES)
    def test_values_that_are_written_differently_have_different_digests(self, one, other):
        same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)

        assert (digest(one) == digest(other)) is same

    def test_the_order_of_a_list_matters(self):
        assert digest([1, 2]) != digest([2, 1])

    def test_it_is_the_same_on_every_machine_and_in_every_version(self):
        canonical = b'{"a":"\\u00e9","b":[1,2.5,null]}'

        assert digest({"b": [1, 2.5, None], "a": "é"}) == hashlib.sha256(canonical).hexdigest()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_a_number_is_refused(self, value):
        with pytest.raises(ValueError, match="Out of range float values"):
            digest({"scale": value})

    def test_text_that_is_not_unicode_has_a_digest_too(self):
        assert digest("\udcff") != digest("\udcfe")
