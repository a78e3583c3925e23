"""The doctor's check of the service for signing in with OpenID Connect."""

from collections.abc import Sequence

from defib.doctor.findings import Finding
from fleet.inventory.model import Inventory
from remediator.sign_in.registry import create_oidc
from remediator.sign_in.services import SignInError
from runtime.errors import StartError


async def check_sign_in(inventory: Inventory) -> Sequence[Finding]:
    """Check that the provider of OpenID Connect answers with the metadata and keys that signing in needs."""
    settings = inventory.access.oidc
    if settings is None:
        return []
    fix = "correct access.oidc.issuer, or start the provider"
    try:
        service = create_oidc(settings)
    except StartError as error:
        return [Finding("access.oidc", "provider", "fail", str(error), fix)]
    try:
        await service.check()
    except SignInError as error:
        return [Finding("access.oidc", "provider", "fail", str(error), fix)]
    finally:
        await service.close()
    return [Finding("access.oidc", "provider", "pass", settings.issuer)]
