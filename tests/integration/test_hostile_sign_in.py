"""Services for signing in whose answers are hostile: each is a refused sign-in, never an internal error."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx
import pytest
from aiohttp import web
from joserfc import jws
from joserfc.jwk import RSAKey
from pydantic import SecretStr

from fleet.inventory.access import FeishuAccess, OidcAccess
from fleet.inventory.notify import Notify
from remediator.sign_in.feishu import FeishuSignIn
from remediator.sign_in.oidc import OidcSignIn
from remediator.sign_in.registry import create_oidc
from remediator.sign_in.services import Redirect, SignInError, SignInService

KEY = RSAKey.generate_key(2048, {"kid": "k1"})
BODIES = {
    "levels": b"[" * 100_000, "levels that end": b"[" * 900 + b"]" * 900, "levels of maps": b'{"a":' * 100_000,
    "list": b"[]", "text": b'"x"', "number": b"1", "null": b"null", "nothing": b"", "page": b"<html>", "bytes": b"\xff\xfe\x00",
    "map": b"{}", "infinity": b'{"sub": Infinity}', "large number": b'{"sub": ' + b"9" * 5000 + b"}",
}  # fmt: skip
VALUES: dict[str, Any] = {
    "list": [], "levels": json.loads("[" * 400 + "]" * 400), "map": {"a": 1}, "number": 5, "nothing": None, "surrogate": "\ud800",
    "text": "\x00",
}  # fmt: skip


class Provider:
    """Serves documents by path; the one at `hostile` is replaced by `body`."""

    def __init__(self) -> None:
        self.url, self.hostile, self.body = "", "", b""
        self.documents: dict[str, Any] = {}
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        is_hostile = request.path == self.hostile
        body = self.body if is_hostile else json.dumps(self.documents[request.path]).encode()
        return web.Response(body=body, content_type="application/json")


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def a_redirect(service: str) -> Redirect:
    return Redirect(service, secrets.token_hex(), "http://localhost/back", "")


async def try_sign_in(service: SignInService, redirect: Redirect) -> list[str]:
    """Sign in; return the name and groups, or nothing if it was refused. Whatever else is raised fails the test."""
    try:
        user = await service.fetch_user("code", redirect)
    except SignInError as error:
        str(error).encode()
        return []
    finally:
        await service.close()
    for text in (user.name, *user.groups):
        text.encode()  # as it is to be stored
    return [user.name, *user.groups]


async def serve_openid(provider: Provider, nonce: str, claims: Mapping[str, Any] = {}) -> OidcSignIn:
    """Serve all documents of a provider, and return the service for signing in with it."""
    url, now = provider.url, int(time.time())
    user = {"iss": url, "aud": "defib", "sub": "1", "iat": now, "exp": now + 300, "nonce": nonce, **claims}
    token = jws.serialize_compact({"alg": "RS256", "kid": "k1"}, json.dumps(user).encode(), KEY)
    provider.documents = {
        "/.well-known/openid-configuration": {
            "issuer": url, "authorization_endpoint": f"{url}/auth", "token_endpoint": f"{url}/token",
            "jwks_uri": f"{url}/keys", "userinfo_endpoint": f"{url}/user",
        },
        "/keys": {"keys": [KEY.as_dict(private=False)]},
        "/token": {"access_token": "a", "token_type": "Bearer", "id_token": token, "expires_in": 60},
        "/user": {"sub": "1", "groups": ["sre"], "name": "ann"},
    }  # fmt: skip
    secret = SecretStr("client-s3cret")
    settings = OidcAccess(
        issuer=url, client_id="defib", client_secret=secret, user_claim="name", roles={"sre": "viewer"}
    )
    return await asyncio.to_thread(create_oidc, settings)  # as the program does: it loads libraries


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/keys", "/token", "/user"])
async def test_answers_of_an_openid_provider(provider: Provider, path: str) -> None:
    redirect = a_redirect("oidc")
    assert await try_sign_in(await serve_openid(provider, redirect.nonce), redirect) == ["ann", "sre"]
    provider.hostile = path
    for name, provider.body in BODIES.items():
        assert await try_sign_in(await serve_openid(provider, redirect.nonce), redirect) == [], name


@pytest.mark.parametrize("claim", ["sub", "name", "groups", "aud", "iss", "nonce", "exp", "azp"])
async def test_claims_of_an_openid_provider(provider: Provider, claim: str) -> None:
    redirect = a_redirect("oidc")
    for value in VALUES.values():
        for claimed in (value, [value]):
            await try_sign_in(await serve_openid(provider, redirect.nonce, {claim: claimed}), redirect)


async def test_those_who_sign_in_while_the_metadata_is_read_wait_for_it(provider: Provider) -> None:
    redirect = a_redirect("oidc")
    service = await serve_openid(provider, redirect.nonce)
    urls = await asyncio.gather(*(service.create_url(redirect) for _ in range(5)))
    assert len(set(urls)) == 1
    assert provider.asked.count("/.well-known/openid-configuration") == 1
    await service.close()


async def test_metadata_that_could_not_be_read_are_read_again_after_a_while(provider: Provider) -> None:
    redirect = a_redirect("oidc")
    service = await serve_openid(provider, redirect.nonce)
    provider.hostile, provider.body = "/keys", b"nonsense"
    outcomes = await asyncio.gather(*(service.create_url(redirect) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(each, SignInError) for each in outcomes)
    assert provider.asked.count("/keys") == 1
    await service.close()


INVISIBLE = "\u034f\u115f\u1160\u17b4\u180b\u2065\u2800\u3164\ufe00\ufe0f\uffa0\U0001d173\U000e0001\U000e0100\U000e0fff"


@pytest.mark.parametrize(
    ("claims", "signed_in"),
    [
        ({"name": "Ann Smith"}, ["Ann Smith", "sre"]),
        ({"name": "安"}, ["安", "sre"]),
        ({"name": "", "sub": "1"}, ["1", "sre"]),
        ({"name": "Jos\u00e9"}, ["Jos\u00e9", "sre"]),
        ({"name": "Jose\u0301"}, []),  # the same name in other characters
        *(({"name": f"ann{each}"}, []) for each in INVISIBLE),
        ({"name": "an\u200bn"}, []),
        ({"name": "an\xa0n"}, []),
        ({"name": " ann"}, []),
        ({"name": "ann (password)"}, []),
        ({"name": "a" * 60}, ["a" * 60, "sre"]),
        ({"name": "a" * 61}, []),
    ],
)
async def test_different_people_never_get_one_name(
    provider: Provider, claims: dict[str, str], signed_in: list[str]
) -> None:
    redirect = a_redirect("oidc")
    assert await try_sign_in(await serve_openid(provider, redirect.nonce, claims), redirect) == signed_in


async def test_values_of_an_openid_provider(provider: Provider) -> None:
    """Every value in every document of the provider."""
    redirect = a_redirect("oidc")
    await serve_openid(provider, redirect.nonce)
    for path, document in provider.documents.items():
        for key in document:
            for value in VALUES.values():
                service = await serve_openid(provider, redirect.nonce)
                provider.documents[path] = {**provider.documents[path], key: value}
                with suppress(SignInError):
                    await service.create_url(redirect)
                await try_sign_in(service, redirect)


@pytest.mark.parametrize("path", ["/open-apis/authen/v2/oauth/token", "/open-apis/authen/v1/user_info"])
async def test_answers_of_feishu(provider: Provider, path: str) -> None:
    redirect = a_redirect("feishu")
    settings = FeishuAccess(app_id="cli_a", app_secret=SecretStr("s3cret"), tenant_key="t", url=provider.url)
    user = {"open_id": "ou_ann", "tenant_key": "t", "name": "Ann"}
    good: dict[str, Any] = {
        "/open-apis/authen/v2/oauth/token": {"code": 0, "access_token": "a"},
        "/open-apis/authen/v1/user_info": {"code": 0, "data": user},
    }
    async with httpx.AsyncClient(trust_env=False) as client:
        service = FeishuSignIn(settings, Notify, client)
        provider.documents = good
        assert await try_sign_in(service, redirect) == ["Ann ou_ann", "ou_ann"]
        for value in VALUES.values():
            for key in good[path]:
                provider.documents = {**good, path: {**good[path], key: value}}
                await try_sign_in(service, redirect)
            for key in user:
                provider.documents = {
                    **good,
                    "/open-apis/authen/v1/user_info": {"code": 0, "data": {**user, key: value}},
                }
                await try_sign_in(service, redirect)
        provider.documents, provider.hostile = good, path
        for name, provider.body in BODIES.items():
            assert await try_sign_in(service, redirect) == [], name
