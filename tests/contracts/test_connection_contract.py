"""What every connection to a device owes, whatever it is made of. A new kind is one more line in `KINDS`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sshd import Sshd, sshd

from deploykit.errors import DeploykitError, LineError, UsageError
from deploykit.remote import Connection, connect, objection

EVERY_BYTE = bytes(range(256)) * 17
ODD_NAMES = (
    "with space",
    "-leading-dash",
    "quote'\"s and $HOME `id` ;&|<>*?[x]",
    "new\nline\ttab",
    "back\\slash\\n",
    "ünïcödé 网络",
    b"no-utf8-\xff\xfe".decode("utf-8", "surrogateescape"),
    "n" * 255,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as started:
        yield started


KINDS: dict[str, Callable[[Sshd], Connection]] = {
    "local": lambda _server: connect("local"),
    "ssh": lambda server: connect(server.address, ssh_config=server.config),
}


@pytest.fixture(scope="module", params=KINDS)
def device(request, server) -> Iterator[Connection]:
    connection = KINDS[request.param](server)
    yield connection
    connection.close()


def python(script: str, *words: str) -> list[str]:
    return [sys.executable, "-c", script, *words]


class TestACommand:
    @pytest.mark.parametrize("code", [0, 1, 2, 5, 77, 126, 127, 254])
    def test_has_its_own_exit_code(self, device, code):
        assert device.run(["sh", "-c", f"exit {code}"]).code == code

    def test_that_a_signal_ended_says_128_and_the_signal(self, device):
        assert device.run(["sh", "-c", "kill -9 $$"]).code == 137

    def test_that_is_not_there_is_127(self, device):
        done = device.run(["no-such-program"])

        assert done.code == 127
        assert "not found" in done.words

    def test_keeps_its_two_streams_apart(self, device):
        done = device.run(["sh", "-c", "echo to out; echo to err >&2; exit 3"])

        assert (done.code, done.stdout, done.stderr) == (3, b"to out\n", b"to err\n")

    def test_may_fill_both_streams_at_once_while_it_is_fed(self, device):
        script = (
            "import sys\nfor _ in range(40):\n sys.stdin.buffer.read(50000)\n sys.stderr.write('e' * 50000)\n"
            " sys.stdout.write('o' * 50000)"
        )

        done = device.run(python(script), stdin=bytes(40 * 50000))

        assert (done.code, len(done.stdout)) == (0, 40 * 50000)

    def test_gets_every_byte_and_gives_every_byte(self, device):
        assert device.run(["cat"], stdin=EVERY_BYTE).stdout == EVERY_BYTE

    def test_is_fed_piece_by_piece(self, device):
        pieces = (bytes([number]) * 100_000 for number in range(20))

        assert device.run(["wc", "-c"], stdin=pieces).stdout.split() == [b"2000000"]

    def test_is_fed_on_after_an_empty_piece(self, device):
        assert device.run(["cat"], stdin=iter([b"", b"one", b"", b"two", b""])).stdout == b"onetwo"

    def test_that_is_fed_nothing_sees_the_end(self, device):
        assert device.run(["cat"]).stdout == b""

    def test_need_not_read_what_it_is_fed(self, device):
        assert device.run(["true"], stdin=(bytes(1 << 20) for _ in range(20))).code == 0

    @pytest.mark.parametrize("word", [*ODD_NAMES, ""])
    def test_gets_its_words_as_they_are(self, device, word):
        said = device.run(python("import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]))", word)).stdout

        assert said == os.fsencode(word)

    def test_cannot_hold_a_nul(self, device):
        with pytest.raises(UsageError, match="without NUL"):
            device.run(["echo", "a\0b"])

    def test_that_says_nothing_for_too_long_is_given_up_and_the_next_one_runs(self, device):
        began = time.monotonic()
        with pytest.raises(LineError, match=r"said nothing for 0\.5 s"):
            device.run(["sleep", "60"], silence_s=0.5)

        assert time.monotonic() - began < 30
        assert device.run(["echo", "there"]).stdout == b"there\n"

    def test_may_take_longer_than_the_time_out_while_it_says_something(self, device):
        done = device.run(["sh", "-c", "for i in 1 2 3 4 5 6; do sleep 0.3; echo $i; done"], silence_s=1.5)

        assert done.stdout.split() == [b"1", b"2", b"3", b"4", b"5", b"6"]

    def test_that_answers_without_end_is_stopped(self, device):
        with pytest.raises(DeploykitError, match="answered with more than 64 MiB"):
            device.run(["cat", "/dev/zero"])

    def test_is_counted(self, device):
        before = device.commands

        device.run(["true"])

        assert device.commands == before + 1


class TestACommandThatGoesOn:
    def test_is_talked_with_while_others_run(self, device):
        talk = device.start(["cat"])

        talk.say(b"one\n")
        assert talk.line(20) == b"one"
        assert device.run(["echo", "meanwhile"]).stdout == b"meanwhile\n"
        talk.say(b"two\n")
        assert talk.line(20) == b"two"
        assert talk.is_running
        assert talk.close().code == 0

    def test_that_ended_is_heard_to_the_end_and_says_why(self, device):
        talk = device.start(["sh", "-c", "echo one; echo two; echo because >&2; exit 4"])

        assert talk.line(20) == b"one"
        done = talk.close()
        assert (done.code, done.stdout, done.words) == (4, b"two\n", "because")

    def test_that_ended_has_no_more_lines(self, device):
        talk = device.start(["echo", "last"])

        assert (talk.line(20), talk.line(20)) == (b"last", b"")
        talk.close()

    def test_that_is_silent_is_not_waited_for(self, device):
        talk = device.start(["cat"])

        with pytest.raises(LineError, match="said nothing"):
            talk.line(0.2)
        talk.close()


class TestAFile:
    @pytest.mark.parametrize("content", [b"", b"x", EVERY_BYTE, b"no newline at the end", b"\r\n\0\n"], ids=len)
    def test_goes_there_and_comes_back_the_same(self, device, tmp_path, content):
        (tmp_path / "source").write_bytes(content)

        device.put(tmp_path / "source", str(tmp_path / "there"))
        device.get(str(tmp_path / "there"), tmp_path / "back")

        assert (tmp_path / "there").read_bytes() == (tmp_path / "back").read_bytes() == content

    def test_may_be_huge(self, device, tmp_path):
        with (tmp_path / "source").open("wb") as file:
            file.truncate(80 << 20)  # with a hole, so that it costs the disk nothing
        seen: list[int] = []

        device.put(tmp_path / "source", str(tmp_path / "there"), progress=lambda what, done, total: seen.append(done))
        device.get(str(tmp_path / "there"), tmp_path / "back")

        assert (tmp_path / "back").stat().st_size == 80 << 20 == seen[-1]
        assert seen == sorted(seen)
        assert len(seen) > 100

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_may_have_any_name(self, device, tmp_path, name):
        (tmp_path / "source").write_bytes(b"content")

        device.put(tmp_path / "source", str(tmp_path / name))
        device.get(str(tmp_path / name), tmp_path / "back")

        assert (tmp_path / "back").read_bytes() == b"content"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", "back", name])

    def test_replaces_what_was_there(self, device, tmp_path):
        (tmp_path / "source").write_bytes(b"new")
        (tmp_path / "there").write_bytes(b"old and longer")

        device.put(tmp_path / "source", str(tmp_path / "there"))

        assert (tmp_path / "there").read_bytes() == b"new"

    def test_that_cannot_be_written_says_why_and_leaves_nothing(self, device, tmp_path):
        (tmp_path / "source").write_bytes(b"new")
        (tmp_path / "folder").mkdir()

        with pytest.raises(DeploykitError, match=r"cannot write .*nowhere/file"):
            device.put(tmp_path / "source", str(tmp_path / "nowhere/file"))
        with pytest.raises(DeploykitError, match="is a folder"):
            device.put(tmp_path / "source", str(tmp_path / "folder"))
        assert list((tmp_path / "folder").iterdir()) == []

    def test_that_cannot_be_read_says_why_and_leaves_what_was_here(self, device, tmp_path):
        (tmp_path / "back").write_bytes(b"old")

        with pytest.raises(DeploykitError, match=r"cannot read .*nothing"):
            device.get(str(tmp_path / "nothing"), tmp_path / "back")
        with pytest.raises(DeploykitError, match="is a folder"):
            device.get(str(tmp_path), tmp_path / "back")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"back": b"old"}

    def test_that_is_not_here_is_not_sent(self, device, tmp_path):
        with pytest.raises(FileNotFoundError):
            device.put(tmp_path / "nothing", str(tmp_path / "there"))
        assert list(tmp_path.iterdir()) == []


class TestTheEnd:
    @pytest.mark.parametrize("kind", KINDS)
    def test_closing_twice_does_nothing(self, kind, server):
        connection = KINDS[kind](server)

        connection.close()
        connection.close()


class TestACutLine:
    """What `local` cannot show: the server's process for this connection is killed, as a cut cable ends it."""

    def test_is_told_from_a_command_that_failed_and_half_a_file_gets_no_name(self, tmp_path):
        with sshd(tmp_path / "sshd") as server:
            device = connect(server.address, ssh_config=server.config)
            (tmp_path / "there").write_bytes(b"old")
            with (tmp_path / "source").open("wb") as file:
                file.truncate(64 << 20)

            def cut(what: str, done: int, total: int) -> None:
                if done > 4 << 20:
                    for child in children(server.process.pid):
                        os.kill(child, 9)

            with pytest.raises(LineError, match="was lost"):
                device.put(tmp_path / "source", str(tmp_path / "there"), progress=cut)

            again = connect(server.address, ssh_config=server.config)
            assert again.run(["echo", "back"]).stdout == b"back\n"
            assert (tmp_path / "there").read_bytes() == b"old"
            again.close()
            device.close()


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def children(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task/{pid}").glob("children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


class TestASecureShell:
    def test_refuses_a_host_that_is_not_known_and_says_how_to_accept_it(self, server, tmp_path):
        (tmp_path / "config").write_text(f"UserKnownHostsFile {tmp_path}/none\nStrictHostKeyChecking no\n")

        with pytest.raises(UsageError, match="is not known, so nothing was sent") as refused:
            connect(server.address, ssh_config=tmp_path / "config")

        assert refused.value.fix.startswith("ssh -o StrictHostKeyChecking=ask -F ")
        assert f"-p {server.port} -- 127.0.0.1 true" in refused.value.fix

    def test_refuses_a_host_whose_key_changed(self, server, tmp_path):
        other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUKuPs4WBLmvYyB8d3cVlxhSmtr5PoKbFBNjnzKjjnU"
        (tmp_path / "known").write_text(f"[127.0.0.1]:{server.port} {other}\n")
        (tmp_path / "config").write_text(f"UserKnownHostsFile {tmp_path}/known\n")

        with pytest.raises(UsageError, match="another host key than is known"):
            connect(server.address, ssh_config=tmp_path / "config")

    def test_believes_only_the_key_that_was_named(self, server, tmp_path):
        (tmp_path / "config").write_text(f"IdentityFile {server.config.parent}/user\nUserKnownHostsFile {tmp_path}/none\n")

        device = connect(server.address, ssh_config=tmp_path / "config", host_key=server.host_key)

        assert device.run(["echo", "there"]).stdout == b"there\n"
        device.close()
        with pytest.raises(UsageError, match=r"another host key than was named(.|\n)*correct its host_key"):
            connect(
                server.address,
                ssh_config=server.config,
                host_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUKuPs4WBLmvYyB8d3cVlxhSmtr5PoKbFBNjnzKjjnU",
            )

    def test_refuses_a_login_and_says_what_to_do(self, server, tmp_path):
        (tmp_path / "config").write_text(f"UserKnownHostsFile {server.config.parent}/known_hosts\nIdentityFile {tmp_path}/none\n")

        with pytest.raises(UsageError, match="refuses the login") as refused:
            connect(server.address, ssh_config=tmp_path / "config")

        assert "ssh-copy-id" in refused.value.fix

    @pytest.mark.parametrize(
        ("words", "error"),
        [
            ("Could not resolve hostname jetson: Temporary failure in name resolution", LineError),
            ("Could not resolve hostname jetson: Name or service not known", UsageError),
            ("Received disconnect from 10.0.0.1: Too many authentication failures", UsageError),
        ],
    )
    def test_tries_again_where_that_can_help_and_nowhere_else(self, words, error, tmp_path, monkeypatch):
        script(tmp_path / "ssh", f"echo '{words}' >&2; exit 255")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

        with pytest.raises(error) as raised:
            connect("ssh://jetson")

        assert type(raised.value) is error

    def test_a_login_that_never_ends_is_given_up_and_no_window_is_opened(self, tmp_path, monkeypatch):
        script(tmp_path / "ssh", f"echo $SSH_ASKPASS_REQUIRE > {tmp_path}/asked; exec sleep 60")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr("deploykit.remote.ssh._LOGIN_S", 1)

        with pytest.raises(LineError, match="no end of the login"):
            connect("ssh://jetson")

        assert (tmp_path / "asked").read_text() == "never\n"

    def test_is_not_there_when_nobody_listens(self, tmp_path):
        with pytest.raises(LineError, match=r"cannot reach ssh://127\.0\.0\.1:1"):
            connect("ssh://127.0.0.1:1")

    def test_all_commands_share_one_connection(self, server):
        device = connect(server.address, ssh_config=server.config)
        log = server.config.parent / "log"
        before = log.read_text().count("Accepted publickey")

        for _ in range(5):
            device.run(["true"])

        assert log.read_text().count("Accepted publickey") == before
        device.close()

    @pytest.mark.parametrize("address", ["ssh://[::1]:22", "ssh://me@[fe80::1%eth0]", "ssh://h/", "local", "emulated:///opt/arm"])
    def test_an_address_is_one_without_asking_there(self, address):
        assert objection(address) == ""

    @pytest.mark.parametrize(
        "address", ["jetson", "ssh://", "ssh://a b", "ssh://-oProxyCommand=id", "ssh://-x@host", "ssh://host:0", "ssh://h:99999"]
    )
    def test_an_address_of_another_form_is_refused(self, address):
        with pytest.raises(UsageError, match="is no address of a device"):
            connect(address)
