"""Throttling, sessions, roles and the audit log, without a server."""

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import trustme
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete, update
from structlog.testing import capture_logs

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Person
from remediator.record import audit
from remediator.record.database import StorageError
from remediator.record.schema import audit as audit_rows
from remediator.record.transaction import Transaction
from remediator.sign_in.services import Redirect, SignInError
from runtime.access.audit import AuditEntry, Refusals
from runtime.access.passwords import Passwords
from runtime.access.proxy import RoleMap
from runtime.access.roles import AccessRequirement, Role, least_role, permits
from runtime.access.sessions import AGE_LIMIT, IDLE_LIMIT, Session, Sessions, csrf_token
from runtime.access.throttle import Throttle, ThrottledError
from runtime.access.tokens import ConfiguredTokens
from runtime.errors import StartError
from runtime.tokens import ConfiguredToken
from runtime.webconfig import WebConfigFile, load
from tests.support import ClockedHarness


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


class Storage:
    """Sessions that are stored in a map."""

    def __init__(self) -> None:
        self.stored: dict[str, Session] = {}

    async def load(self) -> Iterable[Session]:
        return self.stored.values()

    async def save(self, session: Session) -> None:
        self.stored[session.digest] = session

    async def delete(self, digests: Iterable[str]) -> None:
        for digest in digests:
            del self.stored[digest]


def delays(throttle: Throttle, clock: Clock, user: str, address: str, attempts: int) -> list[float]:
    """How long each failed attempt had to wait, of somebody who tries again as soon as possible."""
    waited = []
    for _ in range(attempts):
        began = clock.at
        while True:
            try:
                throttle.begin(user, address)
            except ThrottledError as error:
                clock.at += error.seconds
            else:
                break
        waited.append(clock.at - began)
    return waited


def test_delays_grow_after_five_failures() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    assert delays(throttle, clock, "ann", "10.0.0.1", 12) == [0] * 5 + [5, 10, 20, 40, 80, 160, 300]
    assert delays(throttle, clock, "bob", "10.0.0.2", 1) == [0]
    clock.at += 301
    throttle.begin("ann", "10.0.0.1").succeed()
    assert delays(throttle, clock, "ann", "10.0.0.1", 6) == [0] * 5 + [5]


def test_parallel_attempts_count_before_they_fail() -> None:
    throttle = Throttle(Clock())
    for _ in range(5):
        throttle.begin("ann", "10.0.0.1")
    with pytest.raises(ThrottledError):
        throttle.begin("ann", "10.0.0.1")


def test_many_users_from_one_address_and_one_user_from_many_addresses() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    waits = [delays(throttle, clock, f"user-{n}", f"2001:db8::{n:x}", 1)[0] for n in range(40)]
    assert waits[:30] == [0] * 30  # a network of IPv6 counts as one address
    assert waits[30:33] == [5, 10, 20]
    throttle = Throttle(clock)
    waits = [delays(throttle, clock, "ann", f"10.0.{n}.1", 1)[0] for n in range(60)]
    assert waits == [0] * 50 + [5] * 10  # never long, so that nobody can lock the user out


def test_an_account_of_ones_own_does_not_help_to_guess() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    waits = []
    for number in range(40):
        waits += delays(throttle, clock, f"user-{number}", "10.0.0.1", 1)
        while True:
            try:
                throttle.begin("mine", "10.0.0.1").succeed()
                break
            except ThrottledError as error:
                clock.at += error.seconds
    assert clock.at - 1000 > 1000


def test_the_memory_of_failures_is_bounded() -> None:
    throttle = Throttle(Clock())
    for number in range(20_000):
        throttle.begin(f"user-{number}", f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(throttle._failures) <= 10_000


def test_refused_attempts_do_not_push_out_the_failures_of_others() -> None:
    throttle = Throttle(Clock())
    for number in range(30):
        throttle.begin(f"user-{number}", "10.0.0.1")
        throttle.begin(f"user-{number}", "10.0.0.2")
    for number in range(6000):  # each refused
        with pytest.raises(ThrottledError):
            throttle.begin(f"guess-{number}", "10.0.0.2")
    with pytest.raises(ThrottledError):
        throttle.begin("user-1", "10.0.0.1")


async def test_the_time_of_a_refusal_does_not_tell_which_users_exist() -> None:
    """Also where the hashes have different costs."""
    hashes = {
        name: bcrypt.hashpw(b"right", bcrypt.gensalt(cost)).decode() for name, cost in (("quick", 4), ("slow", 10))
    }

    async def measure(user: str) -> float:
        passwords = Passwords(lambda: hashes, Throttle(Clock()))
        started = time.perf_counter()
        assert not await passwords.check(user, "wrong", "10.0.0.1")
        return time.perf_counter() - started

    quick, unknown = [[await measure(user) for _ in range(5)] for user in ("quick", "nobody")]
    assert max(quick) > min(unknown) / 2, (quick, unknown)


async def test_a_password_that_was_accepted_is_not_accepted_for_ever() -> None:
    hashes = {"ann": bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()}
    clock = Clock()
    passwords = Passwords(lambda: hashes, Throttle(clock))
    assert await passwords.check("ann", "right", "10.0.0.1")
    assert not await passwords.check("bob", "right", "10.0.0.1")
    assert not await passwords.check("ann", "right\0", "10.0.0.1")
    for _ in range(4):
        assert not await passwords.check("ann", "wrong", "10.0.0.1")
    with pytest.raises(ThrottledError):  # the right one is no exception, or it could be guessed
        await passwords.check("ann", "right", "10.0.0.1")
    assert await passwords.check("ann", "right", "10.0.0.2")
    hashes["ann"] = bcrypt.hashpw(b"another", bcrypt.gensalt(4)).decode()
    assert not await passwords.check("ann", "right", "10.0.0.2")


async def test_refusals_do_not_tell_which_password_is_right() -> None:
    """Also not those of a user who has signed in before, at the same address or at another one."""
    hashes = {name: bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode() for name in ("ann", "bob")}
    clock = Clock()
    passwords = Passwords(lambda: hashes, Throttle(clock))
    assert await passwords.check("ann", "right", "10.0.0.1")
    for number in range(13):  # many addresses guess for the user
        for _ in range(4):
            with contextlib.suppress(ThrottledError):
                assert not await passwords.check("ann", "wrong", f"10.1.0.{number}")
    with pytest.raises(ThrottledError):
        await passwords.check("ann", "right", "10.9.9.9")
    assert await passwords.check("ann", "right", "10.0.0.1")  # who is not locked out
    clock.at += 1000
    assert await passwords.check("ann", "right", "10.0.0.1")
    for number in range(40):  # the address guesses for many users
        with contextlib.suppress(ThrottledError):
            assert not await passwords.check(f"user-{number}", "wrong", "10.0.0.1")
    for _ in range(5):
        with pytest.raises(ThrottledError):
            await passwords.check("ann", "wrong", "10.0.0.1")
    with pytest.raises(ThrottledError):
        await passwords.check("ann", "right", "10.0.0.1")


async def test_sessions_end() -> None:
    clock, storage = Clock(), Storage()
    sessions = Sessions(clock, storage)

    async def create(user: str = "ann") -> str:
        return await sessions.create(user, "password", credential="c", groups=(), address="a", browser="b")

    id_ = await create()
    assert id_ not in str(storage.stored)
    found = sessions.find(id_)
    assert found is not None
    clock.at += IDLE_LIMIT
    assert sessions.find(id_) is not None
    clock.at += 1
    assert sessions.find(id_) is None
    # Used every hour, it ends after seven days.
    id_ = await create()
    used = 0.0
    while (session := sessions.find(id_)) is not None:
        sessions.touch(session)
        await sessions.save_touched()
        clock.at += 3600
        used += 3600
    assert AGE_LIMIT < used <= AGE_LIMIT + 3600
    await sessions.save_touched()
    assert storage.stored == {}
    # Others are loaded after a restart, with the time of their last use.
    id_ = await create()
    clock.at += 7200
    session = sessions.find(id_)
    assert session is not None
    sessions.touch(session)
    await sessions.save_touched()
    again = Sessions(clock, storage)
    await again.load()
    clock.at += IDLE_LIMIT - 3600
    assert again.find(id_) is not None
    for _ in range(60):
        await create("bob")
    assert sum(1 for each in storage.stored.values() if each.user == "bob") == 50
    assert csrf_token(id_) != csrf_token(id_ + "x")


async def test_a_session_may_end_while_another_is_stored() -> None:
    class SlowStorage(Storage):
        async def save(self, session: Session) -> None:
            await asyncio.sleep(0)
            await super().save(session)

    clock = Clock()
    sessions = Sessions(clock, SlowStorage())
    ids = [
        await sessions.create(f"u{n}", "password", credential="c", groups=(), address="", browser="") for n in range(5)
    ]
    clock.at += 120
    found = [session for id_ in ids if (session := sessions.find(id_)) is not None]
    for session in found:
        sessions.touch(session)
    saving = asyncio.create_task(sessions.save_touched())
    await asyncio.sleep(0)
    for session in found:
        await sessions.end(session)
    await saving
    assert sessions.list_all() == []


async def test_tokens_are_valid_while_others_are_put_in_force(tmp_path: Path) -> None:
    file = tmp_path / "token"
    await asyncio.to_thread(file.write_text, "from a file")
    kept = (ConfiguredToken("remediator.webhook_token", None, file), Role.WEBHOOK)
    tokens = ConfiguredTokens(lambda _: None)
    await tokens.replace([kept])
    replacing = asyncio.create_task(tokens.replace([kept, (ConfiguredToken("access.metrics_token"), Role.METRICS)]))
    seen = set()
    while not replacing.done():
        await asyncio.sleep(0)
        seen.add(await tokens.find("from a file"))
    assert seen == {Role.WEBHOOK}
    # A file that cannot be read twice in a row revokes its token.
    await asyncio.to_thread(file.unlink)
    await tokens.read()
    assert await tokens.find("from a file") is Role.WEBHOOK
    await tokens.read()
    assert await tokens.find("from a file") is None


def test_every_role_may_what_the_one_below_may() -> None:
    order = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
    for requirement in AccessRequirement:
        allowed = [permits(role, requirement) for role in order]
        assert allowed == sorted(allowed)
    needed = (AccessRequirement.VIEWER, AccessRequirement.OPERATOR, AccessRequirement.ADMIN)
    assert [least_role(each) for each in needed] == list(order)
    roles = RoleMap({"a": "viewer", "b": "admin"}, "viewer")
    assert [roles.find(groups) for groups in ([], ["a"], ["a", "b"], ["c"])] == [
        Role.VIEWER, Role.VIEWER, Role.ADMIN, Role.VIEWER,
    ]  # fmt: skip
    assert RoleMap({"a": "operator"}).find(["b"]) is None


def test_a_role_limits_the_buttons_of_a_person() -> None:
    def buttons(**settings: Any) -> set[str]:
        person = Person(open_id="ou_1", **settings)
        return {
            name for name in ("acknowledge", "silence", "restart", "approve", "automation") if person.may_press(name)
        }

    every = {"acknowledge", "silence", "restart", "approve", "automation"}
    assert buttons(role="admin") == buttons(may=sorted(every)) == every
    assert (
        buttons() == buttons(role="operator") == buttons(role="operator", may=sorted(every)) == every - {"automation"}
    )
    assert buttons(role="viewer") == set()
    assert buttons(role="admin", may=["restart"]) == {"restart"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles: {ann: admin}", "web.yml: roles: ann: not in basic_auth_users"),
        (
            "basic_auth_users: {}\nroles: {ann: root}",
            "web.yml: roles.ann: must be 'viewer', 'operator' or 'admin', not 'root'",
        ),
        *(
            (
                f"tls_server_config: {{cert_file: c, key_file: k, client_ca_file: a{more}}}",
                "client_ca_file has no effect without client_auth_type: set that to RequireAndVerifyClientCert",
            )
            for more in ("", ", client_auth_type: NoClientCert")
        ),
        *((text, " is empty; for no users and no TLS, write {}") for text in ("", "\n", "# users", "---\n", "~")),
        *((text, "web.yml: must be a map") for text in ("[]", "false", "0", "''")),
        *(
            (text, "web.yml:1: invalid YAML: a key must be text; one that starts with { or [ must be in quotes")
            for text in ("{[a]: b}", "? {a: b}\n: c", "basic_auth_users: {{ defib_users }}")
        ),
        *(
            (f'tls_server_config: {{cert_file: "{path}", key_file: y}}', message)
            for path, message in (("a\\0b", "embedded null byte"), ("a" * 5000, "File name too long"))
        ),
        *(
            (f"http_server_config: {{headers: {{{header}}}}}", message)
            for header, message in (
                ('"a\\r\\nb": c', "'a\\r\\nb' is not the name of a header"),
                ('X-A: "a\\nb"', "the value of X-A must be one line of printable ASCII characters, not 'a\\nb'"),
                ('X-A: "é"', "the value of X-A must be one line of printable ASCII characters, not 'é'"),
                ('content-length: "5"', "content-length is set by Defib"),
            )
        ),
        (
            "http_server_config:\n  headers:\n    X-A: |\n      default-src self\n",
            "the value of X-A must be one line of printable ASCII characters, not 'default-src self\\n'",
        ),
        ("a: !!int x", "invalid literal for int() with base 10: 'x'"),
        ("a: !!timestamp x", "has no attribute 'groupdict'"),
    ],
)
def test_errors_in_a_web_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "web.yml").write_text(text)
    with pytest.raises(StartError) as raised:
        load(tmp_path / "web.yml").ssl_context()
    assert str(raised.value).endswith(message)


class ReloadedFile:
    """A web configuration that is read again, with the results of reloads."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, list[bool]()
        self.file = WebConfigFile(path)

    async def check(self) -> None:
        await self.file.check(self._record)

    async def change(self, text: str) -> None:
        """Write the file, and check it until it is read."""
        await asyncio.to_thread(self.path.write_text, text)
        await self.check()
        await self.check()

    def _record(self, *, successful: bool) -> None:
        self.results.append(successful)


@pytest.fixture
async def reloaded(tmp_path: Path) -> ReloadedFile:
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    authority = trustme.CA()
    pem = authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()

    def write() -> ReloadedFile:
        (tmp_path / "both.pem").write_bytes(pem)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        users = {"ann": hashed, "bob": hashed}
        tls = {"cert_file": "both.pem", "key_file": "both.pem", "client_ca_file": "ca.pem"}
        tls["client_auth_type"] = "RequireAndVerifyClientCert"
        (tmp_path / "web.yml").write_text(yaml.safe_dump({"basic_auth_users": users, "tls_server_config": tls}))
        return ReloadedFile(tmp_path / "web.yml")

    return await asyncio.to_thread(write)


async def test_a_change_of_the_web_configuration_is_applied_once_it_is_complete(reloaded: ReloadedFile) -> None:
    text = await asyncio.to_thread(reloaded.path.read_text)
    without_bob = "".join(line for line in text.splitlines(keepends=True) if "bob:" not in line)
    for part in ("", without_bob[:100], without_bob):  # as programs write that empty a file first
        await asyncio.to_thread(reloaded.path.write_text, part)
        await reloaded.check()
        assert set(reloaded.file.users.hashes) == {"ann", "bob"}
    await reloaded.check()
    assert (set(reloaded.file.users.hashes), reloaded.results) == ({"ann"}, [True])


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        (r"(?s).*", "", "is empty"),
        (r"(?s).*", "{}\n", "has no users in basic_auth_users any more"),
        (r"(?s)tls_server_config:.*", "", "has no tls_server_config any more"),
        (r"(?s)basic_auth_users:.*?(?=tls)", "basic_auth_users: {}\n", "has no users in basic_auth_users any more"),
        (r"client_(auth_type|ca_file):.*", "", "has no client_auth_type: RequireAndVerifyClientCert any more"),
        (r"cert_file:.*", 'cert_file: "a\\\\0b"', "embedded null byte"),
        (r"cert_file:.*", "cert_file: " + "a" * 5000, "File name too long"),
        (r"(?s).*", "{[a]: b}", "invalid YAML"),
    ],
)
async def test_a_reload_never_ends_what_protects_a_server(
    reloaded: ReloadedFile, old: str, new: str, lost: str
) -> None:
    text, tls = await asyncio.to_thread(reloaded.path.read_text), reloaded.file.tls
    with capture_logs() as logs:
        await reloaded.change(re.sub(old, new, text, count=0 if "client" in old else 1))
    assert lost in logs[-1]["error"]
    assert (reloaded.results, reloaded.file.tls) == ([False], tls)
    assert set(reloaded.file.users.hashes) == {"ann", "bob"}
    await reloaded.change(text)
    assert reloaded.results == [False, True]


def test_no_program_asks_for_the_password_of_a_key(tmp_path: Path) -> None:
    """It would wait at the terminal."""
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    (tmp_path / "key.pem").write_bytes(pem)
    trustme.CA().issue_cert("localhost").cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "web.yml").write_text("tls_server_config: {cert_file: cert.pem, key_file: key.pem}")
    with pytest.raises(StartError, match="cannot load the certificate"):
        load(tmp_path / "web.yml").ssl_context()


def test_only_the_browser_that_was_redirected_comes_back() -> None:
    redirect = Redirect("oidc", "secret of the cookie", "uri", "incidents/1?x=é")
    again = Redirect.resume("oidc", "secret of the cookie", "uri", redirect.state)
    assert again == redirect
    assert len({redirect.state, redirect.nonce, redirect.code_verifier}) == 3
    assert len(redirect.code_verifier) >= 43  # as PKCE requires
    mac, _, next_ = redirect.state.partition(".")
    other = Redirect("oidc", "secret of the cookie", "uri", "other").state.partition(".")[2]
    for service, secret, state in (
        ("feishu", "secret of the cookie", redirect.state), ("oidc", "another", redirect.state),
        ("oidc", "", redirect.state), ("oidc", "secret of the cookie", f"{mac}.{other}"),
        ("oidc", "secret of the cookie", f"{mac}.%%"), ("oidc", "secret of the cookie", f".{next_}"),
        ("oidc", "secret of the cookie", ""), ("oidc", "", Redirect("oidc", "", "uri", "").state),
        ("oidc", "secret of the cookie", "\udcff"),
    ):  # fmt: skip
        with pytest.raises(SignInError):
            Redirect.resume(service, secret, "uri", state)


def entry(outcome: Any = "done", name: str = "ann", **more: Any) -> AuditEntry:
    return AuditEntry("restart", name, "token", "10.0.0.1", "web", outcome, **more)


@pytest.fixture
def harness(tmp_path: Path) -> ClockedHarness:
    return ClockedHarness(tmp_path, Inventory(), 1000.0)


async def delete_all(harness: ClockedHarness, before: float) -> int:
    deleted = 0
    while rows := await harness.database.write(audit.delete_old, before, 150):
        deleted += rows
    return deleted


async def test_nobody_pushes_out_the_audit_entries_of_others(harness: ClockedHarness) -> None:
    def fill(tx: Transaction) -> None:
        for number in range(20):
            audit.add(tx, entry(name="ann", detail=str(number)))
        for number in range(1000):
            audit.add(tx, entry(name="eve", detail=str(number)))

    await harness.database.write(fill)
    await delete_all(harness, 0.0)
    rows = await harness.database.read(audit.page, None, 1000)
    assert sum(1 for row in rows if row["name"] == "ann") == 20
    assert sum(1 for row in rows if row["name"] == "eve") == 30


async def test_the_audit_log_is_append_only_and_limited(harness: ClockedHarness) -> None:

    def fill(tx: Transaction) -> None:
        for number in range(40):
            audit.add(tx, entry(detail=str(number)))
        for number in range(200):
            audit.add(tx, entry("refused", f"guess-{number}"))
            audit.add(tx, AuditEntry("logs", "ann", "token", "10.0.0.1", "x" * 10_000))

    await harness.database.write(fill)
    with pytest.raises(StorageError, match="entries of the audit log are not changed"):
        await harness.database.write(lambda tx: tx.execute(update(audit_rows).values(name="bob")) and None)
    assert await delete_all(harness, 0.0) == 300
    rows = await harness.database.read(audit.page, None, 1000)
    assert {kind: sum(1 for row in rows if (row["event"], row["outcome"]) == kind) for kind in (
        ("restart", "refused"), ("logs", "done"), ("restart", "done"),
    )} == {("restart", "refused"): 50, ("logs", "done"): 50, ("restart", "done"): 40}  # fmt: skip
    assert max(len(row["target"]) for row in rows) == 200
    last = rows[0]["id"]
    harness.now = 5000.0
    assert await delete_all(harness, 4000.0) == 140
    await harness.database.write(audit.add, entry())
    (row,) = await harness.database.read(audit.page, None, 10)
    assert row["id"] > last  # ids are not given again
    await harness.database.write(lambda tx: tx.execute(delete(audit_rows)) and None)
    await asyncio.to_thread(harness.database.close)


async def test_equal_refusals_become_one_entry_with_their_number() -> None:
    written: list[AuditEntry] = []

    async def write(each: AuditEntry) -> None:
        written.append(each)

    refusals = Refusals(write, Clock())
    for _ in range(1000):
        refusals.add(entry("refused"))
    for number in range(5000):
        refusals.add(entry("refused", f"guess-{number}", verified=False))
        refusals.add(replace(entry("refused"), target=f"POST /{number}"))
    hidden = AuditEntry("access", "(unknown)", "token", "10.0.0.2", "GET /", "refused", verified=False)
    refusals.add(hidden)
    task = asyncio.create_task(refusals.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(written) <= 64
    assert sum(each.count for each in written) == 11_001
    assert hidden in [replace(each, at=None) for each in written]  # whoever sends many hides only their own
    known = [each for each in written if each.name == "ann"]
    assert known[0].count == 1000
    assert [each.count for each in known if each.target == "(various)"] == [5000 - 49]
