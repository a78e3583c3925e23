"""Shell completion: the printed script and the tab key in a real shell."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from defib import completion
from tests.support import write
from tests.systemd import UNPACKED
from tests.terminal import Terminal

TAB, CLEAR = "\t", "\x15"


def start_shell(shell: str, folder: Path) -> Terminal:
    """Start a shell that has sourced the script of `defib completion`."""
    tools = Path(sys.executable).parent
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(folder),
        "TERM": "dumb",
        "PS1": "$ ",
        "INPUTRC": "/dev/null",
    }
    sourced = folder / "defib.sh"
    sourced.write_bytes(subprocess.run(["defib", "completion", shell], env=env, capture_output=True, check=True).stdout)
    if shell == "bash":
        terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], env, folder)
        terminal.type(f"source {shlex.quote(str(sourced))}; echo rea''dy\n")
    else:
        (folder / ".zshenv").write_text(
            f"[[ -d {UNPACKED}/usr/share/zsh ]] && module_path=({UNPACKED}/usr/lib/*/zsh/*(/N))"
            f" && fpath=({UNPACKED}/usr/share/zsh/functions/**/*(/N))\nunsetopt global_rcs\n"
        )
        terminal = Terminal(["zsh", "-i"], {**env, "ZDOTDIR": str(folder)}, folder)
        terminal.type(
            f"PS1='$ '; autoload -Uz compinit && compinit -D -u; source {shlex.quote(str(sourced))}; echo rea''dy\n"
        )
    terminal.until(r"(?m)^ready")
    return terminal


@pytest.fixture(params=["bash", pytest.param("zsh", marks=pytest.mark.needs("zsh"))])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    write(
        tmp_path / "config",
        defib="""
        hosts: {gpu-07: {address: 10.0.0.7, group: gpus}}
        services:
          transcoder: {probe: {tcp: {address: "10.0.0.7:80"}}}
          wiki: {provider: vllm, probe: {tcp: {address: "10.0.0.7:81"}}}
        notify: {channels: {oncall: {feishu: {webhook: "https://chat.example/${UNSET}"}}}}
        """,
    )
    running = start_shell(request.param, tmp_path)
    yield running
    running.close()


def test_the_tab_key_completes_commands_and_names(terminal: Terminal) -> None:
    for typed, completed in [
        ("defib mainten", "defib maintenance "),
        ("defib probe wi", "defib probe wiki "),
        ("defib --config config probe wi", "defib --config config probe wiki "),
        ("defib control trans", "defib control transcoder "),
        ("defib host setup gpu", "defib host setup gpu-07 "),
        ("defib host setup gpu-07 --group g", "defib host setup gpu-07 --group gpus "),
        ("defib discover --known-hosts gpu", "defib discover --known-hosts gpu-07 "),
        ("defib notify test on", "defib notify test oncall "),
        ("defib maintenance begin group g", "defib maintenance begin group gpus "),
        ("defib list ser", "defib list services "),
        ("defib list services --state deg", "defib list services --state degraded "),
        ("defib list services --group g", "defib list services --group gpus "),
        ("defib list services --provider v", "defib list services --provider vllm "),
        ("defib probe wiki --js", "defib probe wiki --json "),
    ]:
        terminal.type(f"{typed}{TAB}")
        terminal.until(re.escape(completed))
        terminal.type(CLEAR)


@pytest.mark.parametrize(
    "text", ["services: [\n", "services: [a, b]\n", "notify: {channels: [a]}\nhosts: {a: 1}\n", "[]"]
)
def test_a_configuration_with_errors_completes_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path, defib=text)
    options = argparse.Namespace(config=tmp_path)
    assert [completion.read_names(section, options) for section in ("services", "channels", "groups")] == [[], [], []]
    assert completion.read_names("services", argparse.Namespace(config=tmp_path / "nothing")) == []
