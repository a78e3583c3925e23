"""Signing in with OpenID Connect: the authorization code flow with PKCE.

Specification: https://openid.net/specs/openid-connect-core-1_0.html
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx2
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from fleet.inventory.access import OidcAccess
from fleet.inventory.endpoints import check_url
from fleet.json_client import create_ssl_context
from remediator.sign_in.services import Redirect, SignedInUser, SignInError
from runtime.access.proxy import RoleMap
from runtime.access.roles import Role, can_be_recorded
from runtime.http_clients import limit_interim_responses
from runtime.payloads import load_json, read_body, replace_surrogates

TIMEOUT, DEADLINE = 10.0, 20.0  # seconds for each request, and for all of a sign-in
METADATA_FOR, KEYS_AGAIN_AFTER = 3600.0, 10.0  # seconds for which the provider's metadata and keys are used
FAILURE_FOR = 5.0  # seconds after a failure until the metadata is read again
RESPONSE_LIMIT = 1024 * 1024  # bytes
LEEWAY = 60  # seconds by which the clocks may differ
# Signatures by the provider's private key only: `none` and shared secrets are not among them.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA")
# What reading an answer raises; of one with too many levels RecursionError.
_BAD_ANSWER = (
    httpx2.HTTPError, httpx2.InvalidURL, JoseError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip


class OidcSignIn:
    def __init__(self, settings: OidcAccess) -> None:
        self._settings = settings
        self._client = AsyncOAuth2Client(
            settings.client_id, settings.client_secret.get_secret_value(), scope=" ".join(settings.scopes),
            code_challenge_method="S256", timeout=TIMEOUT, follow_redirects=False,
            verify=create_ssl_context(settings.issuer, settings.tls), headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [_limit_response]},
        )  # fmt: skip
        limit_interim_responses(self._client)
        self._loading = asyncio.Lock()
        self._metadata: Mapping[str, Any] = {}
        self._keys: KeySet | None = None
        self._loaded_at = self._failed_at = float("-inf")
        self._roles = RoleMap(settings.roles, settings.default_role)

    @property
    def title(self) -> str:
        return self._settings.name

    async def create_url(self, redirect: Redirect) -> str:
        async with _deadline():
            metadata = await self._load()
        url, _ = self._client.create_authorization_url(
            metadata["authorization_endpoint"],
            redirect.state,
            code_verifier=redirect.code_verifier,
            nonce=redirect.nonce,
            redirect_uri=redirect.redirect_uri,
        )
        return str(url)

    async def fetch_user(self, code: str, redirect: Redirect) -> SignedInUser:
        async with _deadline():
            return await self._fetch_user(code, redirect)

    async def _fetch_user(self, code: str, redirect: Redirect) -> SignedInUser:
        metadata = await self._load()
        try:
            token = await self._client.fetch_token(
                metadata["token_endpoint"], grant_type="authorization_code", code=code,
                code_verifier=redirect.code_verifier, redirect_uri=redirect.redirect_uri,
            )  # fmt: skip
            claims = await self._read_id_token(token, redirect.nonce)
            claims = {**await self._read_userinfo(token, claims), **claims}
            name = str(claims.get(self._settings.user_claim) or claims["sub"])
        except (OAuthError, *_BAD_ANSWER) as error:
            raise SignInError(f"the provider's response was refused: {_describe(error)}") from error
        if not can_be_recorded(name):
            raise SignInError(
                "the user's name at the provider is longer than 60 characters, or has invisible characters, accents as "
                "characters of their own (not NFC), parentheses or spaces around it: set access.oidc.user_claim to "
                "another claim"
            )
        return SignedInUser(name, _find_groups(claims, self._settings.groups_claim))

    @property
    def provider(self) -> str:
        return f"{self._settings.issuer.rstrip('/')} {self._settings.client_id}"

    def find_role(self, groups: Sequence[str]) -> Role | None:
        return self._roles.find(groups)

    async def check(self) -> None:
        """Raise SignInError if the provider's metadata cannot be used."""
        async with _deadline():
            await self._load()

    async def close(self) -> None:
        await self._client.aclose()

    async def _load(self) -> Mapping[str, Any]:
        """Return the provider's metadata, with its keys loaded. Raises SignInError."""
        if time.monotonic() - self._loaded_at < METADATA_FOR:
            return self._metadata
        async with self._loading:  # those who sign in meanwhile wait for it
            if time.monotonic() - self._loaded_at >= METADATA_FOR:
                await self._read_metadata()
            return self._metadata

    async def _read_metadata(self) -> None:
        issuer = self._settings.issuer.rstrip("/")
        if time.monotonic() - self._failed_at < FAILURE_FOR:
            raise SignInError(f"cannot read the metadata of {issuer}; it failed a moment ago")
        try:
            self._metadata, self._keys = await self._fetch_metadata(issuer)
        except BaseException:  # also if it takes too long, and is cancelled
            self._failed_at = time.monotonic()
            raise
        self._loaded_at, self._failed_at = time.monotonic(), float("-inf")

    async def _fetch_metadata(self, issuer: str) -> tuple[Mapping[str, Any], KeySet]:
        """Return the provider's metadata and keys. Raises SignInError."""
        try:
            metadata: dict[str, Any] = await self._get(f"{issuer}/.well-known/openid-configuration")
            if str(metadata["issuer"]).rstrip("/") != issuer:
                raise SignInError(f"the provider's issuer is {metadata['issuer']!r}, not access.oidc.issuer")
            for endpoint in ("authorization_endpoint", "token_endpoint"):
                check_url(metadata[endpoint])
            return metadata, KeySet.import_key_set(await self._get(metadata["jwks_uri"]))
        except _BAD_ANSWER as error:
            raise SignInError(f"cannot read the metadata of {issuer}: {_describe(error)}") from error

    async def _get(self, url: str, access_token: str = "") -> Any:
        headers = {"Authorization": f"Bearer {access_token}"} if access_token else {}
        response = await self._client.request("GET", url, withhold_token=True, headers=headers)
        response.raise_for_status()
        return load_json(response.content)

    async def _read_id_token(self, token: Mapping[str, Any], nonce: str) -> dict[str, Any]:
        """Return the verified claims of the ID token."""
        supported = self._metadata.get("id_token_signing_alg_values_supported", ["RS256"])
        registry = JWSRegistry(algorithms=[name for name in ALGORITHMS if name in supported], strict_check_header=False)
        assert self._keys is not None  # noqa: S101 - loaded with the metadata
        try:
            decoded = jwt.decode(token["id_token"], self._keys, registry=registry)
        except (InvalidKeyIdError, BadSignatureError):  # the provider may have new keys, with or without names
            if time.monotonic() - self._loaded_at < KEYS_AGAIN_AFTER:
                raise
            self._loaded_at = float("-inf")
            await self._load()
            decoded = jwt.decode(token["id_token"], self._keys, registry=registry)
        claims = CodeIDToken(
            decoded.claims,
            decoded.header,
            {
                "iss": {"essential": True, "values": [self._metadata["issuer"]]},
                "aud": {"essential": True, "value": self._settings.client_id},
            },
            {"nonce": nonce, "client_id": self._settings.client_id, "access_token": token.get("access_token")},
        )
        claims.validate(leeway=LEEWAY)
        return dict(claims)

    async def _read_userinfo(self, token: Mapping[str, Any], claims: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the provider says of the user if the ID token does not have their groups."""
        endpoint = self._metadata.get("userinfo_endpoint")
        if endpoint is None or _find_groups(claims, self._settings.groups_claim):
            return {}
        info = await self._get(endpoint, str(token["access_token"]))
        if info["sub"] != claims["sub"]:
            raise ValueError("the user information is of another user")
        return dict(info)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """Raise SignInError if the provider takes too long: httpx limits only the time for each part of a response."""
    try:
        async with asyncio.timeout(DEADLINE):
            yield
    except TimeoutError as error:
        raise SignInError(f"the provider did not answer within {DEADLINE:g} s") from error


async def _limit_response(response: httpx2.Response) -> None:
    """Refuse a long response before it is read, and one that is compressed, which was not asked for."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise httpx2.DecodingError("unexpected content encoding", request=response.request)
    body = bytearray()
    if not await read_body(cast("Any", response), body, RESPONSE_LIMIT):  # which httpx and httpx2 have alike
        raise httpx2.DecodingError("the response is too long", request=response.request)
    response._content = bytes(body)  # noqa: SLF001 - so that httpx does not read it again


def _find_groups(claims: Mapping[str, Any], path: str) -> list[str]:
    """Return the groups in a claim; `realm_access.roles` is one inside another."""
    value: Any = claims if path not in claims else {path: claims[path]}
    for part in [path] if path in claims else path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    names = value if isinstance(value, list) else [value]
    return [replace_surrogates(name) for name in names if isinstance(name, str)]


def _describe(error: Exception) -> str:
    """Return what is known of an error, without the response, which may contain tokens."""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, OAuthError):
        return f"{error.error}"[:100]
    detail = f": {error}" if isinstance(error, JoseError | ValueError) else ""
    return f"{type(error).__name__}{detail}"[:200]
