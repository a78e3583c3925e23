"""The image, built on a base of debootstrap's where no registry is reached, and run as docker-compose.yml runs it."""

import contextlib
import functools
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from defib.demo.stack import reserve_ports

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "defib-test-base", "defib-test"
OWNER, EXPORTER = 12345, 23456
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
pytestmark = [
    pytest.mark.long,
    pytest.mark.needs("dockerd", "debootstrap"),
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("docker"),
]


def run(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, **more)


def well(*argv: str, **more: Any) -> str:
    done = run(*argv, **more)
    assert done.returncode == 0, f"{argv}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def base(docker: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian with Python, as an image."""
    folder = tmp_path_factory.mktemp("base")
    packages = "--include=python3,python3-venv,ca-certificates"
    well("debootstrap", "--variant=minbase", packages, "bookworm", str(folder / "root"))
    well("sh", "-c", 'tar -C "$0" -c . | docker import - "$1"', str(folder / "root"), BASE)
    return BASE


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a folder of all wheels that the image needs, as a site without an index keeps them."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    locks = [
        word for name in ("", "-grpc", "-build") for word in ("--requirement", str(ROOT / f"requirements{name}.lock"))
    ]
    well(*pip, "--require-hashes", "--only-binary", ":all:", *locks)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def image(base: str, wheels: str) -> str:
    arguments = {"BASE_IMAGE": base, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "EXTRAS": "grpc", "PACKAGES": ""}
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    well("docker", "build", "--quiet", "--network", "host", *given, "--tag", IMAGE, str(ROOT))
    return IMAGE


@contextlib.contextmanager
def container(service: str, config: Path, *more: str) -> Iterator[str]:
    """Run a service of docker-compose.yml with all that it asks for there; but on the host's network, as another user."""
    asked = COMPOSE["services"][service]
    assert asked["read_only"]
    assert asked["cap_drop"] == ["ALL"]
    user = EXPORTER if service == "exporter" else OWNER
    options = [
        "--read-only",
        "--cap-drop",
        "ALL",
        "--init",
        "--memory",
        asked["mem_limit"],
        "--user",
        f"{user}:{OWNER}",
    ]
    options += ["--pids-limit", str(asked["pids_limit"]), "--ulimit", f"core={asked['ulimits']['core']}"]
    options += [word for each in asked["security_opt"] for word in ("--security-opt", each)]
    tmpfs = [each.replace("${DEFIB_EXPORTER_UID}", str(EXPORTER)) for each in asked["tmpfs"]]
    options += [word for each in tmpfs for word in ("--tmpfs", each)]
    name = f"defib-test-{service}"
    state = "/var/lib/defib-deadman" if service == "deadman" else "/var/lib/defib"
    mounts = ["--volume", f"{config}:/etc/defib:ro", "--volume", f"{name}:{state}"]
    for secret in asked.get("secrets", []):
        mounts += ["--volume", f"{config}/secrets/{secret['source']}:{secret['target']}:ro"]
    well("docker", "run", "--detach", "--name", name, "--network", "host", *options, *mounts, IMAGE, *more)
    try:
        yield name
    finally:
        run("docker", "rm", "--force", "--volumes", name)


def answer(url: str, name: str, **more: Any) -> httpx.Response:
    """What a page answers once it does."""
    ends = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, timeout=2, trust_env=False, **more)
        assert time.monotonic() < ends, run("docker", "logs", name).stderr[-3000:]
        time.sleep(0.2)


def test_the_image_is_built_and_runs_as_compose_runs_it(image: str, tmp_path: Path) -> None:
    config = tmp_path / "config"
    work = ["--volume", f"{tmp_path}:/work", "--workdir", "/work", "--user", f"{OWNER}:{OWNER}"]
    tmp_path.chmod(0o777)
    for above in list(tmp_path.parents)[:2]:
        above.chmod(0o755)
    well("docker", "run", "--rm", "--network", "host", *work, image, "init", "--compose", "config")
    well("docker", "run", "--rm", "--network", "host", *work, image, "check")
    assert {(config / "secrets" / name).stat().st_uid for name in ("webhook_token", "web_config")} == {OWNER}
    exporter_port, remediator_port, watcher_port = reserve_ports(3)
    for path in config.glob("*.yaml"):
        text = path.read_text().replace("http://exporter:9999", f"http://127.0.0.1:{exporter_port}")
        path.write_text(text.replace("http://remediator:9095", f"http://127.0.0.1:{remediator_port}"))
    with container("exporter", config, "exporter", "--listen", f"127.0.0.1:{exporter_port}") as name:
        page = answer(f"http://127.0.0.1:{exporter_port}/metrics", name)
        assert 'service_info{service="prometheus"' in page.text
        web = ["--web.config.file", "/etc/defib/secrets/web_config", "--listen", f"127.0.0.1:{remediator_port}"]
        with container("remediator", config, "remediator", *web) as other:
            console = f"http://127.0.0.1:{remediator_port}/"
            assert answer(console, other).status_code == 401
            password = (config / "secrets" / "console_password").read_text()
            assert answer(console, other, auth=("admin", password)).status_code == 200
            token = (config / "secrets" / "metrics_token").read_text()
            headers = {"Authorization": f"Bearer {token}"}
            assert "defib_remediator" in answer(f"{console}metrics", other, headers=headers).text
            assert "automation is off" in well("docker", "exec", other, "defib", "automation", "off")
            assert "no errors" in well("docker", "exec", other, "defib", "check")
            # The exporter's user can read the secrets that it needs, and no others.
            assert "no errors" in well("docker", "exec", name, "defib", "check", "--for", "exporter")
            assert well("docker", "exec", name, "ls", "/etc/defib/secrets") == "exporter_token\nmetrics_token"
            assert run("docker", "exec", name, "defib", "automation", "off").returncode == 1
            assert password not in well("docker", "logs", other)
            well("docker", "stop", "--time", "30", other)
            assert well("docker", "inspect", "--format", "{{.State.ExitCode}}", other) == "0"
            backup = ["--volumes-from", other, *work, image, "backup", "--config", "/work/config", "/work/kept.db"]
            assert "0 incidents" in well("docker", "run", "--rm", *backup)
        command = COMPOSE["services"]["deadman"]["command"]
        with container("deadman", config, *command, "--listen", f"127.0.0.1:{watcher_port}") as watcher:
            watcher_url = f"http://127.0.0.1:{watcher_port}"
            assert answer(f"{watcher_url}/-/healthy", watcher).text == "healthy\n"
            token = (config / "secrets" / "webhook_token").read_text()
            posted = httpx.post(f"{watcher_url}/alerts", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
            assert posted.status_code == 400  # the token is accepted
            kept = "/var/lib/defib-deadman/token"
            assert well("docker", "exec", watcher, "stat", "--format", "%u %a", kept) == f"{OWNER} 600"
        well("docker", "exec", name, *COMPOSE["services"]["exporter"]["healthcheck"]["test"][1:3], "import sys")
        well("docker", "stop", "--time", "30", name)
        assert well("docker", "inspect", "--format", "{{.State.ExitCode}}", name) == "0"


def test_what_is_in_the_image(image: str) -> None:
    told = well("docker", "image", "inspect", "--format", "{{.Config.User}} {{json .Config.Entrypoint}}", image)
    assert told == '10001:10001 ["defib"]'
    ls = ["--entrypoint", "sh", image, "-c", "ls /opt/defib/lib/python3*/site-packages"]
    listed = well("docker", "run", "--rm", "--network", "host", *ls).splitlines()
    assert {"defib", "exporter", "fleet", "gateway", "remediator", "runtime", "h2"} <= set(listed)
    assert not {"tests", "grafana", "deploy", "pytest", "grpc", "lark_oapi"} & set(listed)
    assert well("docker", "run", "--rm", "--network", "host", image, "--version").startswith("defib ")


def test_an_image_that_cannot_reach_an_index_says_so(base: str, tmp_path: Path) -> None:
    given = ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PACKAGES="]
    done = run("docker", "build", "--quiet", "--network", "host", *given, str(ROOT), env={**os.environ})
    assert done.returncode != 0
    assert "No matching distribution found" in done.stdout + done.stderr


def as_user(name: str) -> list[str]:
    return ["setpriv", "--reuid", name, "--regid", name, "--init-groups"]


def test_the_install_script_may_run_twice_and_goes_back(base: str, wheels: str, tmp_path: Path) -> None:
    """In a Debian of its own, without systemd running: what it writes, what stays, and what is refused."""
    given = ["--env", "PIP_NO_INDEX=1", "--env", f"PIP_FIND_LINKS={wheels}"]
    mounts = ["--volume", f"{ROOT}:/checkout:ro"]
    name = "defib-test-install"
    well(
        "docker",
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        "host",
        "--init",
        *given,
        *mounts,
        base,
        "sleep",
        "600",
    )
    try:
        inside = ["docker", "exec", name]
        copy = "mkdir /source && cd /checkout && cp -r alerts console defib exporter fleet gateway grafana remediator runtime deploy pyproject.toml README.md requirements*.lock /source/"
        well(*inside, "sh", "-c", f"{copy} && mkdir -p /etc/systemd/system")
        first = well(*inside, "/source/deploy/install.sh")
        assert "systemctl enable --now" in first
        assert well(*inside, "defib", "--version").startswith("defib ")
        for user, program in (("defib", "remediator"), ("defib-exporter", "exporter")):
            well(*inside, *as_user(user), "defib", "check", "--for", program, "--config", "/etc/defib")
        for private in ("/etc/defib/secrets/webhook_token", "/etc/defib/secrets/web_config", "/var/lib/defib/token"):
            assert "Permission denied" in run(*inside, *as_user("defib-exporter"), "cat", private).stderr
        well(*inside, "sh", "-c", "echo '# mine' >>/etc/defib/services.yaml")
        state = [
            "sh",
            "-c",
            "find /etc/defib /var/lib/defib /etc/systemd/system -type f -exec md5sum {} + | sort; stat -c '%n %U:%G %a' /etc/defib /etc/defib/* /etc/defib/secrets/* /var/lib/defib; getent passwd defib",
        ]
        before = well(*inside, *state)
        well(*inside, "/source/deploy/install.sh")
        assert well(*inside, *state) == before
        assert "defib defib:defib 700" in before.replace("/var/lib/defib", "defib")
        assert "webhook_token defib:defib 400" in before.replace("/etc/defib/secrets/", "")
        assert "exporter_token root:defib 640" in before.replace("/etc/defib/secrets/", "")
        # An installation of an earlier version, whose exporter runs as the same user, stays as it is.
        unit, dropin = (
            "/etc/systemd/system/defib-exporter.service",
            "/etc/systemd/system/defib-exporter.service.d/user.conf",
        )
        assert run(*inside, "test", "-e", dropin).returncode == 1
        well(*inside, "sed", "-i", "s/^User=.*/User=defib/", unit)
        for _again in range(2):
            assert "still runs as the remediator's user" in well(*inside, "/source/deploy/install.sh")
            assert well(*inside, "cat", dropin) == "[Service]\nUser=defib\nGroup=defib"
        well(*inside, "rm", "-r", f"{unit}.d")
        assert "still runs" not in well(*inside, "/source/deploy/install.sh")
        assert well(*inside, *state) == before
        well(*inside, "ls", "/opt/defib/current/share/defib/alerts/rules/services.yml")
        version = well(*inside, "readlink", "/opt/defib/current")
        well(*inside, "sh", "-c", "sed -i 's/^version = .*/version = \"9.9.9\"/' /source/pyproject.toml")
        well(*inside, "/source/deploy/install.sh")
        assert well(*inside, "readlink", "/opt/defib/current").startswith("9.9.9-")
        well(*inside, "/source/deploy/install.sh", "--rollback", version)
        assert well(*inside, "readlink", "/opt/defib/current") == version
        none = run(*inside, "/source/deploy/install.sh", "--rollback", "0.0.0")
        assert (none.returncode, "version 0.0.0 is not installed" in none.stderr) == (1, True)
        # One that fails half way leaves nothing that looks whole, and what runs runs on.
        well(
            *inside,
            "sh",
            "-c",
            "sed -i 's/9.9.9/9.9.10/' /source/pyproject.toml && echo 'no-such-package==1' >>/source/requirements.lock",
        )
        failed = run(*inside, "/source/deploy/install.sh")
        assert failed.returncode != 0
        assert "9.9.10" not in well(*inside, "ls", "/opt/defib")
        assert well(*inside, "readlink", "/opt/defib/current") == version
        assert (
            run(*inside, "setpriv", "--reuid", "1", "/source/deploy/install.sh").stderr.strip()
            == "/source/deploy/install.sh: must be run as root"
        )
    finally:
        run("docker", "rm", "--force", name)
