"""`defib init`: write a first configuration, with comments, that loads as it is."""

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import bcrypt

from defib.output import print_text
from fleet.inventory.endpoints import check_url
from fleet.inventory.model import RemediatorSettings
from runtime import tokens
from runtime.errors import DefibError
from runtime.tokens import TokenError

_URLS = {
    "exporter": "http://127.0.0.1:9999", "prometheus": "http://127.0.0.1:9090",
    "alertmanager": "http://127.0.0.1:9093", "grafana": "http://127.0.0.1:3000",
}  # fmt: skip
_TOKEN_LINE = {
    False: "# The local token is in the file `token` next to the database, unless it is set here: token: ${file:…}",
    True: "token: ${file:secrets/remediator_token}        # the local token, which permits everything: commands use it",
}
USER = "admin"
_LOCAL_CONSOLE = "http://127.0.0.1:9095"
_QUESTION = f"The console's address for browsers, such as https://defib.example (empty: {_LOCAL_CONSOLE}): "


def init(directory: Path, public_url: str | None, *, compose: bool) -> int:
    """Write the files for this machine, or for docker-compose.yml, and print the next steps. Raises DefibError.

    `public_url` is the console's address for browsers; a person at a terminal is asked for it if it is None.
    Existing files are never overwritten. The local token is written next to the database if that folder exists and
    belongs to this user or root runs this; else the remediator writes it when it first starts. Secrets are random.
    With `compose` their files are readable by all, since containers run as other users, but their folder is not.
    """
    if public_url is None and sys.stdin.isatty():
        public_url = input(_QUESTION)
    links = _render_links((public_url or "").strip(), compose=compose)
    texts = {f"{name}.yaml": _render(name, links, compose=compose) for name in ("defib", "hosts", "services", "notify")}
    texts |= {f"secrets/{name}": text for name, text in _create_secrets(compose=compose).items()}
    try:
        existing = [str(directory / name) for name in texts if (directory / name).exists()]
        if existing:
            raise DefibError(f"{', '.join(existing)}: exists already; nothing was written")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "secrets").mkdir(exist_ok=True)
        (directory / "secrets").chmod(0o700)
        for name, text in texts.items():
            secret = name.startswith("secrets/")
            _write(directory / name, text, 0o600 if secret and not compose else 0o644)
    except OSError as error:
        raise DefibError(f"{error.filename}: {error.strerror}") from error
    print_text(f"{directory}: {', '.join(texts)}")
    if not compose and (token := RemediatorSettings().token_file) is not None and write_token(token):
        print_text(f"{token}: the local token")
    print_text(_NEXT_STEPS[compose].format(directory=directory))
    return 0


def _render_links(public_url: str, *, compose: bool) -> str:
    """Return the line with the console's address, with which links in notifications begin. Raises DefibError."""
    if not public_url:
        setting = f"links: {{remediator: {_LOCAL_CONSOLE}}}" if compose else "# links: {remediator: https://…}"
    else:
        try:
            check_url(public_url)
        except ValueError as error:
            raise DefibError(f"argument --public-url: {error}") from error
        setting = f"links: {{remediator: {json.dumps(public_url)}}}"
    return f"{setting}   # the console's address for browsers, with which links in notifications begin"


def _render(name: str, links: str, *, compose: bool) -> str:
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    for server, url in _URLS.items():
        text = text.replace(f"@{server}@", url.replace("127.0.0.1", server) if compose else url)
    url = "http://remediator:9095" if compose else _LOCAL_CONSOLE
    if compose and name == "hosts":
        # A shell in a container would report the container; node-exporter reports this machine.
        text = text.replace("  here:\n", "  # here:\n").replace(
            "hosts:\n", "hosts: {}   # remove the braces when you add the first host\n", 1
        )
        text = re.sub(r"^    (?=\S)", "  #   ", text, flags=re.MULTILINE)
    return text.replace("@remediator@", url).replace("@token@", _TOKEN_LINE[compose]).replace("@links@", links)


def _create_secrets(*, compose: bool) -> Mapping[str, str]:
    """Return random secrets by file name."""
    texts = {name: secrets.token_urlsafe(32) for name in ("webhook_token", "metrics_token", "exporter_token")}
    password = secrets.token_urlsafe(16)
    texts |= {"console_password": password, "web_config": render_web_config(password)}
    if compose:
        # Commands also run in containers that do not mount the database's folder.
        texts |= {"remediator_token": secrets.token_urlsafe(32), "grafana_password": secrets.token_urlsafe(16)}
    return texts


def render_web_config(password: str) -> str:
    """Return a web configuration with one user, `admin`, who may do everything."""
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(10)).decode()
    return f"basic_auth_users:\n  {USER}: {hashed}\nroles: {{{USER}: admin}}\n"


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "w", encoding="utf-8"
    ) as file:
        os.fchmod(file.fileno(), mode)  # despite the umask
        file.write(text)


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


_NEXT_STEPS = {
    False: """\
Next:
  defib check --config {directory}        validates it
  defib doctor --config {directory}       checks the rest of the installation
  defib exporter --config {directory} --listen 127.0.0.1:9999     serves metrics, here on this machine only
  defib remediator --config {directory} --web.config.file {directory}/secrets/web_config
                                         acts on alerts; its record is remediator.database in defib.yaml
The console's password for "admin" is in {directory}/secrets/console_password.
Prometheus needs the token in {directory}/secrets/metrics_token, Alertmanager that in webhook_token.
Commands that use the remediator need the local token, the file `token` next to the database; run them as its owner.""",
    True: """\
Next:
  docker compose up --detach               starts everything, once .env is complete (see .env.example)
The console's password for "admin" is in {directory}/secrets/console_password, Grafana's in grafana_password.""",
}
