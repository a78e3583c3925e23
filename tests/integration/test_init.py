"""`defib init`: the first configuration, and the files for other servers."""

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml

from tests.forked_defib import run_defib
from tests.support import loaded

OPTIONS = [
    "--no-input", "--language", "en", "--timezone", "Europe/Berlin", "--public-url", "https://defib.example",
    "--host", "gpu-[01-03]=10.0.0.{n}", "--host", "web=10.0.1.1", "--user", "ann", "--user", "bob=viewer",
    "--fallback-mail", "ops@example.org", "--smtp", "mail.example:25",
]  # fmt: skip


def defib(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_defib(*arguments, cwd=cwd)


@pytest.mark.parametrize("more", [[], ["--compose"]])
def test_init_writes_a_valid_configuration_with_private_secrets(tmp_path: Path, more: list[str]) -> None:
    folder = tmp_path / "config"
    made = defib("init", str(folder), *more)
    assert made.returncode == 0, made.stderr
    checked = defib("check", "--config", str(folder))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert stat.S_IMODE((folder / "secrets").stat().st_mode) == 0o700
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder / "secrets").iterdir()}
    assert modes == ({0o644} if more else {0o600})
    tokens = {path.read_text() for path in (folder / "secrets").iterdir()}
    assert len(tokens) == len(list((folder / "secrets").iterdir()))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = defib("init", str(folder), *more)
    assert (again.returncode, "exists already; nothing was written" in again.stderr) == (1, True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    every = [line for path in folder.glob("*.yaml") for line in path.read_text().splitlines()]
    assert not any("@" in line for line in every)


def test_init_writes_the_console_s_address_for_browsers(tmp_path: Path) -> None:
    url = "https://defib.example/ops"
    assert defib("init", str(tmp_path / "a"), "--compose", "--public-url", url).returncode == 0
    assert loaded(tmp_path / "a").inventory.notify.links.remediator == url
    wrong = defib("init", str(tmp_path / "b"), "--public-url", "ftp://x")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "defib: argument --public-url: is not a URL; write http://host:port/path\n",
    )
    assert not (tmp_path / "b").exists()


def test_init_for_compose_has_no_local_host(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    assert defib("init", str(tmp_path), "--compose").returncode == 0
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert not loaded(tmp_path).inventory.hosts


def test_init_in_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = defib("init", str(tmp_path / "file" / "config"))
    assert (done.returncode, "Not a directory" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_options_become_files(tmp_path: Path) -> None:
    for name, text in (("hook", "https://open.feishu.example/hook/s3cret-hook"), ("secret", "s3cret-of-the-bot")):
        (tmp_path / name).write_text(text)
    folder = tmp_path / "config"
    chat = ["--feishu-webhook", str(tmp_path / "hook"), "--feishu-secret", str(tmp_path / "secret")]
    made = defib("init", str(folder), *OPTIONS, *chat)
    assert made.returncode == 0, made
    assert "s3cret" not in made.stdout + made.stderr
    assert "s3cret" not in "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    checked = defib("check", "--config", str(folder))
    assert (checked.returncode, checked.stderr) == (0, "")
    inventory = loaded(folder).inventory
    assert (inventory.notify.language, inventory.notify.timezone) == ("en", "Europe/Berlin")
    assert inventory.notify.routes[0].channels == ["oncall"]
    assert {name: host.address for name, host in inventory.hosts.items() if host.shell == "ssh"} == {
        "gpu-01": "10.0.0.1", "gpu-02": "10.0.0.2", "gpu-03": "10.0.0.3", "web": "10.0.1.1",
    }  # fmt: skip
    for name in ("read_ed25519", "control_ed25519"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert (folder / f"{name}.pub").read_text().startswith("ssh-ed25519 ")
    users = yaml.safe_load((folder / "secrets" / "web_config").read_text())
    assert users["roles"] == {"admin": "admin", "ann": "operator", "bob": "viewer"}
    password = (folder / "secrets" / "console_password_bob").read_bytes()
    assert bcrypt.checkpw(password, users["basic_auth_users"]["bob"].encode())
    ignored = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=git(folder), capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert not [name for name in ("secrets/", "_ed25519\n") if name in ignored]
    assert "defib.yaml" in ignored


def git(folder: Path) -> Path:
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def test_the_webhook_for_problems_of_defib_itself_is_no_argument(tmp_path: Path) -> None:
    url = "https://chat.example/hook/s3cret-of-the-hook"
    (tmp_path / "hook").write_text(url)
    done = defib("init", "config", "--no-input", "--checkout", "--fallback-webhook", "hook", cwd=tmp_path)
    assert (done.returncode, url in done.stdout + done.stderr) == (0, False)
    written = tmp_path / "config-monitoring" / "alertmanager.yml"
    receivers = {each["name"]: each for each in yaml.safe_load(written.read_text())["receivers"]}
    assert receivers["fallback"]["webhook_configs"][0]["url"] == url
    assert written.stat().st_mode & 0o777 == 0o600


@pytest.mark.needs("prometheus-alertmanager")
@pytest.mark.parametrize(
    ("mode", "url", "folder"),
    [
        ("checkout", "http://127.0.0.1:9192/alerts", "{}/config/secrets"),
        ("systemd", "http://127.0.0.1:9192/alerts", "/etc/prometheus/secrets"),
        ("compose", "http://deadman:9192/alerts", "secrets"),
    ],
)
def test_the_watcher_is_notified_of_problems_of_defib_itself(tmp_path: Path, mode: str, url: str, folder: str) -> None:
    """And receivers that are given replace it."""
    made = defib("init", "config", "--no-input", f"--{mode}", cwd=tmp_path)
    assert made.returncode == 0
    path = tmp_path / "config-monitoring" / "alertmanager.yml"
    receivers = {each["name"]: each for each in yaml.safe_load(path.read_text())["receivers"]}
    (hook,) = receivers["fallback"]["webhook_configs"]
    assert (hook["url"], hook["send_resolved"]) == (url, True)
    token = f"{folder.format(tmp_path)}/webhook_token"
    assert hook["http_config"]["authorization"]["credentials_file"] == token
    subprocess.run(["amtool", "check-config", path], check=True, capture_output=True)
    assert ("defib deadman" in made.stdout) == (mode == "checkout")
    mail = ["--fallback-mail", "ops@example.org", "--smtp", "mail.example:25"]
    other = defib("init", "other", "--no-input", f"--{mode}", *mail, cwd=tmp_path)
    assert "deadman" not in other.stdout + (tmp_path / "other-monitoring" / "alertmanager.yml").read_text()


@pytest.mark.needs("prometheus", "prometheus-alertmanager")
@pytest.mark.parametrize("mode", ["checkout", "systemd", "compose"])
def test_prometheus_and_alertmanager_have_real_addresses(tmp_path: Path, mode: str) -> None:
    """And the rules of this version, tokens where they can read them, and a receiver for problems of Defib itself."""
    assert defib("init", "config", *OPTIONS, f"--{mode}", cwd=tmp_path).returncode == 0
    made = tmp_path / "config-monitoring"
    prometheus, alertmanager = (
        yaml.safe_load((made / f"{name}.yml").read_text()) for name in ("prometheus", "alertmanager")
    )
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in prometheus["scrape_configs"]}
    receivers = {each["name"]: each for each in alertmanager["receivers"]}
    assert receivers["fallback"]["email_configs"][0]["to"] == "ops@example.org"
    webhook = receivers["defib"]["webhook_configs"][0]
    if mode == "compose":
        assert (targets["defib-exporter"], webhook["url"]) == (
            ["exporter:9999"],
            "http://remediator:9095/webhook/alertmanager",
        )
    else:
        assert (targets["defib-exporter"], webhook["url"]) == (
            ["127.0.0.1:9999"],
            "http://127.0.0.1:9095/webhook/alertmanager",
        )
        sources = yaml.safe_load((made / "grafana-datasources.yaml").read_text())["datasources"]
        assert [each["url"] for each in sources] == ["http://127.0.0.1:9090", "http://127.0.0.1:9093"]
    subprocess.run(["amtool", "check-config", made / "alertmanager.yml"], check=True, capture_output=True)
    options = ["check", "config", *(["--syntax-only"] if mode != "checkout" else [])]
    done = subprocess.run(["promtool", *options, made / "prometheus.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    if mode == "checkout":  # with the token's file, and all rules
        assert "rules found" in done.stdout


@pytest.mark.parametrize(
    ("language", "folder", "title"), [("en", "dashboards", "Fleet"), ("zh", "dashboards-zh", "总览")]
)
def test_grafana_loads_the_dashboards_of_the_language(tmp_path: Path, language: str, folder: str, title: str) -> None:
    for mode in ("checkout", "systemd"):
        assert defib("init", mode, f"--{mode}", "--no-input", "--language", language, cwd=tmp_path).returncode == 0
        written = yaml.safe_load((tmp_path / f"{mode}-monitoring" / "grafana-dashboards.yaml").read_text())
        path = Path(written["providers"][0]["options"]["path"])
        assert path.parts[-2:] == ("grafana", folder)
        if mode == "checkout":
            assert json.loads((path / "fleet.json").read_text())["title"] == title


def test_compose_gets_its_settings(tmp_path: Path) -> None:
    (tmp_path / ".env.example").write_bytes((Path(__file__).parents[2] / ".env.example").read_bytes())
    assert defib("init", "--compose", "config", cwd=tmp_path).returncode == 0
    lines = (tmp_path / ".env").read_text().splitlines()
    assert {f"DEFIB_UID={os.getuid()}", f"DEFIB_GID={os.getgid()}", "DEFIB_BACKUPS=./backups"} <= set(lines)
    assert "GRAFANA_DASHBOARDS=dashboards-zh" in lines
    assert {"DEFIB_CONFIG=./config", "DEFIB_SECRETS=./config/secrets", "DEFIB_MONITORING=./config-monitoring"} <= set(
        lines
    )
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700
    again = defib("init", "--compose", "other", cwd=tmp_path)
    assert again.returncode == 0  # .env is left as it is
    assert (tmp_path / ".env").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("mode", "listen", "base_url"),
    [
        ("checkout", "", "http://127.0.0.1:9998"),
        ("checkout", "[fd00::5]:9998", "http://[fd00::5]:9998"),
        ("systemd", "", "http://127.0.0.1:9998"),
        ("systemd", "10.0.0.5:9000", "http://10.0.0.5:9000"),
        ("compose", "", "http://127.0.0.1:9998"),
        ("compose", "10.0.0.5:9000", "http://10.0.0.5:9000"),
    ],
)
def test_where_pings_are_received_and_stored(tmp_path: Path, mode: str, listen: str, base_url: str) -> None:
    (tmp_path / ".env.example").write_bytes((Path(__file__).parents[2] / ".env.example").read_bytes())
    options = ["--ping-listen", listen] if listen else []
    assert defib("init", f"--{mode}", *options, "config", cwd=tmp_path).returncode == 0
    settings = loaded(tmp_path / "config").inventory.exporter.heartbeats
    assert settings.base_url == base_url
    if mode == "checkout":
        assert settings.database == tmp_path / "config" / "data" / "heartbeats.db"
    if mode == "compose":
        lines = (tmp_path / ".env").read_text().splitlines()
        assert settings.listen == "0.0.0.0:9998"
        assert (f"PING_LISTEN={listen}" if listen else "#PING_LISTEN=127.0.0.1:9998") in lines


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--host", "GPU=10.0.0.1"], "argument --host: 'GPU=10.0.0.1' is not a host; write gpu-01=10.0.0.11, or 'gpu-[01-20]=10.0.0.{n}'"),
        (["--host", "a"], "argument --host: 'a' is not a host; write gpu-01=10.0.0.11, or 'gpu-[01-20]=10.0.0.{n}'"),
        (["--host", "a=1.1.1.1", "--host", "a=1.1.1.2"], "argument --host: a is given twice"),
        (["--host", "a=x\nservices: {}"], "argument --host: 'services:' is not a host; write gpu-01=10.0.0.11, or 'gpu-[01-20]=10.0.0.{n}'"),
        (["--host", "a=10.0.0.300"], "argument --host: '10.0.0.300' does not appear to be an IPv4 or IPv6 address"),
        (["--host", "a-[20-01]=10.0.0.{n}"], "argument --host: 'a-[20-01]': the range must begin before it ends, and have at most 10000 hosts"),
        (["--host", "a-[01-20]=10.0.0.{m}"], "argument --host: '10.0.0.{m}' is the same for all hosts; write the number of a host as {n}"),
        (["--host", "here=10.0.0.1"], "argument --host: 'here' is the name of this machine; choose another one"),
        (["--user", "admin=viewer"], "argument --user: 'admin' exists in any case, with the role admin"),
        (["--public-url", "https://u:p@h/"], "argument --public-url: must not contain credentials"),
        (["--ping-listen", ":9998"], "argument --ping-listen: ':9998' is not an address that jobs can reach; write 10.0.0.5:9998 or [v6]:9998"),
        (["--ping-listen", "0.0.0.0:9998"], "argument --ping-listen: '0.0.0.0:9998' is not an address that jobs can reach; write 10.0.0.5:9998 or [v6]:9998"),
        (["--ping-listen", "10.0.0.5"], "argument --ping-listen: '10.0.0.5' is not an address to listen on; write 127.0.0.1:9998, [v6]:9998 or :9998"),
        (["--user", "ann=root"], "argument --user: 'ann=root' is not a user; write ann, or ann=admin (roles: viewer, operator, admin)"),
        (["--language", "de"], "argument --language: write zh or en"),
        (["--timezone", "Mars/Base"], "argument --timezone: 'Mars/Base' is not a time zone; write Asia/Shanghai"),
        (["--fallback-mail", "a@b.c"], "argument --fallback-mail: needs --smtp HOST:PORT, and the other way round"),
        (["--smtp", "mail", "--fallback-mail", "a@b.c"], "argument --smtp: 'mail' is not an address; write host:port or [v6]:port"),
        (["--feishu-webhook", "/nowhere/hook"], "argument --feishu-webhook: cannot read the secret file /nowhere/hook: No such file or directory"),
    ],
)  # fmt: skip
def test_options_that_are_not_valid(tmp_path: Path, options: list[str], problem: str) -> None:
    done = defib("init", str(tmp_path / "config"), *options)
    assert (done.returncode, done.stderr) == (1, f"defib: {problem}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_person_at_a_terminal_is_asked(tmp_path: Path) -> None:
    """What is not valid is asked again; secrets are not shown."""
    answers = [
        "nonsense", "checkout", "https://defib.example", "10.0.0.5:9998", "en", "", "gpu-01=10.0.0.1 gpu-02", "gpu-01=10.0.0.1 gpu-02=10.0.0.2",
        "ann", "https://open.feishu.example/hook/s3cret-hook", "s3cret-of-the-bot", "",
    ]  # fmt: skip
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "defib", "init", str(tmp_path / "config")]
    process = subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    shown = ""
    for answer in answers:
        shown += until_question(leader)
        os.write(leader, f"{answer}\n".encode())
    shown += read_all(leader)
    assert process.wait(60) == 0, shown
    inventory = loaded(tmp_path / "config").inventory
    assert sorted(inventory.hosts) == ["gpu-01", "gpu-02"]
    assert (inventory.notify.links.remediator, inventory.notify.timezone) == ("https://defib.example", "Asia/Shanghai")
    assert inventory.exporter.heartbeats.base_url == "http://10.0.0.5:9998"
    assert "write checkout, systemd or compose" in shown
    assert "'gpu-02' is not a host" in shown
    assert "s3cret" not in shown


def until_question(terminal: int) -> str:
    """Read a terminal until a program waits for an answer."""
    shown = ""
    while not shown.endswith(": "):
        shown += os.read(terminal, 1000).decode()
    return shown


def read_all(terminal: int) -> str:
    shown = ""
    try:
        while part := os.read(terminal, 1000):
            shown += part.decode()
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    return shown


def test_the_directory_itself_and_an_end_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    made = defib("init", ".", "--no-input", cwd=tmp_path / "here")
    assert made.returncode == 0, made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here-monitoring"]
    (tmp_path / "hook").write_text("nonsense")
    wrong = defib("init", str(tmp_path / "b"), "--feishu-webhook", str(tmp_path / "hook"))
    assert (wrong.returncode, wrong.stderr) == (
        1, "defib: argument --feishu-webhook: is not a URL; write http://host:port/path\n",
    )  # fmt: skip
    leader, follower = pty.openpty()
    argv = [sys.executable, "-m", "defib", "init", str(tmp_path / "c")]
    process = subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    until_question(leader)
    os.write(leader, b"\x04")
    shown = read_all(leader)
    assert (process.wait(60), "no answer; nothing was written" in shown, "Traceback" in shown) == (1, True, False), (
        shown
    )
    assert not (tmp_path / "c").exists()


def test_the_first_hosts_of_compose(tmp_path: Path) -> None:
    assert defib("init", str(tmp_path / "config"), "--compose", "--host", "a=10.0.0.1").returncode == 0
    hosts: dict[str, Any] = dict(loaded(tmp_path / "config").inventory.hosts)
    assert list(hosts) == ["a"]
