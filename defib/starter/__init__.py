"""`defib init`: write a first configuration, with comments, that loads as it is, and files for other servers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defib.output import print_text
from defib.starter import files, monitoring
from defib.starter.answers import Answers
from fleet.inventory.model import RemediatorSettings
from runtime import tokens
from runtime.errors import DefibError
from runtime.tokens import TokenError

_PROMETHEUS_OPTIONS = "--storage.tsdb.retention.time=100d --rules.alert.resend-delay=1m"
_PASSWORDS = {"checkout": "", "systemd": "", "compose": ", Grafana's in grafana_password"}


@dataclass(frozen=True)
class _File:
    text: str
    mode: int


def init(directory: Path, answers: Answers) -> int:
    """Write the files and print the next steps. Raises DefibError.

    Existing files are never overwritten. The local token is written next to the database if that folder exists and
    belongs to this user or root runs this; else the remediator writes it when it first starts. Secrets are random.
    With docker compose their files are readable by all, since containers run as other users, but their folder is not.
    """
    directory = Path(os.path.normpath(directory))
    if not directory.absolute().name:
        raise DefibError(f"{directory}: cannot be a configuration directory; name another one")
    written = dict(_list_files(directory, answers))
    try:
        if existing := [str(path) for path in written if path.exists()]:
            raise DefibError(f"{', '.join(existing)}: exists already; nothing was written")
        (directory / "secrets").mkdir(parents=True, exist_ok=True)
        (directory / "secrets").chmod(0o700)
        if Path(".env") in written:
            Path(files.BACKUPS).mkdir(mode=0o700, exist_ok=True)
        for path, file in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, file)
    except OSError as error:
        raise DefibError(f"{error.filename}: {error.strerror}") from error
    for folder in dict.fromkeys(path.parent for path in written):
        print_text(f"{folder}: {', '.join(path.name for path in written if path.parent == folder)}")
    if answers.mode == "systemd" and (token := RemediatorSettings().token_file) is not None and write_token(token):
        print_text(f"{token}: the local token")
    print_text("Next:")
    for command, meaning in _list_next_steps(directory, answers):
        print_text(f"  {command:<55}  {meaning}".rstrip())
    passwords = f"{directory}/secrets/{files.PASSWORD}*"
    print_text(f"Passwords of the console's users are in {passwords}{_PASSWORDS[answers.mode]}.")
    return 0


def _list_next_steps(directory: Path, answers: Answers) -> Iterator[tuple[str, str]]:
    """Yield commands with their meanings."""
    compose = answers.mode == "compose"
    option = "" if compose or directory in (Path("config"), Path("/etc/defib")) else f" --config {directory}"
    if answers.hosts:
        defib = "docker compose run --rm defib" if compose else "defib"
        yield f"{defib} discover --known-hosts --all{option}", "pins the keys of the hosts"
        yield f"{defib} host setup --all --apply USER{option}", "prepares them, as USER who may use sudo"
        yield f"{defib} discover --all --as USER{option}", "finds what runs there; then run host setup again"
    if compose:
        yield "docker compose up --detach", "starts everything"
        return
    yield f"defib check{option}", "validates the configuration"
    others = monitoring.directory_of(directory).absolute()
    if answers.mode == "systemd":
        yield f"ls {others}", "for Prometheus, Alertmanager, Grafana: docs/getting-started.md"
        return
    yield f"defib exporter{option} --listen 127.0.0.1:9999", "probes, and serves metrics"
    web_config = f"{directory}/secrets/{files.WEB_CONFIG}"
    yield f"defib remediator{option} --web.config.file {web_config}", f"acts on alerts: {directory}/{files.DATABASE}"
    if answers.has_watcher:
        folder = f"{directory}/data/deadman"
        watcher = f"defib deadman{option} --listen {monitoring.WATCHER} --pings-optional --directory {folder}"
        yield watcher, "notifies the channels of problems of Defib itself"
    storage = f"--storage.tsdb.path={others}/data-prometheus"
    yield f"prometheus --config.file={others}/prometheus.yml {storage} {_PROMETHEUS_OPTIONS}", ""
    yield f"alertmanager --config.file={others}/alertmanager.yml --storage.path={others}/data-alertmanager", ""
    yield f"defib doctor{option}", "says what is missing, and how to fix it"


def _list_files(directory: Path, answers: Answers) -> Iterator[tuple[Path, _File]]:
    """Yield all files with their paths."""
    for name, text in files.render_configuration(answers).items():
        yield directory / name, _File(text, 0o644)
    for name, text in files.create_secrets(answers).items():
        yield directory / "secrets" / name, _File(text, 0o644 if answers.mode == "compose" else 0o600)
    for name, text in files.create_keys() if answers.hosts else ():
        # With docker compose, the exporter is another user of the same group.
        private = 0o640 if name == files.READ_KEY and answers.mode == "compose" else 0o600
        yield directory / name, _File(text, 0o644 if name.endswith(".pub") else private)
    for name, text in monitoring.render(directory, answers).items():
        has_secret = answers.fallback_webhook != "" and answers.fallback_webhook in text
        is_own = answers.mode == "checkout"  # else the servers run as other users
        yield monitoring.directory_of(directory) / name, _File(text, 0o600 if has_secret and is_own else 0o644)
    if answers.mode == "compose" and (example := Path(".env.example")).is_file() and not Path(".env").exists():
        yield Path(".env"), _File(files.render_env(example.read_text(encoding="utf-8"), directory, answers), 0o600)


def _write(path: Path, file: _File) -> None:
    with os.fdopen(
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, file.mode), "w", encoding="utf-8"
    ) as opened:
        os.fchmod(opened.fileno(), file.mode)  # despite the umask
        opened.write(file.text)


def write_token(path: Path) -> bool:
    """Write a random local token, owned by the owner of its folder; return whether it was written.

    Nothing is written if the file or no such folder exists, or if the folder belongs to another user.
    """
    try:
        owner = path.parent.stat()
    except OSError:
        return False
    as_root = os.geteuid() == 0
    if not as_root and os.geteuid() != owner.st_uid:
        return False
    try:
        return tokens.create_token_file(path, (owner.st_uid, owner.st_gid) if as_root else None)
    except TokenError:
        return False  # for example on a read-only disk: the remediator reports it
