"""`--markdown FILE`: the summary as a page of GitHub or GitLab shows it, parsed by a Markdown parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from deploykit.report import markdown
from deploykit.report.summary import Gate, Status, Summary, Table, visible

few = settings(deadline=None, max_examples=100)
# What Markdown gives a meaning to, so often that the pieces meet, or any text at all.
PIECES = st.sampled_from(
    ["|", "\\", "`", "*", "_", "[a](b)", "<b>", "<!--", "&amp;", "&#65;", "~~", "!", "# ", "- ", ":-", "\n", "a", "1 "]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join) | st.text(st.characters(), max_size=20)
PASSED = Gate("e: drop <= 1 points", Status.PASS, "observed 0.1")
FAILED = Gate("e: agreement >= 99 %", Status.FAIL, "observed 95")
UNDECIDED = Gate("e: latency <= 5 ms", Status.CANNOT_TELL, "about 40 processes would decide it")


def shown(text: str) -> list[tuple[str, list[str]]]:
    """(kind, texts) of every heading, paragraph, list item and row of a table, as a reader sees them."""
    found: list[tuple[str, list[str]]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type in ("heading_open", "paragraph_open", "tr_open"):
            found.append((token.tag, []))
        elif token.type == "inline":
            assert {child.type for child in token.children or ()} <= {"text", "text_special"}, token.content
            found[-1][1].append("".join(child.content for child in token.children or ()))
    return found


def on_one_line(text: str) -> str:
    return visible(" ".join(text.split()))


class TestThePage:
    def test_says_the_verdict_first(self):
        found = shown(markdown.render(Summary("net", (PASSED, FAILED, UNDECIDED))))

        assert found[:2] == [("h2", ["deploykit net: FAIL"]), ("p", ["1 fail, 1 cannot tell, 1 pass"])]

    @pytest.mark.parametrize(
        ("gates", "verdict"),
        [
            ([PASSED], "PASS"),
            ([PASSED, UNDECIDED], "CANNOT TELL"),
            ([Gate("a gate", Status.NOT_JUDGED, "")], "not judged"),
            ([Gate("deploykit run", Status.ERROR, "no"), FAILED], "ERROR"),
        ],
    )
    def test_has_the_verdict_of_the_worst_gate(self, gates, verdict):
        assert shown(markdown.render(Summary("net", tuple(gates))))[0] == ("h2", [f"deploykit net: {verdict}"])

    @given(TEXTS)
    @few
    def test_begins_as_our_own_pages_are_told_by(self, name):
        assert markdown.render(Summary(name, (PASSED,))).startswith(markdown.OPENING)

    def test_has_a_row_for_each_gate_the_worst_at_the_top(self):
        rows = [texts for tag, texts in shown(markdown.render(Summary("net", (PASSED, UNDECIDED, FAILED)))) if tag == "tr"]

        assert rows == [
            ["gate", "verdict", "why"],
            [FAILED.rule, "FAIL", FAILED.reason],
            [UNDECIDED.rule, "CANNOT TELL", UNDECIDED.reason],
            [PASSED.rule, "PASS", PASSED.reason],
        ]

    def test_has_tables_notes_and_facts(self):
        table = Table("Latency", ("engine", "median"), (("e", "5 ms"),))
        found = shown(markdown.render(Summary("net", (PASSED,), tables=(table,), notes=("slower",), facts={"cpu": "x86"})))

        for part in (("p", ["slower"]), ("h3", ["Latency"]), ("tr", ["engine", "median"]), ("tr", ["e", "5 ms"])):
            assert part in found
        assert found[-1] == ("tr", ["cpu", "x86"])

    @given(TEXTS, TEXTS, TEXTS, TEXTS)
    @few
    def test_shows_every_text_as_it_is_but_on_one_line(self, rule, reason, note, value):
        table = Table("t", ("a", "b"), ((value, rule),))

        found = shown(markdown.render(Summary("n", (Gate(rule, Status.FAIL, reason),), notes=(f"note {note}",), tables=(table,))))

        assert ["FAIL" if cell == "FAIL" else on_one_line(cell) for cell in (rule, "FAIL", reason)] in [
            texts for _, texts in found
        ]
        assert ("tr", [on_one_line(value), on_one_line(rule)]) in found
        assert ("p", [on_one_line(f"note {note}")]) in found

    @pytest.mark.parametrize(
        "text",
        [
            "`a`",
            "*a*",
            "__a__",
            "_a_",
            "~~a~~",
            "[a](b)",
            "![a](b)",
            "<b>",
            "</b>",
            "<!-- a -->",
            "&amp;",
            "a|b",
            "\\|",
            "a\\",
            "# a",
        ],
    )
    def test_makes_no_markdown_of_a_text(self, text):
        found = shown(markdown.render(Summary("net", (Gate(text, Status.FAIL, "why"),), notes=(f"see {text}",))))

        assert ("tr", [text, "FAIL", "why"]) in found
        assert ("p", [f"see {text}"]) in found

    def test_stays_readable_where_nothing_has_to_be_escaped(self):
        text = "onnxruntime int8: runs/lenet_digits, drop <= 0.5 points; 3 < 4 & more"

        assert markdown.escape(text) == text


class TestTheLimit:
    SUMMARY = Summary("net", (FAILED,), tables=(Table("many", ("image",), tuple((f"é{n}",) for n in range(500))),))

    @given(st.integers(0, 12_000))
    @few
    def test_is_never_exceeded_and_no_line_is_cut_in_two(self, limit):
        whole = markdown.render(self.SUMMARY)

        text = markdown.render(self.SUMMARY, limit=limit)

        assert len(text.encode()) <= limit or text == ""
        kept, cut, _ = text.partition("\n*The rest was cut off")
        assert whole.startswith(kept)
        assert text == whole or not text or (cut and kept.endswith("\n"))

    def test_leaves_a_page_that_fits_alone(self):
        whole = markdown.render(self.SUMMARY)

        assert markdown.render(self.SUMMARY, limit=len(whole.encode())) == whole
        assert markdown.render(self.SUMMARY, limit=len(whole.encode()) - 1) != whole

    def test_that_allows_nothing_leaves_nothing(self):
        assert markdown.render(self.SUMMARY, limit=-5) == ""


class TestTheCommand:
    def test_writes_accuracy_and_latency_with_intervals_and_the_flips(self, deploykit, finished, tmp_path):
        folder, file = finished.copied_to(tmp_path / "run"), tmp_path / "summary.md"

        done = deploykit("run", folder / "recipe.toml", "--output", folder, "--markdown", file)

        found = shown(file.read_text())
        assert done.code == 0
        assert found[0] == ("h2", ["deploykit tiny: PASS"])
        assert ("tr", ["", "int8 layers", "top-1", "drop (95 %)", "images decided otherwise", "size"]) in found
        assert ("tr", ["engine", "median", "95 %", "p90 at most", "p99 at most"]) in found
        int8 = next(texts for tag, texts in found if tag == "tr" and texts[0] == "onnxruntime int8" and len(texts) == 6)
        assert int8[1] == "5 of 5"
        assert " points (" in int8[3]
        assert any(texts[-1] == "invalid run" for _, texts in found)

    def test_writes_what_went_wrong_and_what_to_do(self, deploykit, tmp_path):
        done = deploykit("benchmark", tmp_path, "--markdown", tmp_path / "summary.md")

        found = shown((tmp_path / "summary.md").read_text())
        assert done.code == 2
        assert found[0] == ("h2", ["deploykit benchmark: ERROR"])
        assert ("tr", ["deploykit benchmark", "ERROR", "nothing to measure"]) in found
        assert ("p", ["try: deploykit export MODEL --to onnxruntime builds an engine"]) in found
