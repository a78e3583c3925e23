"""The commands of the documentation that are not executed, with the reason, and what is checked instead."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

from defib.cli import build_parser
from fleet.inventory.heartbeats import HeartbeatSettings

ROOT = Path(__file__).parents[2]


def check_make(text: str) -> None:
    targets = re.findall(r"\bmake ([a-z-]+)", text)
    listed = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:.* ## ", listed, re.MULTILINE)] == []


def check_script(text: str) -> None:
    subprocess.run(["sh", "-n", ROOT / text.split(maxsplit=1)[0]], check=True)


def check_docker(text: str) -> None:
    """Check that docker's client has the command and its options."""
    for words in (shlex.split(line) for line in text.splitlines()):
        command = [word for word in words[1:3] if re.fullmatch("[a-z]+", word)]
        command = command if command[0] == "image" else command[:1]
        options = [word for word in words[len(command) + 1 :] if word.startswith("-")]
        assert_options(["docker", *command, "--help"], options)


def check_compose(text: str) -> None:
    """Check the options, the names of services, and the arguments of `defib` in commands of docker compose."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for line in text.splitlines():
        command, *words = shlex.split(line.removeprefix("docker compose "))
        options = [word for word in words if word.startswith("-")] if command in ("up", "run", "kill") else []
        names = words[:1] if command == "exec" else [word for word in words if word in services]
        assert names, line
        assert set(names) <= set(services), line
        assert_options(
            ["docker-compose", command, "--help"],
            [word for word in options if words.index(word) < words.index(names[0])],
        )
        if command in ("exec", "run"):
            arguments = words[words.index(names[0]) + 1 :]
            check_arguments(shlex.join(arguments[arguments[0] == "defib" :]))


def check_build(text: str) -> None:
    """Check the files that pip reads, and the arguments of the image's build."""
    for file in re.findall(r"-r (\S+)", text):
        assert (ROOT / file).is_file()
    (download,) = re.findall(r"^pip download ((?:.*\\\n)*.*)", text, re.MULTILINE)
    options = [word for word in shlex.split(download.replace("\\\n", " ")) if word.startswith("-")]
    assert_options([sys.executable, "-m", "pip", "download", "--help"], options)
    known = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [name for name in re.findall(r"--build-arg (\w+)", text) if name not in known] == []


def check_extra(text: str) -> None:
    (extra,) = re.findall(r"\[(\w+)\]", text)
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def check_module(text: str) -> None:
    assert (ROOT / text.rsplit(maxsplit=1)[-1] / "__main__.py").is_file()


def check_deadman(text: str) -> None:
    """Check the options that are written for the unit, which exists."""
    (options,) = re.findall(r"DEFIB_DEADMAN_OPTIONS=(.*) \|", text)
    check_arguments(f"deadman {options}")
    check_unit(text)


def check_unit(text: str) -> None:
    assert (ROOT / "deploy" / "systemd" / f"{text.rsplit(maxsplit=1)[-1]}.service").is_file()


def check_ports(text: str) -> None:
    """Check that the ports are those on which the programs listen by default."""
    listens = {build_parser().parse_args([name]).listen.rpartition(":")[2] for name in ("exporter", "remediator")}
    listens.add(HeartbeatSettings().listen.rpartition(":")[2])
    assert set(re.findall(r"\bport (\d+)", text)) == listens


def check_arguments(text: str) -> None:
    """Check arguments of `defib`."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            build_parser().parse_args(shlex.split(text))
        except SystemExit:
            raise AssertionError(errors.getvalue()) from None


def check_nothing(_text: str) -> None:
    """There is nothing of this project in it."""


@cache
def help_of(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def assert_options(help_: list[str], options: list[str]) -> None:
    printed = help_of(*help_)
    missing = [
        option for option in options if not re.search(rf"(?<![\w-]){re.escape(option.split('=')[0])}\b", printed)
    ]
    assert missing == [], " ".join(help_)


# By a regular expression for the command, or for the first line of a block: why it does not run, and what is checked instead.
NOT_EXECUTED: dict[str, tuple[str, Callable[[str], None]]] = {
    r"make demo( .*)?": ("tests/e2e/test_demo.py runs the demo", check_make),
    r"defib gateway": ("needs a model API; tests/integration/test_gateway.py runs it", check_nothing),
    r"curl .*:9190/.*": ("needs a model API; tests/integration/test_gateway.py requests the same", check_nothing),
    r"make (?!demo|install$).*": ("takes minutes, or runs these tests again", check_make),
    r"make install": ("needs a package index; these tests run in what it has installed", check_make),
    r"defib demo": ("tests/e2e/test_demo.py runs it", lambda text: check_arguments(text.removeprefix("defib "))),
    r"deploy/compose\.sh": ("needs dockerd and a registry of images", check_script),
    r"# On a machine with internet access:": ("needs a package index and dockerd", check_build),
    r"docker compose .*": (
        "needs dockerd and the image, which tests/e2e/test_image.py runs without compose",
        check_compose,
    ),
    r"docker (?!compose ).*": ("what is done on hosts with containers, or what a collector runs there", check_docker),
    r"(nvidia-smi|supervisorctl|systemctl (show|list-units)).*": ("what is done on hosts that have it", check_nothing),
    r"\.venv/bin/pip install .*": ("needs a package index", check_extra),
    r"python -m grafana": ("writes into the checkout; tests/unit/test_dashboards.py compares the result", check_module),
    r"systemctl edit .*": ("opens an editor", check_unit),
    r"echo DEFIB_DEADMAN_OPTIONS.*": (
        "is for another machine; tests/integration/test_dead_man.py runs the watcher",
        check_deadman,
    ),
    r"sudo cat /var/lib/defib-deadman/token|journalctl -u defib-deadman": ("is for another machine", check_nothing),
    r"ufw allow .*": ("changes the firewall, which needs more than the tests' network has", check_ports),
    r"git (pull|checkout)": ("needs the repository from which the checkout was cloned", check_nothing),
}
