"""What commands and logs print cannot control the terminal that it is printed to."""

import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st

from defib.output import print_json, print_text
from runtime import logs
from runtime.redaction import Redactor
from runtime.terminal import escape_controls, one_line

# A new title, a cleared line, C1's introducer of sequences, DEL, a reversed direction, an invisible and a lone character.
ATTACK = "up\x1b]0;owned\x07\r\x1b[2K\x9b2J\x7f\u202egnp.exe\u200b\ud800 \x00end"
SHOWN = r"up\x1b]0;owned\x07\r\x1b[2K\x9b2J\x7f\u202egnp.exe\u200b\ud800 \x00end"


def is_unsafe(character: str) -> bool:
    return character not in "\t\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def test_a_reason_cannot_look_like_the_next_line_of_the_audit_log() -> None:
    assert one_line("patch\r\n2026-11-29  ann: stop web\n") == r"patch\n2026-11-29  ann: stop web\n"


def test_unsafe_characters_are_escaped() -> None:
    assert escape_controls(ATTACK) == SHOWN


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\nc",
        "\u6545\u969c\u3000\u5df2\u6062\u590d\uff1a\u2705",
        "na\u00efve\u00a0caf\u00e9 \u2192 \u20ac",
        "line\n",
    ],
)
def test_other_text_is_printed_as_it_is(text: str) -> None:
    assert escape_controls(text) == text


def test_lines_of_other_systems_end_without_an_escape() -> None:
    assert escape_controls("one\r\ntwo\r\n") == "one\ntwo\n"


def test_every_unsafe_character_is_escaped() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert list(filter(is_unsafe, escape_controls(everything))) == []


@given(st.dictionaries(st.text(), st.text()))
def test_json_stays_json(value: dict[str, str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_json(value)
    assert json.loads(printed.getvalue()) == value
    assert not any(map(is_unsafe, printed.getvalue()))


def test_text_is_escaped_when_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_text(ATTACK)
    print_text(ATTACK, sys.stderr)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}\n")


def test_a_command_prints_the_output_of_a_host_escaped(tmp_path: Path) -> None:
    attack = r"printf '\033]0;owned\007\342\200\256gnp\177\n'"
    service = {
        "host": "h",
        "probe": {"command": {"run": ["sh", "-c", f"{attack}; exit 1"]}},
        "control": {"command": {"restart": ["sh", "-c", attack]}},
    }
    written = {"hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"it": service}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(written))
    for command in (["control", "it", "restart", "--direct"], ["probe", "it"]):
        for options in ([], ["--json"]):
            argv = [sys.executable, "-m", "defib", *command, "--config", str(tmp_path), *options]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert "owned" in done.stdout, done
            assert not any(map(is_unsafe, done.stdout + done.stderr)), done


def test_an_error_of_the_configuration_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('hosts: {"h\\e[31m\\u202e": {address: h}}\n')
    done = subprocess.run(
        [sys.executable, "-m", "defib", "check", "--config", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, any(map(is_unsafe, done.stderr))) == (1, False), done.stderr


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    main, other = pty.openpty()
    yield main, other
    os.close(main)
    structlog.reset_defaults()
    logging.basicConfig(handlers=[], force=True)


def test_logs_on_a_terminal_are_escaped(terminal: tuple[int, int]) -> None:
    main, other = terminal
    with os.fdopen(other, "w", errors="surrogatepass") as stream:
        logs.configure(Redactor(), stream)
        log = structlog.get_logger()
        log.warning("probe_result", message=ATTACK, problems=[ATTACK], name="\x1b]0;nospace\x07")
        log.error("failed", exc_info=ValueError(ATTACK))
        log.warning(ATTACK)
        logging.getLogger("some.library").warning("it says %s", ATTACK)
        log.warning("end-of-test")
        text = ""
        while "end-of-test" not in text:
            text += os.read(main, 65536).decode("utf-8", "surrogatepass")
    assert text.count(r"\x1b]0;owned\x07") == 5
    for unsafe in ("\x1b]", "\x1b[2K", "\x9b", "\x7f", "\u202e", "\x07", "\ud800"):
        assert unsafe not in text
