"""The services for signing in that the configuration has."""

import asyncio
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import httpx

from fleet.inventory.access import Access, FeishuAccess, OidcAccess
from fleet.inventory.notify import Notify
from remediator.sign_in.feishu import FeishuSignIn
from remediator.sign_in.services import SignInService
from runtime.access.roles import Role, SignInMethod

if TYPE_CHECKING:
    from remediator.sign_in.oidc import OidcSignIn


class SignInServices(Mapping[str, SignInService]):
    """The services by name, `oidc` and `feishu`, as the configuration in force has them."""

    def __init__(self, notify: Callable[[], Notify], client: httpx.AsyncClient) -> None:
        self._notify, self._client = notify, client
        self._services: dict[str, SignInService] = {}
        self._settings: tuple[OidcAccess | None, FeishuAccess | None] = (None, None)

    def __getitem__(self, name: str) -> SignInService:
        return self._services[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._services)

    def __len__(self) -> int:
        return len(self._services)

    async def apply(self, access: Access) -> None:
        """Use the services of another configuration. Raises StartError."""
        if self._settings == (access.oidc, access.feishu):
            return
        services: dict[str, SignInService] = {}
        if access.oidc is not None:
            services["oidc"] = await asyncio.to_thread(create_oidc, access.oidc)
        if access.feishu is not None:
            services["feishu"] = FeishuSignIn(access.feishu, self._notify, self._client)
        former, self._services = self._services, services
        self._settings = (access.oidc, access.feishu)
        await _close(former)

    def find_role(self, method: SignInMethod, provider: str, groups: Sequence[str]) -> Role | None:
        """Return the present role of a user by their groups at the provider where they signed in; None without one."""
        service = self._services.get(method)
        return service.find_role(groups) if service is not None and service.provider == provider else None

    async def close(self) -> None:
        await _close(self._services)


def create_oidc(settings: OidcAccess) -> "OidcSignIn":
    """Return the service of OpenID Connect, whose library takes long to load. Raises StartError."""
    with warnings.catch_warnings(record=True):  # authlib announces its next versions when it is loaded
        from remediator.sign_in.oidc import OidcSignIn
    return OidcSignIn(settings)


async def _close(services: Mapping[str, SignInService]) -> None:
    for service in services.values():
        await service.close()
