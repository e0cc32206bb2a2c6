"""What messages look like on a terminal."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from deploykit.errors import printable


class TestNamesInMessages:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("fotos/Größe 1.jpg", "fotos/Größe 1.jpg"),
            ("caf\udce9.onnx", "caf\\xe9.onnx"),
            ("clear\x1b[2Jscreen", "clear\\x1b[2Jscreen"),
            ("two\nlines", "two\\nlines"),
            ("gnp.\u202eevil", "gnp.\\u202eevil"),
        ],
    )
    def test_what_a_terminal_would_not_show_is_spelled_out(self, name, shown):
        assert printable(name) == shown

    @hypothesis.given(name=st.text() | st.binary().map(lambda name: name.decode("utf-8", "surrogateescape")))
    def test_are_one_line_that_can_be_printed_whatever_they_hold(self, name):
        shown = printable(name)

        assert shown.isprintable()
        shown.encode()
