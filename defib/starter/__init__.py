"""`defib init`: a first configuration, with comments, that is whole as it stands."""

import os
import re
import secrets
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import bcrypt

from fleet.inventory.model import RemediatorSettings
from runtime import tokens
from runtime.errors import DefibError
from runtime.tokens import TokenError

_HERE = {
    "exporter": "http://127.0.0.1:9999", "prometheus": "http://127.0.0.1:9090",
    "alertmanager": "http://127.0.0.1:9093", "grafana": "http://127.0.0.1:3000",
}  # fmt: skip
_TOKEN = {
    False: "# The API token is in the file `token` beside the record, unless there is one here: token: ${file:…}",
    True: "token: ${file:secrets/remediator_token}        # the API token: commands send it, changes need it",
}
USER = "admin"


def init(directory: Path, *, compose: bool) -> int:
    """Write the files, for this machine or for docker-compose.yml, and say what comes next. Raises DefibError.

    What is there already is never written over. The API token is written beside the record if that folder is there and
    is ours, else by the remediator at its first start. Secrets are random; for containers, whose users are not ours,
    their files may be read by all, but their folder by its owner alone.
    """
    texts = {f"{name}.yaml": _text(name, compose=compose) for name in ("defib", "hosts", "services", "notify")}
    texts |= {f"secrets/{name}": text for name, text in _secrets(compose=compose).items()}
    try:
        there = [str(directory / name) for name in texts if (directory / name).exists()]
        if there:
            raise DefibError(f"{', '.join(there)}: there already; nothing was written")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "secrets").mkdir(exist_ok=True)
        (directory / "secrets").chmod(0o700)
        for name, text in texts.items():
            secret = name.startswith("secrets/")
            _write(directory / name, text, 0o600 if secret and not compose else 0o644)
    except OSError as error:
        raise DefibError(f"{error.filename}: {error.strerror}") from error
    print(f"{directory}: {', '.join(texts)}")
    if not compose and (token := RemediatorSettings().token_file) is not None and write_token(token):
        print(f"{token}: the API token")
    print(_NEXT[compose].format(directory=directory))
    return 0


def _text(name: str, *, compose: bool) -> str:
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    for server, url in _HERE.items():
        text = text.replace(f"@{server}@", url.replace("127.0.0.1", server) if compose else url)
    url = "http://remediator:9095" if compose else "http://127.0.0.1:9095"
    if compose and name == "hosts":
        # A container's shell would read the container; node-exporter reads this machine.
        text = text.replace("  here:\n", "  # here:\n").replace(
            "hosts:\n", "hosts: {}   # the braces go when the first host comes\n", 1
        )
        text = re.sub(r"^    (?=\S)", "  #   ", text, flags=re.MULTILINE)
    return text.replace("@remediator@", url).replace("@token@", _TOKEN[compose])


def _secrets(*, compose: bool) -> Mapping[str, str]:
    """Random secrets by the names of their files."""
    made = {name: secrets.token_urlsafe(32) for name in ("webhook_token", "exporter_token")}
    if compose:
        # Commands run in other containers too, where the record's folder is not mounted.
        made["remediator_token"] = secrets.token_urlsafe(32)
        password = secrets.token_urlsafe(16)
        hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(10)).decode()
        made |= {
            "console_password": password,
            "web_config": f"basic_auth_users:\n  {USER}: {hashed}\n",
            "grafana_password": secrets.token_urlsafe(16),
        }
    return made


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "w", encoding="utf-8"
    ) as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask is
        file.write(text)


def write_token(path: Path) -> bool:
    """Write an API token for the owner of a folder, if the folder is there, ours or root's to write, and has none."""
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
        return False  # such as a disk that is mounted read-only: the remediator will say so


_NEXT = {
    False: """\
next:
  defib check --config {directory}        says what is wrong with it
  defib doctor --config {directory}       says what is missing around it
  defib exporter --config {directory}     serves metrics; defib remediator acts on alerts
Prometheus and Alertmanager send the token in {directory}/secrets/webhook_token.
Commands that ask the remediator send the API token, in the file `token` beside the record: run them as its owner.""",
    True: """\
next:
  docker compose up --detach               starts everything that .env is right for (.env.example)
The console's password for "admin" is in {directory}/secrets/console_password, Grafana's in grafana_password.""",
}
