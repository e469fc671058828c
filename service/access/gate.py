"""Lets in who has a key of the right scope, as often as the key allows."""

from __future__ import annotations

from service.access.caller import Caller, Scope
from service.access.keyring import Keyring
from service.access.rates import Rates
from service.errors import Forbidden, Overloaded, Unauthorized

CHALLENGE = "www-authenticate"
REALM = 'Bearer realm="tarflow"'


class Gate:
    """Of one process; ``answer`` collects headers for whatever answer there will be."""

    def __init__(self, keyring: Keyring, rates: Rates) -> None:
        self._keyring, self._rates = keyring, rates

    async def admit(self, authorization: str, api_key: str, needed: frozenset[Scope], answer: dict[str, str]) -> Caller:
        """Who asks, by the values of the two headers that may hold a key.

        Raises ``Unauthorized``, ``Forbidden``, ``Overloaded``, or ``Unavailable`` where a limit cannot be looked up.
        """
        answer[CHALLENGE] = REALM
        caller = self._keyring.find(_secret(authorization, api_key))
        if missing := sorted(needed - caller.scopes):
            answer[CHALLENGE] = f'{REALM}, error="insufficient_scope", scope="{" ".join(sorted(needed))}"'
            raise Forbidden(
                f"the key of {caller.name!r} has no scope {' and '.join(missing)}, which this needs; it has "
                f"{', '.join(sorted(caller.scopes))}"
            )
        del answer[CHALLENGE]
        if caller.rate is not None:
            await self._count(caller, caller.rate, answer)
        return caller

    async def _count(self, caller: Caller, rate: str, answer: dict[str, str]) -> None:
        window = await self._rates.hit(caller.name, rate)
        # The names that OpenAI's interface has made known.
        answer["x-ratelimit-limit-requests"] = str(window.limit)
        answer["x-ratelimit-remaining-requests"] = str(window.remaining)
        if window.retry_after is not None:
            answer["x-ratelimit-reset-requests"] = f"{window.retry_after:g}s"
            raise Overloaded(
                f"the key of {caller.name!r} allows {rate} requests, which are used up; try again in "
                f"{window.retry_after:g} seconds",
                code="rate_limit_exceeded",
                retry_after=window.retry_after,
            )


def _secret(authorization: str, api_key: str) -> str:
    """The key that a request has; never shown in an error, whatever is wrong with it."""
    if api_key:
        return api_key
    scheme, _, secret = authorization.partition(" ")
    if not authorization:
        raise Unauthorized(
            "a key is needed; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'", code="missing_key"
        )
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized("Authorization: allowed is 'Bearer KEY'")
    return secret.strip()
