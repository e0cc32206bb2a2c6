"""The documentation held against the program: its commands run or parse, its links lead somewhere, its pages say all there is."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import guides
import pytest
from guides import DOCS, ROOT, Work, environment, program

from deploykit.cli import cli
from deploykit.report import html

GUIDES = ["tour"]  # pages whose commands are all run, in order, in one folder
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
# A training of a few epochs and a few measurements: the same commands, in seconds.
QUICK = """
case "$1" in
  run) set -- "$@" --set finetune.epochs=4 --set benchmark.processes=1 --set benchmark.queries=3 --set benchmark.warmup=1 \\
       --set benchmark.offline_seconds=0 ;;
  benchmark) set -- "$@" --processes 1 --queries 3 --warmup 1 --offline-seconds 0 ;;
esac
exec {python} -m deploykit "$@"
"""
# Options of programs that are not ours, in sentences about them.
FOREIGN = {
    *("--onnx", "--stronglyTyped", "--exportTimes", "--saveEngine", "--nproc-per-node", "--user", "--file", "--tag", "--rm"),
    *("--gpus", "--volume", "--runtime", "--publish", "--index-url", "--format"),
}


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it: ("export",), ("device", "trust")."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def options(command: click.Command) -> set[str]:
    return {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


def code(text: str) -> Iterator[str]:
    """Every line of a block of code, and every piece of code in a sentence."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", prose))


def calls(text: str) -> Iterator[list[str]]:
    """The words after `deploykit`, for each call of it in a page."""
    for line in code(text):
        for part in re.split(r"&&|\|\||[|;]", line.split(" #")[0]):
            found = re.search(r"(?:^|[\s'$])(?<!from )(?<!--tag )deploykit (.*)", part.replace("- run:", ""))
            if found:
                yield shlex.split(found[1].replace("'", " ").replace('"', " "))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    text = re.sub(r"^```\w*\n.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


class TestEveryGuide:
    @pytest.mark.slow
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("name", GUIDES)
    def test_its_commands_and_programs_run_as_written_one_after_the_other(self, name, tmp_path):
        programs_of_the_shell = program(tmp_path / "bin", QUICK.format(python=sys.executable))
        (programs_of_the_shell / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # as an environment has it
        (programs_of_the_shell / "python3").chmod(0o755)
        work = Work(tmp_path, environment(programs_of_the_shell))
        text = guides.page(name)
        programs = guides.blocks(text, "python")

        for block in guides.blocks(text, "sh", "python"):
            written = f"{sys.executable} - <<'EOF'\n{block}EOF\n" if block in programs else block
            done = work.run(written)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"

        assert (tmp_path / "runs" / "lenet_digits" / "report.html").is_file()
        assert (tmp_path / "device" / "current").exists()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
class TestEveryPage:
    def test_links_lead_to_files_and_headings_that_there_are(self, path):
        text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|mailto:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name) if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link

    def test_every_call_of_deploykit_names_a_command_and_options_that_there_are(self, path):
        for words in calls(path.read_text()):
            name = next((tuple(words[:size]) for size in (2, 1) if tuple(words[:size]) in COMMANDS), None)
            if name is None:
                assert words[0] in ("--help", "--version", "...", *cli.commands), words
                continue
            unknown = {word.partition("=")[0].rstrip(".,:])") for word in words if re.match(r"\[?--\w", word)}
            assert {word.lstrip("[") for word in unknown} <= options(COMMANDS[name]), words

    def test_every_option_in_a_sentence_is_one_of_some_command(self, path):
        from deploykit import agent

        known = set().union(*(options(command) for command in COMMANDS.values())) | FOREIGN
        source = "".join(file.read_text() for file in Path(agent.__file__).parent.glob("*.py"))
        source += "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
        known |= set(re.findall(r'"(--[\w-]+)"', source))
        for piece in code(path.read_text()):
            if piece.startswith("--"):
                assert piece.split()[0].partition("=")[0] in known, piece

    def test_every_file_of_the_tree_that_it_names_is_there(self, path):
        for piece in code(path.read_text()):
            for name in re.findall(r"(?:^|\s)((?:tests|benchmarks|docker|recipes|docs)/[\w./-]+\.\w+)\b", piece):
                assert (ROOT / name).exists(), piece


class TestAllPagesTogether:
    def test_name_every_command(self):
        told = {tuple(words[:size]) for path in PAGES for words in calls(path.read_text()) for size in (1, 2)}

        assert set(COMMANDS) <= told

    def test_say_of_every_part_of_a_report_how_to_read_it_in_its_order(self):
        headings = re.findall(r"^## (.+)$", guides.page("reports"), re.MULTILINE)

        assert headings == [section.title for section in html.IN_ORDER]

    def test_are_all_linked_from_the_readme_or_from_a_page_that_is(self):
        linked, waiting = set(), [ROOT / "README.md"]
        while waiting:
            path = waiting.pop()
            linked.add(path)
            found = {(path.parent / name).resolve() for name in re.findall(r"\]\(([^)\s#]+\.md)", path.read_text())}
            waiting += [target for target in found if target not in linked]

        assert set(DOCS.rglob("*.md")) <= linked
