"""Logins with certificates, passphrases, passwords and outdated algorithms, at a real sshd; lines of known_hosts."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import yaml

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from fleet.shells import HostKeyError, LoginError, ShellError
from fleet.shells.host_keys import BadLine, find_pins, parse_known_hosts
from fleet.shells.pool import Shells
from fleet.shells.ssh import Login, SshShell
from tests.integration.test_host_setup import configure, defib
from tests.support import eventually, inventory_of
from tests.support import loaded as load_config

pytestmark = pytest.mark.needs("sshd", "ssh-keygen")
PASSWORD = "right horse"
HASH = "$6$rounds=1000$7vKC1YbU32uxH4ou$oAjiSKMutbm7xFTdr8yxDLzN2VIJ/WhdQ7SAZh2Q4uzAUOzUZOzAAY8QjxGo7BnnLjy4I.z1rXF45rlHa6AR/."
Reconfigure = Callable[[str], Awaitable[None]]


@pytest.fixture
async def reconfigure(launcher: Launcher, host: Sshd, monkeypatch: pytest.MonkeyPatch) -> Reconfigure:
    """Start the host's sshd again with further settings, which count before those that it has."""

    async def restart(settings: str) -> None:
        folder = host.key_file.parent
        assert host.pid is not None
        os.kill(host.pid, signal.SIGTERM)
        config = folder / "config"
        config.write_text(f"{settings}\n{config.read_text()}")
        monkeypatch.setattr(sshd, "can_log_in", _accepts_connections)
        (folder / "shadow").write_text(f"{host.user}:{HASH}:19000:0:99999:7:::\n")
        environment = vars(sshd)["_environment"]
        shadow = {"NSS_WRAPPER_SHADOW": str(folder / "shadow")}
        monkeypatch.setattr(sshd, "_environment", lambda *given: {**environment(*given), **shadow})
        await sshd.restart(launcher, folder, host)

    return restart


async def _accepts_connections(host: Sshd) -> bool:
    async def connected() -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
        except OSError:
            return False
        banner = await reader.readline()
        writer.close()
        return banner.startswith(b"SSH-")

    await eventually(connected)
    return True


def login(host: Sshd, address: str = "127.0.0.1", **changes: Any) -> Login:
    settings = {"key_file": host.key_file, "known_hosts": host.known_hosts, **changes}
    return Login(address, host.port, host.user, **settings)


async def says(login: Login) -> str:
    shell = SshShell(login)
    try:
        return (await shell.run(["echo", "here"], timeout=30)).stdout.strip()
    finally:
        await shell.close()


def keygen(*arguments: object) -> None:
    subprocess.run(["ssh-keygen", "-q", *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["beside", "named", "expired", "none"])
async def test_certificates_of_users(host: Sshd, reconfigure: Reconfigure, tmp_path: Path, kind: str) -> None:
    authority, key = tmp_path / "authority", tmp_path / "key"
    for path in (authority, key):
        keygen("-t", "ed25519", "-N", "", "-f", path)
    validity = "-2h:-1h" if kind == "expired" else "-1h:+1h"
    if kind != "none":
        keygen("-s", authority, "-I", "test", "-n", host.user, "-V", validity, f"{key}.pub")
    if kind == "named":
        (tmp_path / "key-cert.pub").rename(tmp_path / "certificate")
    await reconfigure(f"TrustedUserCAKeys {authority}.pub")
    given = login(host, key_file=key, certificate_file=tmp_path / "certificate" if kind == "named" else None)
    if kind in ("expired", "none"):
        with pytest.raises(LoginError):
            await says(given)
    else:
        assert await says(given) == "here"


async def test_a_key_that_is_authorized_needs_no_certificate(host: Sshd, tmp_path: Path) -> None:
    """One of an authority that the host does not know does no harm."""
    authority = tmp_path / "authority"
    keygen("-t", "ed25519", "-N", "", "-f", authority)
    public = host.key_file.with_name(f"{host.key_file.name}.pub")
    public.write_text(asyncssh.read_private_key(str(host.key_file)).export_public_key().decode())
    keygen("-s", authority, "-I", "test", "-n", host.user, public)
    assert await says(login(host)) == "here"


@pytest.mark.parametrize("form", [[], ["-m", "PEM", "-t", "rsa"]])
async def test_keys_with_a_passphrase(host: Sshd, tmp_path: Path, form: list[str]) -> None:
    key = tmp_path / "key"
    keygen(*(form or ["-t", "ed25519"]), "-N", PASSWORD, "-f", key)
    with (host.key_file.parent / "authorized").open("a") as authorized:
        authorized.write((tmp_path / "key.pub").read_text())
    assert await says(login(host, key_file=key, passphrase=PASSWORD)) == "here"
    for passphrase in (None, "wrong horse"):
        with pytest.raises(LoginError, match=r"; see ssh\.passphrase") as error:
            await says(login(host, key_file=key, passphrase=passphrase))
        assert str(key) in str(error.value)
        assert "horse" not in str(error.value)


async def test_passwords(host: Sshd, reconfigure: Reconfigure) -> None:
    await reconfigure("AuthenticationMethods password\nPasswordAuthentication yes\nPermitRootLogin yes")
    assert await says(login(host, key_file=None, password=PASSWORD)) == "here"
    assert await says(login(host, password=PASSWORD)) == "here"
    for password in (None, "wrong horse"):
        with pytest.raises(LoginError) as error:
            await says(login(host, password=password))
        assert "horse" not in f"{error.value} {login(host, password=password)}"


class _Asking(asyncssh.SSHServer):
    """A server that asks for something, and keeps the answers."""

    prompts: Sequence[tuple[str, bool]] = ()
    answers: list[list[str]] = []

    def kbdint_auth_supported(self) -> bool:
        return True

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
        return "", "", "", list(self.prompts)

    def validate_kbdint_response(self, username: str, responses: Any) -> Any:
        self.answers.append(list(responses))
        return list(responses) == [PASSWORD]


@pytest.mark.parametrize(
    ("prompts", "succeeds"),
    [
        ([("Verification code: ", False)], True),
        ([("Name: ", True)], False),  # the answer would be shown
        ([("Password: ", False), ("Code: ", False)], False),
    ],
)
async def test_keyboard_interactive(tmp_path: Path, prompts: list[tuple[str, bool]], succeeds: bool) -> None:
    class Server(_Asking):
        answers: list[list[str]] = []

    Server.prompts = prompts
    key = asyncssh.generate_private_key("ssh-ed25519")
    async with asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[key], server_factory=Server, process_factory=_greet
    ) as server:
        known_hosts = tmp_path / "known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{server.get_port()} {key.export_public_key().decode()}")
        shell = SshShell(Login("127.0.0.1", server.get_port(), "u", None, known_hosts, password=PASSWORD))
        if succeeds:
            await shell.connection()
        else:
            with pytest.raises(LoginError):
                await shell.connection()
        await shell.close()
    assert Server.answers == ([[PASSWORD]] if succeeds else [])


def _greet(process: asyncssh.SSHServerProcess[str]) -> None:
    process.exit(0)


@pytest.mark.filterwarnings("ignore:Diffie-Hellman")
@pytest.mark.parametrize(
    "settings",
    [
        "KexAlgorithms diffie-hellman-group1-sha1",
        "Ciphers aes128-cbc",
        "Ciphers 3des-cbc\nMACs hmac-sha1-96",
        "Ciphers aes128-ctr\nMACs hmac-md5",
    ],
)
async def test_outdated_algorithms(host: Sshd, reconfigure: Reconfigure, settings: str) -> None:
    await reconfigure(settings)
    assert await says(login(host, legacy=True)) == "here"
    with pytest.raises(ShellError):
        await says(login(host))


async def test_outdated_signatures_of_a_host(host: Sshd, reconfigure: Reconfigure, tmp_path: Path) -> None:
    keygen("-t", "rsa", "-b", "2048", "-N", "", "-f", tmp_path / "rsa")
    host.known_hosts.write_text(f"[127.0.0.1]:{host.port} {(tmp_path / 'rsa.pub').read_text()}")
    await reconfigure(f"HostKey {tmp_path}/rsa\nHostKeyAlgorithms ssh-rsa")
    assert await says(login(host, legacy=True)) == "here"


async def test_a_host_that_takes_nothing_newer(tmp_path: Path) -> None:
    """Its key, and the client's, sign with SHA-1."""
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    key.write_private_key(str(tmp_path / "key"))
    public = key.export_public_key().decode()
    (tmp_path / "authorized").write_text(public)
    async with asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[key], authorized_client_keys=str(tmp_path / "authorized"),
        signature_algs=["ssh-rsa"], encryption_algs=["3des-cbc"], mac_algs=["hmac-sha1"],
    ) as server:  # fmt: skip
        port = server.get_port()
        (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {public}")
        shell = SshShell(Login("127.0.0.1", port, "u", tmp_path / "key", tmp_path / "known", legacy=True))
        await shell.connection()
        await shell.close()


KEY = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()


@pytest.mark.parametrize(
    ("written", "accepted", "changed"),
    [
        ("[localhost]:PORT OTHER\n[127.0.0.1]:PORT KEY", False, True),  # the key is another host's
        ("[localhost]:PORT OTHER\n127.0.0.1 KEY", False, True),
        ("[127.0.0.1]:PORT KEY", False, False),
        ("127.0.0.0/8 KEY", False, False),
        ("[localhost]:PORT KEY\n[127.0.0.1]:PORT OTHER", True, None),
        ("[localhost]:PORT KEY\n@revoked [127.0.0.1]:PORT KEY", True, None),
        ("[local*]:* KEY", True, None),
        ("localhost KEY", True, None),  # accepted at all ports
        ("localhost OTHER\n[localhost]:PORT KEY", True, None),
        ("@revoked [localhost]:PORT KEY\nlocalhost KEY", False, True),
        ("@revoked localhost KEY\nlocalhost KEY", False, True),
    ],
)
@pytest.mark.parametrize("is_hashed", [False, True])
async def test_a_host_with_a_name_needs_a_pin_under_it(
    host: Sshd, tmp_path: Path, written: str, accepted: bool, changed: bool | None, is_hashed: bool
) -> None:
    """What is pinned under the IP address is the key of whichever host is configured with it."""
    key = " ".join(host.known_hosts.read_text().split()[1:3])
    known = tmp_path / "known"
    lines = written.replace("PORT", str(host.port)).replace("KEY", key).replace("OTHER", KEY)
    known.write_text(f"{lines}\n")
    if is_hashed:
        keygen("-H", "-f", known)
    by_name = login(host, "localhost", known_hosts=known)
    if accepted:
        assert await says(by_name) == "here"
    else:
        with pytest.raises(HostKeyError) as error:
            await says(by_name)
        assert error.value.changed == changed
    pins = find_pins(parse_known_hosts(known.read_text())[0], "localhost", host.port)
    assert (pins.judge(asyncssh.import_public_key(key)) == "pinned") == accepted


async def test_an_address_that_is_pinned_is_accepted(host: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(f"[localhost]:{host.port} {KEY}\n{host.known_hosts.read_text()}")
    assert await says(login(host, known_hosts=known)) == "here"
    known.write_text(host.known_hosts.read_text().replace(f"[127.0.0.1]:{host.port}", "127.0.0.0/8"))
    assert await says(login(host, known_hosts=known)) == "here"


async def test_certificates_of_hosts_count_for_their_name(host: Sshd, reconfigure: Reconfigure, tmp_path: Path) -> None:
    authority, folder, known = tmp_path / "authority", host.key_file.parent, tmp_path / "known"
    keygen("-t", "ed25519", "-N", "", "-f", authority)
    (folder / "host.pub").write_text(" ".join(host.known_hosts.read_text().split()[1:]))
    keygen("-s", authority, "-I", "test", "-h", "-n", "localhost", folder / "host.pub")
    await reconfigure(f"HostCertificate {folder}/host-cert.pub")
    signed = authority.with_suffix(".pub").read_text()
    known.write_text(f"@cert-authority [localhost]:{host.port} {signed}")
    assert await says(login(host, "localhost", known_hosts=known)) == "here"
    known.write_text(f"@cert-authority [127.0.0.1]:{host.port} {signed}")
    for address in ("localhost", "127.0.0.1"):  # the certificate is not for the latter
        with pytest.raises(HostKeyError):
            await says(login(host, address, known_hosts=known))


async def test_no_password_is_sent_to_a_host_that_is_pinned_under_its_address(tmp_path: Path) -> None:
    class Server(_Asking):
        answers: list[list[str]] = []
        prompts = [("Password: ", False)]

    key = asyncssh.generate_private_key("ssh-ed25519")
    async with asyncssh.listen("127.0.0.1", 0, server_host_keys=[key], server_factory=Server) as server:
        port, known_hosts = server.get_port(), tmp_path / "known_hosts"
        pinned = f"[127.0.0.1]:{port} {key.export_public_key().decode()}"
        known_hosts.write_text(f"[localhost]:{port} {KEY}\n{pinned}")
        for address in ("localhost", "127.0.0.1"):
            shell = SshShell(Login(address, port, "u", None, known_hosts, password=PASSWORD))
            if address == "localhost":
                with pytest.raises(HostKeyError) as error:
                    await shell.connection()
                assert error.value.changed
                assert Server.answers == []
            else:
                await shell.connection()
            await shell.close()
    assert Server.answers == [[PASSWORD]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("10.0.0", "it has no key"),
        ("10.0.0 ssh-ed25519", "it has no key"),
        ("10.0.0 CUT", "its key is invalid"),
        ("@nonsense 10.0.0 KEY", "Invalid known hosts marker"),
        ("|1|x| KEY", "Invalid known hosts hash entry"),
        ("\udcff\udcfe", "it has no key"),
        ("@revoked", "it has no key"),
        ("10.0.0,,web KEY", "it has an empty name"),
        ("# a comment", None),
        ("10.0.0 ssh-yet-to-come AAAA", None),
        ("10.0.0 KEY d'Andr\u00e9", None),
    ],
)
async def test_a_bad_line_of_known_hosts_costs_only_itself(
    host: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str | None
) -> None:
    line = line.replace("KEY", KEY).replace("CUT", KEY[:40])
    known_hosts = tmp_path / "known"
    pinned = host.known_hosts.read_text().strip()
    known_hosts.write_bytes(f"{line}\n{pinned} Zo\u00eb\n{line}".encode("utf-8", "surrogateescape"))
    _, bad = parse_known_hosts(f"{line}\n")
    assert bad == ([] if reason is None else [BadLine(1, reason)])
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(known_hosts)}
    hosts = {"h": {"address": "127.0.0.1", "ssh": ssh}}
    loaded = await asyncio.to_thread(inventory_of, tmp_path / "config", {"hosts": hosts})
    shells = Shells(loaded.inventory.hosts)
    try:
        for _ in range(2):
            assert (await shells.get("h").run(["echo", "here"], timeout=30)).stdout == "here\n"
    finally:
        await shells.close()
    logged = capsys.readouterr().out
    assert logged.count("known_hosts_line_ignored") == (0 if reason is None else 2)
    assert reason is None or f"file={known_hosts}" in logged


async def test_a_bad_line_is_reported_by_check_and_doctor(host: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known"
    known_hosts.write_text(f"10.0.0\n{host.known_hosts.read_text()}")
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(known_hosts)}
    config = tmp_path / "config"
    configure(config, {"h": {"address": "127.0.0.1", "ssh": ssh}})
    checked = await asyncio.to_thread(defib, config, "check")
    assert checked.returncode == 0, checked.stderr
    assert f"{known_hosts}:1: the line is ignored: it has no key" in checked.stderr
    doctor = await asyncio.to_thread(defib, config, "doctor", "--for", "exporter", "h")
    assert "line 1 is ignored: it has no key" in doctor.stdout + doctor.stderr


async def test_controls_have_the_secrets_of_their_own_key(tmp_path: Path) -> None:
    """The remediator can do without a secret of the exporter, but not where it is needed."""
    ssh = {"user": "u", "key_file": "read", "passphrase": "one", "password": "${file:/nowhere}", "legacy": True}
    hosts = {
        "a": {"address": "127.0.0.1", "ssh": ssh, "control_ssh": {"key_file": "control", "passphrase": "two"}},
        "b": {"address": "127.0.0.1", "ssh": ssh},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"hosts": hosts}))
    loaded = await asyncio.to_thread(load_config, tmp_path, programs=["remediator"])
    control = loaded.inventory.hosts["a"].ssh_for(control=True)
    assert control.passphrase is not None
    assert (control.passphrase.get_secret_value(), control.password, control.legacy) == ("two", None, True)
    shells = Shells(loaded.inventory.hosts, control=True)
    shells.get("a")
    with pytest.raises(ShellError, match=r"ssh\.password is a reference"):
        shells.get("b")
