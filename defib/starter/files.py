"""The files of a first configuration."""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

import asyncssh
import bcrypt

from defib.starter.answers import ADMIN_NAME, Answers, User
from defib.starter.monitoring import DASHBOARDS, directory_of

LOCAL_CONSOLE = "http://127.0.0.1:9095"
WEB_CONFIG, PASSWORD = "web_config", "console_password"
_URLS = {
    "exporter": "http://127.0.0.1:9999", "prometheus": "http://127.0.0.1:9090",
    "alertmanager": "http://127.0.0.1:9093", "grafana": "http://127.0.0.1:3000",
}  # fmt: skip
_TOKEN_LINE = {
    False: "# The local token is in the file `token` next to the database, unless it is set here: token: ${file:…}",
    True: "token: ${file:secrets/remediator_token}        # the local token, which permits everything: commands use it",
}
BACKUPS, DATABASE = "backups", "data/remediator.db"
READ_KEY = "read_ed25519"
_KEYS = (READ_KEY, "control_ed25519")
_DATABASE_LINE = {
    False: "# database: sqlite:////var/lib/defib/remediator.db",
    True: f"database: sqlite:///{DATABASE}       # the record, and the local token beside it",
}
HEARTBEATS, PING_PORT = "data/heartbeats.db", 9998
ADMIN = User(ADMIN_NAME, "admin")
# `defib host setup` allows these keys on the hosts, and `defib discover --known-hosts` pins the keys of the hosts.
_HOST_DEFAULTS = """\
# What all hosts share; a host can override each key.
defaults:
  host:
    group: first                    # many failures in one group are a storm: no restarts
    # The keys can only run what `defib host setup` lists on the host: docs/hosts.md, A hardened host.
    ssh: {user: defib, key_file: read_ed25519, known_hosts: known_hosts, wrapper: true}
    control_ssh: {key_file: control_ed25519, wrapper: true}   # for restarts
    collect: {system: 30s}          # also: gpu, docker, systemd, supervisor
"""
_IGNORED = """\
# The configuration can be committed; secrets, keys and data cannot.
secrets/
data/
*_ed25519
"""


def render_configuration(answers: Answers) -> Mapping[str, str]:
    """Return the files of the configuration, except secrets, by name."""
    names = ("defib", "hosts", "services", "notify")
    return {**{f"{name}.yaml": _render(name, answers) for name in names}, ".gitignore": _IGNORED}


def _render(name: str, answers: Answers) -> str:
    compose = answers.mode == "compose"
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    for server, url in _URLS.items():
        text = text.replace(f"@{server}@", url.replace("127.0.0.1", server) if compose else url)
    if name == "hosts":
        text = _add_hosts(text, answers)
    if name == "notify":
        text = _add_chat(text, answers)
    return (
        text.replace("@remediator@", "http://remediator:9095" if compose else LOCAL_CONSOLE)
        .replace("@token@", _TOKEN_LINE[compose])
        .replace("@database@", _DATABASE_LINE[answers.mode == "checkout"])
        .replace("@heartbeats@", _render_heartbeats(answers))
        .replace("@links@", _render_links(answers))
        .replace("@language@", answers.language)
        .replace("@timezone@", answers.timezone)
    )


def _render_heartbeats(answers: Answers) -> str:
    """Return the settings of heartbeats: where pings are received, and stored."""
    listen = answers.ping_listen
    lines = {
        "checkout": [f"listen: {json.dumps(listen)}"] * bool(listen) + [f"database: {HEARTBEATS}"],
        "systemd": [f"listen: {json.dumps(listen)}"] if listen else [],
        # In the container; PING_LISTEN of .env is its address outside.
        "compose": [f"listen: 0.0.0.0:{PING_PORT}", f"url: http://{listen or f'127.0.0.1:{PING_PORT}'}"],
    }[answers.mode]
    if not lines:
        return (
            "# heartbeats: {listen: 10.0.0.5:9998}        # where jobs and agents report themselves: docs/heartbeats.md"
        )
    return "\n".join(
        [
            "# Where jobs and agents report themselves: docs/heartbeats.md",
            "  heartbeats:",
            *[f"    {each}" for each in lines],
        ]
    )


def _render_links(answers: Answers) -> str:
    """Return the line with the console's address, with which links in notifications begin."""
    url = answers.public_url or (LOCAL_CONSOLE if answers.mode == "compose" else "")
    setting = f"links: {{remediator: {json.dumps(url)}}}" if url else "# links: {remediator: https://…}"
    return f"{setting}   # the console's address for browsers, with which links in notifications begin"


def _add_hosts(text: str, answers: Answers) -> str:
    """Add the hosts; in a container, a shell would report the container, so that this machine is not one of them."""
    hosts = "".join(f"  {name}: {{address: {json.dumps(address)}}}\n" for name, address in answers.hosts)
    if answers.mode == "compose" or hosts:
        text = re.sub(r"^    (?=\S)", "  #   ", text.replace("  here:\n", "  # here:\n"), flags=re.MULTILINE)
    if hosts:
        return text.replace("hosts:\n", f"{_HOST_DEFAULTS}\nhosts:\n{hosts}", 1)
    if answers.mode == "compose":
        return text.replace("hosts:\n", "hosts: {}   # remove the braces when you add the first host\n", 1)
    return text


def _add_chat(text: str, answers: Answers) -> str:
    if not answers.feishu_webhook:
        return text
    secret = "\n        secret: ${file:secrets/feishu_secret}" if answers.feishu_secret else ""
    channel = f"channels:\n    oncall:\n      feishu:\n        webhook: ${{file:secrets/feishu_webhook}}{secret}"
    text = re.sub(r"(?<=  channels: \{\}\n)(  #   .*\n)+?(?=  routes)", "", text)
    return text.replace("channels: {}", channel, 1).replace("routes: []", "routes: [{channels: [oncall]}]", 1)


def create_secrets(answers: Answers) -> Mapping[str, str]:
    """Return random secrets, and those that were given, by file name."""
    texts = {name: secrets.token_urlsafe(32) for name in ("webhook_token", "metrics_token", "exporter_token")}
    passwords = {each: secrets.token_urlsafe(16) for each in (ADMIN, *answers.users)}
    for user, password in passwords.items():
        texts[PASSWORD if user is ADMIN else f"{PASSWORD}_{user.name}"] = password
    texts[WEB_CONFIG] = render_web_config(passwords)
    if answers.feishu_webhook:
        texts["feishu_webhook"] = answers.feishu_webhook
    if answers.feishu_secret:
        texts["feishu_secret"] = answers.feishu_secret
    if answers.mode == "compose":
        # Commands also run in containers that do not mount the database's folder.
        texts |= {"remediator_token": secrets.token_urlsafe(32), "grafana_password": secrets.token_urlsafe(16)}
    return texts


def create_keys() -> Iterator[tuple[str, str]]:
    """Yield the files of two SSH keys: to read hosts, and for controls."""
    for name in _KEYS:
        key = asyncssh.generate_private_key("ssh-ed25519", comment=f"defib {name.partition('_')[0]}")
        yield name, key.export_private_key().decode()
        yield f"{name}.pub", key.export_public_key().decode()


def render_web_config(passwords: Mapping[User, str]) -> str:
    """Return a web configuration with some users."""
    hashes = "".join(
        f"  {user.name}: {bcrypt.hashpw(password.encode(), bcrypt.gensalt(10)).decode()}\n"
        for user, password in passwords.items()
    )
    roles = ", ".join(f"{user.name}: {user.role}" for user in passwords)
    return f"basic_auth_users:\n{hashes}roles: {{{roles}}}\n"


def render_env(example: str, directory: Path, answers: Answers) -> str:
    """Return .env for docker compose, from its example."""
    places = {
        "CONFIG": directory, "SECRETS": directory / "secrets", "MONITORING": directory_of(directory),
        "BACKUPS": Path(BACKUPS),
    }  # fmt: skip
    values = {f"DEFIB_{name}": str(path) if path.is_absolute() else f"./{path}" for name, path in places.items()}
    values |= {"DEFIB_UID": str(os.getuid()), "DEFIB_GID": str(os.getgid())}
    values |= {"GRAFANA_DASHBOARDS": DASHBOARDS[answers.language]}
    if answers.ping_listen:
        values["PING_LISTEN"] = answers.ping_listen
    for name, value in values.items():
        example = re.sub(rf"^#?{name}=.*$", f"{name}={value}", example, flags=re.MULTILINE)
    return example
