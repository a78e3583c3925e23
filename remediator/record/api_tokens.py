"""API tokens in the record. They are held in memory, too: see `runtime.access.tokens.ApiTokens`."""

from collections.abc import Mapping

from sqlalchemy import insert, select, update

from remediator.record.schema import api_tokens
from remediator.record.transaction import Transaction
from runtime.access.tokens import ApiToken

_IN_FORCE = api_tokens.c.revoked_at.is_(None)


def read_all(tx: Transaction) -> list[ApiToken]:
    """Return the tokens that were not revoked, in the order of their names."""
    columns = [api_tokens.c[name] for name in ApiToken.__dataclass_fields__]
    rows = tx.execute(select(*columns).where(_IN_FORCE).order_by(api_tokens.c.name))
    return [ApiToken(**row) for row in rows.mappings()]


def create(tx: Transaction, token: ApiToken) -> bool:
    """Store a token; False if there is one of that name."""
    if tx.scalar(select(api_tokens.c.id).where(_IN_FORCE, api_tokens.c.name == token.name)) is not None:
        return False
    row = {name: getattr(token, name) for name in ApiToken.__dataclass_fields__}
    tx.execute(insert(api_tokens).values(**row))
    return True


def revoke(tx: Transaction, name: str, by: str) -> bool:
    """Revoke a token; False if there is none of that name."""
    revoked = update(api_tokens).where(_IN_FORCE, api_tokens.c.name == name).values(revoked_at=tx.now, revoked_by=by)
    return bool(tx.execute(revoked).rowcount)


def store_uses(tx: Transaction, uses: Mapping[str, float]) -> None:
    """Store when tokens were last used, by their digests."""
    for digest, at in uses.items():
        tx.execute(update(api_tokens).where(api_tokens.c.digest == digest).values(last_used_at=at))
