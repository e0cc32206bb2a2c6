"""What messages look like on a terminal."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from deploykit.errors import like, printable


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


class TestWhereNothingIs:
    def test_a_name_much_like_it_is_offered(self, tmp_path):
        (tmp_path / "photos").mkdir()

        assert like(tmp_path / "photo") == f"{tmp_path}/photos, which is there"

    def test_else_what_the_folder_holds(self, tmp_path):
        for name in ("a.png", "b.png", ".hidden"):
            (tmp_path / name).touch()

        assert like(tmp_path / "labels.txt") == f"another path: {tmp_path} holds a.png, b.png"

    def test_of_many_only_some(self, tmp_path):
        for index in range(7):
            (tmp_path / f"{index}.png").touch()

        assert like(tmp_path / "labels.txt").endswith("4.png and 2 more")

    def test_or_that_it_is_empty_or_not_there_either(self, tmp_path):
        (tmp_path / "empty").mkdir()

        assert like(tmp_path / "empty" / "a.png") == f"another path: {tmp_path}/empty is empty"
        assert like(tmp_path / "none" / "deeper" / "a.png") == f"another path: {tmp_path}/none is not there either"

    def test_or_that_a_file_is_in_the_way_or_a_link_leads_nowhere(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("gone")

        assert like(tmp_path / "file" / "a.png") == f"another path: {tmp_path}/file is not a folder"
        assert like(tmp_path / "link") == "another path: it is a link to gone, which is not there"

    def test_and_nothing_more_where_the_name_itself_is_impossible(self, tmp_path):
        assert like(tmp_path / ("x" * 300) / "a.png") == "another path"
