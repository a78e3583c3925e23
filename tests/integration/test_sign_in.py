"""Signing in with a browser, what protects its sessions, and the audit log of all that."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import bcrypt
import httpx
import pytest
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.forked_defib import run_defib
from tests.integration.feishu_oauth import APP_ID, APP_SECRET, TENANT, FeishuOAuth, FeishuUser
from tests.integration.loop import Loop, fill_disk
from tests.integration.test_access import basic, bearer, create_token, start_with_users, write_users
from tests.support import NO_TLS, WEBHOOK_TOKEN, eventually

PAGE = {"Accept": "text/html,application/xhtml+xml", "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}


class Browser:
    """Sends requests as a browser does: with cookies, and an Origin with forms. It follows redirects by hand."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.AsyncClient(verify=NO_TLS, base_url=url, trust_env=False, timeout=120, headers=PAGE)

    async def open(self, path: str) -> httpx.Response:
        return await self.client.get(path)

    async def send(self, path: str, form: dict[str, str], **headers: str) -> httpx.Response:
        own = {"Origin": self.url, "Sec-Fetch-Site": "same-origin", **headers}
        return await self.client.post(path, data=form, headers=own)

    async def sign_in(self, user: str, password: str, next_: str = "") -> httpx.Response:
        page = await self.open(f"/sign-in?next={next_}")
        form = {"user": user, "password": password, "next": next_, "csrf": find_csrf(page.text)}
        return await self.send("/sign-in", form)

    async def change(self, path: str = "/api/v1/maintenance", **headers: str) -> httpx.Response:
        """Send a change that a page's script could send: it is refused for its empty body once it may be sent."""
        own = {"Origin": self.url, "Sec-Fetch-Site": "same-origin", **headers}
        return await self.client.post(path, json={}, headers=own)

    async def csrf(self) -> str:
        return find_csrf((await self.open("/")).text)

    def set_session(self, id_: str) -> None:
        self.client.cookies.clear()
        self.client.cookies.set("defib_session", id_, domain="127.0.0.1", path="/")

    @property
    def session(self) -> str:
        return str(self.client.cookies.get("defib_session"))


def find_csrf(page: str) -> str:
    """Return the CSRF token of the last form in a page: before it may be the one for signing out."""
    found = re.findall(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found, page
    return str(found[-1])


@pytest.fixture
async def browser(loop: Loop) -> AsyncIterator[Browser]:
    made = Browser(loop.stack.url("remediator"))
    yield made
    await made.client.aclose()


async def audit(loop: Loop) -> list[dict[str, Any]]:
    return list((await loop.ask("GET", "/api/v1/audit?limit=1000")).json()["audit"])


async def test_signing_in_and_out(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    sent = await browser.open("/incidents/1?x=1")
    assert (sent.status_code, sent.headers["Location"]) == (303, "./../sign-in?next=incidents%2F1%3Fx%3D1")
    page = await browser.open("/sign-in?next=incidents%2F1%3Fx%3D1")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    wrong = await browser.sign_in("operator", "wrong")
    assert (wrong.status_code, "The user or the password is wrong." in wrong.text) == (401, True)
    done = await browser.sign_in("operator", "operator", "incidents/1?x=1")
    assert (done.status_code, done.headers["Location"]) == (303, "./incidents/1?x=1")
    cookies = {each.partition("=")[0]: each for each in done.headers.get_list("Set-Cookie")}
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookies["defib_session"].split("; "))
    assert "Secure" not in cookies["defib_session"]  # without TLS, a browser would not send it back
    shown = await browser.open("/")
    assert (shown.status_code, "operator <small>operator</small>" in shown.text) == (200, True)
    assert shown.headers["Cache-Control"] == "no-store"
    csrf = find_csrf(shown.text)
    # A change needs the session's CSRF token, and a page of this server.
    statuses = {
        "without": (await browser.change()).status_code,
        "wrong": (await browser.change(**{"X-CSRF-Token": csrf[::-1]})).status_code,
        "of the form": (await browser.change(**{"X-CSRF-Token": find_csrf(page.text)})).status_code,
        "foreign": (await browser.change(**{"X-CSRF-Token": csrf, "Origin": "http://evil.test"})).status_code,
        "null": (await browser.change(**{"X-CSRF-Token": csrf, "Origin": "null"})).status_code,
        "other port": (await browser.change(**{"X-CSRF-Token": csrf, "Origin": "http://127.0.0.1:1"})).status_code,
        "cross-site": (await browser.change(**{"X-CSRF-Token": csrf, "Sec-Fetch-Site": "cross-site"})).status_code,
        "right": (await browser.change(**{"X-CSRF-Token": csrf})).status_code,
    }
    assert statuses == {**dict.fromkeys(statuses, 403), "right": 400}
    # A viewer's rights are those of the role, in a browser, too.
    assert (await browser.change("/-/reload", **{"X-CSRF-Token": csrf})).json()["error"]["code"] == "forbidden"
    first = browser.session
    assert (await browser.send("/sign-out", {"csrf": "x"})).status_code == 403
    assert (await browser.send("/sign-out", {"csrf": csrf})).status_code == 303
    browser.set_session(first)
    assert (await browser.open("/")).status_code == 303
    # With another session, the token of the first one is a replayed one.
    await browser.sign_in("operator", "operator")
    assert browser.session != first
    replayed = await browser.change(**{"X-CSRF-Token": csrf})
    assert replayed.json()["error"]["code"] == "csrf"

    async def is_recorded() -> bool:
        entries = {(each["event"], each["name"], each["outcome"], each["means"]) for each in await audit(loop)}
        outcomes = (("sign_in", "done"), ("sign_in", "refused"), ("sign_out", "done"))
        return {(event, "operator", outcome, "console") for event, outcome in outcomes} <= entries

    await eventually(is_recorded)


async def test_the_page_for_signing_in_does_not_show_which_secrets_are_right(loop: Loop, browser: Browser) -> None:
    """Masking what the client has sent would confirm a guess."""
    await start_with_users(loop)
    for guess in (WEBHOOK_TOKEN, loop.stack.token, "nonsense"):
        assert f'name="next" value="a.{guess}.b"' in (await browser.open(f"/sign-in?next=a.{guess}.b")).text


async def test_a_session_id_is_never_taken_from_the_browser(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    browser.set_session("fixed-by-somebody")
    assert (await browser.sign_in("viewer", "viewer")).status_code == 303
    assert browser.session != "fixed-by-somebody"
    before = browser.session
    assert (await browser.sign_in("viewer", "viewer")).status_code == 303
    assert browser.session != before
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        ended = await client.get(browser.url, headers={"Cookie": f"defib_session={before}"})
        assert ended.status_code == 401
    for query in ("token", "access_token", "session"):
        value = loop.stack.token if "token" in query else browser.session
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
            assert (await client.get(f"{browser.url}/api/v1/incidents?{query}={value}")).status_code == 401


async def test_a_form_without_its_cookie_is_refused(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    page = await browser.open("/sign-in")
    form = {"user": "admin", "password": "admin", "csrf": find_csrf(page.text)}
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, base_url=browser.url) as other:
        answer = await other.post("/sign-in", data=form)
        assert (answer.status_code, "defib_session" in other.cookies) == (403, False)
    for next_ in (
        "//evil.test",
        "https://evil.test",
        "/\\evil.test",
        "\\\\evil.test",
        "javascript:alert(1)",
        "%0d%0aX: y",
    ):
        done = await browser.sign_in("admin", "admin", next_)
        assert (
            urlsplit(urljoin(f"{browser.url}/sign-in", done.headers["Location"])).netloc == urlsplit(browser.url).netloc
        )
        assert "evil" not in done.headers["Location"]


async def test_the_names_of_the_server(loop: Loop, browser: Browser) -> None:
    users = write_users(loop.folder, {"viewer": "viewer"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    notify = {"links": {"remediator": "https://defib.example.com/"}}
    await loop.start({"web": loop.service("web")}, access={"hosts": ["known.test"]}, notify=notify)
    for program, path in (
        ("exporter", "/metrics"),
        ("exporter", "/api/v1/services"),
        ("remediator", "/"),
        ("remediator", "/sign-in"),
    ):
        statuses = {}
        for host in (
            "evil.test", "evil.test:80", "127.0.0.1.evil.test", "defib.example.com", "known.test", "KNOWN.test.:1234",
            "localhost", "[::1]:9", "10.1.2.3",
        ):  # fmt: skip
            headers = {"Host": host, **basic("viewer", "viewer")}
            answer = await browser.client.get(f"{loop.stack.url(program)}{path}", headers=headers)
            statuses[host] = answer.status_code
        refused = ["evil.test", "evil.test:80", "127.0.0.1.evil.test"]
        if program == "exporter":
            refused.append("defib.example.com")
        assert statuses == {host: 403 if host in refused else 200 for host in statuses}, program
        headers = {"Host": "evil.test", **bearer(loop.stack.token)}
        answer = await browser.client.get(f"{loop.stack.url(program)}{path}", headers=headers)
        assert answer.status_code == (403 if path == "/sign-in" else 200)  # where no token is checked, none counts
        # A page whose own name leads to this server can make up a token.
        headers = {"Host": "evil.test", **bearer("made-up")}
        answer = await browser.client.get(f"{loop.stack.url(program)}{path}", headers=headers)
        assert answer.status_code == (403 if path == "/sign-in" else 401)
        assert (await browser.client.get(f"{loop.stack.url(program)}/-/healthy", headers=headers)).status_code == 200
    # Behind a proxy that ends TLS, the cookie is for TLS only.
    browser.client.headers["Host"] = "defib.example.com"
    page = await browser.open("/sign-in")
    cookie = page.headers["Set-Cookie"]
    assert cookie.startswith("__Host-defib_sign_in=")
    assert "Secure" in cookie


async def test_what_other_sites_may_request(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    await browser.sign_in("admin", "admin")
    statuses = {
        (mode, destination): (
            await browser.client.get(
                "/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": destination}
            )
        ).status_code
        for mode, destination in (
            ("navigate", "document"), ("navigate", "iframe"), ("no-cors", "image"), ("cors", "empty"),
        )
    }  # fmt: skip
    assert statuses == {
        ("navigate", "document"): 200, ("navigate", "iframe"): 403, ("no-cors", "image"): 403, ("cors", "empty"): 403,
    }  # fmt: skip
    form = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await browser.client.post("/sign-in", data={}, headers=form)).status_code == 403
    # A password that a browser adds by itself protects nothing.
    headers = {**basic("admin", "admin"), "Origin": "http://evil.test"}
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        url = f"{browser.url}/api/v1/automation"
        assert (await client.put(url, json={"enabled": False}, headers=headers)).status_code == 403


async def test_failed_attempts_are_throttled(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    answers = [await browser.sign_in("operator", f"guess {number}") for number in range(6)]
    assert [answer.status_code for answer in answers] == [401] * 5 + [429]
    assert int(answers[-1].headers.get("Retry-After", "1")) >= 1
    assert "Too many failed attempts. Try again in" in answers[-1].text
    # The right password is not tried either, and other users are not locked out.
    assert (await browser.sign_in("operator", "operator")).status_code == 429
    other = Browser(browser.url)
    assert (await other.sign_in("viewer", "viewer")).status_code == 303

    async def counted() -> bool:
        refused = [each for each in await audit(loop) if each["outcome"] == "refused" and each["name"] == "operator"]
        return {each["detail"] for each in refused} == {"wrong user or password", "too many failed attempts"}

    await eventually(counted)
    await other.client.aclose()

    async def has_access_again() -> bool:
        return (await browser.sign_in("operator", "operator")).status_code == 303

    await eventually(has_access_again)


async def test_a_session_ends_with_its_user_and_outlasts_a_restart(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    others = [Browser(browser.url) for _ in range(2)]
    for each, user in zip((browser, *others), ("operator", "viewer", "admin"), strict=True):
        assert (await each.sign_in(user, user)).status_code == 303
    await loop.restart_remediator()
    assert [(await each.open("/")).status_code for each in (browser, *others)] == [200, 200, 200]
    listed = (await loop.ask("GET", "/api/v1/sessions")).json()["sessions"]
    assert {each["user"] for each in listed} == {"operator", "viewer", "admin"}
    assert not [each for each in (browser, *others) if each.session in json.dumps(listed)]
    (viewers,) = [each["id"] for each in listed if each["user"] == "viewer"]
    assert (await loop.ask("DELETE", f"/api/v1/sessions/{viewers}")).status_code == 200
    assert (await others[0].open("/")).status_code == 303
    # One user is removed, the other has another password.
    path = write_users(loop.folder, {"viewer": "viewer", "admin": "admin"})
    written = yaml.safe_load(path.read_text())
    written["basic_auth_users"]["admin"] = bcrypt.hashpw(b"another", bcrypt.gensalt(4)).decode()
    path.write_text(yaml.safe_dump(written))

    async def ended() -> bool:
        return [(await each.open("/")).status_code for each in (browser, others[1])] == [303, 303]

    await eventually(ended)
    await loop.restart_remediator()
    assert [(await each.open("/")).status_code for each in (browser, *others)] == [303, 303, 303]
    for each in others:
        await each.client.aclose()


async def test_live_updates_end_with_the_credential(loop: Loop) -> None:
    """Whatever the credential is, nothing more is sent soon after it was withdrawn, and others stay connected."""
    users = {"ann": "viewer", "bob": "operator", "eve": "operator", "ida": "viewer", "joe": "viewer", "stays": "viewer"}
    path = write_users(loop.folder, users)
    loop.stack.options = {"remediator": ["--web.config.file", str(path)]}
    proxy = {"addresses": ["127.0.0.7"], "user_header": "X-Remote-User", "default_role": "viewer"}
    await loop.start({"web": loop.service("web")}, access={"proxy": proxy})
    url = loop.stack.url("remediator")
    browsers = {user: Browser(url) for user in ("ann", "ida")}
    for user, each in browsers.items():
        assert (await each.sign_in(user, user)).status_code == 303
    cookies = {user: {"Cookie": f"defib_session={each.session}"} for user, each in browsers.items()}
    local, kept = loop.stack.token, await create_token(loop, "kept", "viewer")
    withdrawn = {
        "revoked token": bearer(await create_token(loop, "revoked", "viewer")),
        "expired token": bearer(await create_token(loop, "expired", "viewer", expires_in="10s")),
        "replaced local token": bearer(local),
        "removed user": basic("bob", "bob"),
        "user with another role": basic("eve", "eve"),
        "user with another password": basic("joe", "joe"),
        "ended session": cookies["ann"],
        "session of a removed user": cookies["ida"],
        "user of a proxy": {"X-Remote-User": "ann"},
    }
    valid = {"token": bearer(kept), "user": basic("stays", "stays")}
    ended: set[str] = set()
    beats: Counter[str] = Counter()
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client, asyncio.TaskGroup() as streams:

        async def read(name: str, headers: dict[str, str]) -> None:
            through_proxy = httpx.AsyncHTTPTransport(verify=NO_TLS, local_address="127.0.0.7")
            async with (
                httpx.AsyncClient(timeout=120, transport=through_proxy) if "proxy" in name else nullcontext(client)
            ) as own, own.stream("GET", f"{url}/stream", headers=headers) as answer:  # fmt: skip
                assert answer.status_code == 200, name
                async for _ in answer.aiter_lines():
                    beats[name] += 1
            ended.add(name)

        tasks = [streams.create_task(read(name, headers)) for name, headers in (withdrawn | valid).items()]

        async def all_are_open() -> bool:
            return len(beats) == len(tasks)

        async def withdrawn_ended() -> bool:
            return ended >= withdrawn.keys()

        async def others_go_on() -> bool:
            return all(beats[name] > seen[name] for name in valid)

        await eventually(all_are_open)
        assert (await loop.ask("DELETE", "/api/v1/tokens/revoked")).status_code == 200
        listed = (await loop.ask("GET", "/api/v1/sessions")).json()["sessions"]
        (of_ann,) = [each["id"] for each in listed if each["user"] == "ann"]
        assert (await loop.ask("DELETE", f"/api/v1/sessions/{of_ann}")).status_code == 200
        configured = loop.folder / "config" / "defib.yaml"
        document = yaml.safe_load(configured.read_text())
        del document["access"]["proxy"]
        configured.write_text(yaml.safe_dump(document))
        assert (await loop.ask("POST", "/-/reload")).status_code == 200
        written = yaml.safe_load(path.read_text())
        for user in ("bob", "ida"):
            del written["basic_auth_users"][user], written["roles"][user]
        written["roles"]["eve"] = "viewer"
        written["basic_auth_users"]["joe"] = bcrypt.hashpw(b"another", bcrypt.gensalt(4)).decode()
        path.write_text(yaml.safe_dump(written))
        loop.stack.token_file.write_text("another-token")
        # Without the check, streams of credentials other than sessions would last for a minute.
        await eventually(withdrawn_ended, 30)
        seen = dict(beats)
        await eventually(others_go_on)
        assert ended == withdrawn.keys()
        for task in tasks:
            task.cancel()
    for each in browsers.values():
        await each.client.aclose()


async def follow(browser: Browser, answer: httpx.Response) -> httpx.Response:
    """Follow a redirect of the service back to the server, as a link of another site."""
    headers = {**PAGE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    return await browser.client.get(answer.headers["Location"], headers=headers)


async def test_signing_in_with_openid_connect(loop: Loop, browser: Browser, launcher: Launcher) -> None:
    (port,) = reserve_ports(1)
    provider = f"http://localhost:{port}"
    users = [
        {"sub": "1", "preferred_username": "ann", "groups": ["staff", "sre"]},
        {"sub": "2", "preferred_username": "bob", "groups": ["staff"]},
    ]
    claims = [argument for user in users for argument in ("--user-claims", json.dumps(user))]
    argv = [sys.executable, "-W", "ignore", "-m", "oidc_provider_mock", "--port", str(port), *claims]
    pid = await launcher.start(argv, loop.folder / "provider.log")

    async def is_ready() -> bool:
        try:
            (await asyncio.open_connection("localhost", port))[1].close()
        except OSError:
            return False
        return True

    await eventually(is_ready)
    oidc = {
        "issuer": provider, "client_id": "defib", "client_secret": "client-s3cret", "name": "Keycloak",
        "roles": {"sre": "operator"},
    }  # fmt: skip
    await loop.start({"web": loop.service("web")}, access={"oidc": oidc})
    assert await read_doctor(loop, "access.oidc") == [("pass", provider)]
    assert "Sign in with Keycloak" in (await browser.open("/sign-in")).text

    async def sign_in(sub: str, next_: str = "") -> httpx.Response:
        redirect = await browser.open(f"/sign-in/oidc?next={next_}")
        assert redirect.status_code == 303
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
            return await client.post(redirect.headers["Location"], data={"sub": sub})

    back = await sign_in("1", "incidents/3")
    done = await follow(browser, back)
    assert (done.status_code, done.headers["Location"]) == (303, "./../../incidents/3")
    assert "ann (oidc) <small>operator</small>" in (await browser.open("/")).text
    # Neither the redirect nor its code works again, or in another browser.
    assert (await follow(browser, back)).status_code == 401
    other = Browser(browser.url)
    assert (await follow(other, await sign_in("1"))).status_code == 401
    await other.client.aclose()
    assert (await browser.open("/sign-in/oidc/callback?error=access_denied&state=x")).status_code == 401
    # A user without a group that has a role.
    refused = await follow(browser, await sign_in("2"))
    assert (refused.status_code, "bob has no role in Defib" in refused.text) == (403, True)
    entries = {(each["event"], each["name"], each["outcome"], each["detail"]) for each in await audit(loop)}
    assert ("sign_in", "ann (oidc)", "done", "") in entries
    log = loop.stack.log_path("remediator").read_text()
    assert not [
        secret
        for secret in ("client-s3cret", parse_qs(urlsplit(back.headers["Location"]).query)["code"][0])
        if secret in log
    ]
    # After the provider was started again, it signs with another key.
    await launcher.kill(pid, signal.SIGKILL)
    ((result, detail),) = await read_doctor(loop, "access.oidc")
    assert (result, "ConnectError" in detail) == ("fail", True)
    await launcher.start(argv, loop.folder / "provider.log")
    await eventually(is_ready)

    async def signs_in() -> bool:
        return (await follow(browser, await sign_in("1"))).status_code == 303

    await eventually(signs_in)
    # The role is that of the configuration in force.
    await reload_with(loop, oidc | {"roles": {"sre": "viewer"}})
    assert "ann (oidc) <small>viewer</small>" in (await browser.open("/")).text
    await reload_with(loop, oidc | {"roles": {"others": "viewer"}})
    assert (await browser.open("/")).status_code == 303
    # Another provider does not vouch for those who signed in with the one before.
    await reload_with(loop, oidc)
    assert (await follow(browser, await sign_in("1"))).status_code == 303
    assert (await browser.open("/")).status_code == 200
    await reload_with(loop, oidc | {"issuer": f"{provider}/others"})
    assert (await browser.open("/")).status_code == 303


async def read_doctor(loop: Loop, subject: str) -> list[tuple[str, str]]:
    argv = [sys.executable, "-m", "defib", "doctor", "--json", "--config", str(loop.folder / "config")]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=200, check=False)
    assert "Deprecat" not in done.stderr
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["findings"]
    return [(each["result"], each["detail"]) for each in found if each["subject"] == subject]


async def reload_with(loop: Loop, oidc: dict[str, Any]) -> None:
    path = loop.folder / "config" / "defib.yaml"
    written = yaml.safe_load(path.read_text())
    written["access"]["oidc"] = oidc
    path.write_text(yaml.safe_dump(written))
    assert (await loop.ask("POST", "/-/reload")).status_code == 200


async def test_signing_in_with_feishu(loop: Loop, browser: Browser) -> None:
    feishu = FeishuOAuth()
    await feishu.start()
    settings = {
        "app_id": APP_ID, "app_secret": APP_SECRET, "tenant_key": TENANT, "url": feishu.url, "authorize_url": feishu.url,
    }  # fmt: skip
    people = {"ann": {"open_id": "ou_ann", "role": "admin"}, "bob": {"open_id": "ou_bob"}}
    await loop.start({"web": loop.service("web")}, access={"feishu": settings}, notify={"people": people})

    async def sign_in(user: FeishuUser) -> httpx.Response:
        feishu.user = user
        redirect = await browser.open("/sign-in/feishu")
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
            back = await client.get(redirect.headers["Location"])
        return await follow(browser, back)

    assert (await sign_in(FeishuUser("ou_ann", "Ann"))).status_code == 303
    assert "ann (feishu) <small>admin</small>" in (await browser.open("/")).text
    statuses = {
        "person without a role": (await sign_in(FeishuUser("ou_bob", "Bob"))).status_code,
        "stranger": (await sign_in(FeishuUser("ou_eve", "ann"))).status_code,
        "other tenant": (await sign_in(FeishuUser("ou_ann", "Ann", "another"))).status_code,
        "may not use the app": (await sign_in(FeishuUser("ou_ann", "Ann", may_use_app=False))).status_code,
    }
    assert statuses == {
        "person without a role": 403, "stranger": 403, "other tenant": 401, "may not use the app": 401,
    }  # fmt: skip
    assert APP_SECRET not in loop.stack.log_path("remediator").read_text()
    await feishu.stop()


async def test_a_trusted_proxy_names_the_user(loop: Loop) -> None:
    proxy = {
        "addresses": ["127.0.0.7"], "user_header": "X-Remote-User", "groups_header": "X-Remote-Groups",
        "roles": {"sre": "operator"},
    }  # fmt: skip
    await loop.start({"web": loop.service("web")}, access={"proxy": proxy})
    url = f"{loop.stack.url('remediator')}/api/v1/identity"

    async def read(address: str, **headers: str) -> tuple[int, str | None]:
        transport = httpx.AsyncHTTPTransport(verify=NO_TLS, local_address=address)
        async with httpx.AsyncClient(transport=transport, timeout=120) as client:
            answer = await client.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
            return answer.status_code, answer.json().get("role")

    assert await read("127.0.0.7", X_Remote_User="ann", X_Remote_Groups="staff, sre") == (200, "operator")
    assert await read("127.0.0.8", X_Remote_User="ann", X_Remote_Groups="sre") == (401, None)
    assert await read("127.0.0.7", X_Remote_User="ann", X_Remote_Groups="staff") == (403, None)
    assert await read("127.0.0.7") == (401, None)
    # A name that would be recorded as another one.
    assert await read("127.0.0.7", X_Remote_User="ann (x)", X_Remote_Groups="sre") == (401, None)
    assert await read("127.0.0.7", X_Remote_User="a" * 61, X_Remote_Groups="sre") == (401, None)


async def test_the_audit_log_has_every_operation(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    await browser.sign_in("operator", "operator")
    csrf = await browser.csrf()
    body = {"scope": "host", "name": "uncontrolled", "reason": "a test", "for": "1h"}
    headers = {"X-CSRF-Token": csrf, "Origin": browser.url}
    assert (await browser.client.post("/api/v1/maintenance", json=body, headers=headers)).status_code == 201
    token = await create_token(loop, "ci", "operator")
    async with httpx.AsyncClient(
        verify=NO_TLS, trust_env=False, base_url=browser.url, headers=bearer(token), timeout=120
    ) as script:
        # A name that a header claims is not taken over.
        restarted = await script.post("/api/v1/services/web/restart", headers={"X-Defib-User": "root"})
        assert restarted.status_code == 202, restarted.text
        assert (await script.post("/api/v1/services/none/restart")).status_code == 404
        assert (await script.put("/api/v1/automation", json={"enabled": False})).status_code == 403
        assert (await script.get("/api/v1/services/web/logs")).status_code == 400
    argv = [
        sys.executable,
        "-m",
        "defib",
        "automation",
        "off",
        "--reason",
        "too many",
        "--config",
        str(loop.folder / "config"),
    ]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=200)
    assert (await loop.ask("POST", "/api/v1/services/web/reset")).status_code == 200

    async def written() -> bool:
        return any(each["event"] == "access" for each in await audit(loop))

    await eventually(written)
    entries = await audit(loop)
    seen = {
        (each["event"], each["target"], each["name"].split(" (")[0], each["means"], each["verified"], each["outcome"])
        for each in entries
    }
    assert {
        ("begin maintenance", "host uncontrolled", "operator", "console", True, "done"),
        ("create token", "ci", "local", "cli", False, "done"),
        ("restart", "web", "ci", "token", True, "done"),
        ("restart", "none", "ci", "token", True, "refused"),
        ("access", "PUT /api/v1/automation", "ci", "token", True, "refused"),
        ("logs", "web", "ci", "token", True, "refused"),
        ("automation off", "", "local", "cli", False, "done"),
        ("reset", "web", "local", "cli", False, "done"),
    } <= seen
    (restart,) = [each for each in entries if each["event"] == "restart" and each["outcome"] == "done"]
    assert restart["address"] == "127.0.0.1"
    assert restart["action_state"] in ("running", "succeeded", "failed")
    (action,) = [
        each for each in (await loop.ask("GET", "/api/v1/actions")).json()["actions"] if each["kind"] == "restart"
    ]
    assert action["asked_by"] == "ci (token)"
    (reset,) = [each for each in entries if each["event"] == "reset"]
    assert reset["name"] == "local (ann, unverified)"
    pages = [(await loop.ask("GET", f"/api/v1/audit?limit=1&before={each['id']}")).json()["audit"] for each in entries]
    assert [page[0]["id"] for page in pages[:-1]] == [each["id"] for each in entries[1:]]


async def test_the_commands_for_tokens_sessions_and_the_audit_log(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    await browser.sign_in("operator", "operator")

    async def defib(*arguments: str) -> tuple[int, str, str]:
        done = await asyncio.to_thread(run_defib, *arguments, "--config", str(loop.folder / "config"))
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    status, secret, said = await defib("token", "create", "ci", "--role", "viewer", "--expires", "90d")
    assert (status, secret.startswith("defib_"), "cannot be shown again" in said) == (0, True, True)
    headers = bearer(secret.strip())
    assert (await browser.client.get("/api/v1/identity", headers=headers)).json()["name"] == "ci (token)"
    status, _, said = await defib("token", "create", "ci", "--role", "viewer")
    assert (status, "there is an API token 'ci' already" in said) == (1, True)
    status, _, said = await defib("token", "create", "Bad Name", "--role", "viewer")
    assert (status, "'Bad Name' is not a name: use lower-case letters" in said) == (2, True)
    status, said, _ = await defib("token")
    assert "ci                   viewer" in said
    assert secret.strip() not in said
    assert (await defib("token", "revoke", "none"))[2] == "defib: there is no API token 'none' (there are: ci)\n"
    assert (await defib("token", "revoke", "ci"))[0] == 0
    assert (await browser.client.get("/api/v1/identity", headers=headers)).status_code == 401
    said = (await defib("session"))[1]
    assert "operator (password) at 127.0.0.1" in said
    assert (await defib("session", "end", said.split()[0]))[0] == 0
    assert (await browser.open("/")).status_code == 303
    said = (await defib("audit", "--limit", "50"))[1]
    for text in ("create token ci: done: viewer", "revoke token ci: done", "end session "):
        assert text in said
    assert secret.strip() not in said
    assert len(json.loads((await defib("audit", "--limit", "2", "--json"))[1])["audit"]) == 2


async def test_the_exporter_writes_audit_lines_to_its_log(loop: Loop) -> None:
    await start_with_users(loop)
    url = loop.stack.url("exporter")
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
        assert (await client.post(f"{url}/api/v1/services/web/probe", headers=basic("operator", "operator"))).is_success
        assert (await client.post(f"{url}/-/reload", headers=basic("operator", "operator"))).status_code == 403
        assert (await client.post(f"{url}/-/reload", headers=basic("admin", "admin"))).is_success
        assert (await client.post(f"{url}/-/reload", headers=basic("admin", "no"))).status_code == 401

    async def lines() -> set[tuple[str, str, str]]:
        found = [
            json.loads(line) for line in loop.stack.log_path("exporter").read_text().splitlines() if '"audit"' in line
        ]
        return {(each["operation"], each["name"], each["outcome"]) for each in found}

    async def complete() -> bool:
        return {
            ("probe", "operator", "done"), ("reload", "admin", "done"), ("access", "operator", "refused"),
            ("access", "admin", "refused"),
        } <= await lines()  # fmt: skip

    await eventually(complete)


@pytest.mark.needs("root", "mount")
async def test_with_a_full_disk_people_can_sign_in(loop: Loop, browser: Browser, small_disk: Path) -> None:
    users = write_users(loop.folder, {"admin": "admin"})
    loop.stack.options = {"remediator": ["--web.config.file", str(users)]}
    await loop.start({"web": loop.service("web")}, remediator={"database": f"sqlite:///{small_disk}/r.db"})
    await fill_disk(loop, small_disk)
    assert (await browser.sign_in("admin", "admin")).status_code == 303
    assert "admin <small>admin</small>" in (await browser.open("/")).text
    headers = {"X-CSRF-Token": await browser.csrf(), "Origin": browser.url}
    for method, path, body in (
        ("PUT", "/api/v1/automation", {"enabled": False}), ("POST", "/api/v1/services/web/restart", {}),
        ("POST", "/api/v1/tokens", {"name": "ci", "role": "viewer"}), ("POST", "/api/v1/services/web/reset", {}),
    ):  # fmt: skip
        answer = await browser.client.request(method, path, json=body, headers=headers)
        assert answer.status_code == 503, (path, answer.text)
        assert "cannot write to the record" in answer.json()["error"]["message"]
    assert loop.restarts() == []
    log = loop.stack.log_path("remediator").read_text()
    assert "session_not_stored" in log
    assert "audit_entry_not_stored" in log
