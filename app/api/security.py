"""Bearer keys with scopes. Without any key the server is open, and then on loopback only."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Forbidden, Unauthorized
from app.settings import Scope, is_loopback

PORT = re.compile(r":[0-9]*$")
SCOPES = tuple(Scope)  # each includes the ones before it

bearer = HTTPBearer(
    auto_error=False,
    description="A key of `PALIMPSEST_API_KEYS`; not needed where none is configured.",
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


class Keyring:
    """The configured keys and what each may do."""

    def __init__(self, keys: Mapping[str, Scope]) -> None:
        self._keys = dict(keys)

    @property
    def open(self) -> bool:
        return not self._keys

    def authorise(self, token: str | None, needed: Scope) -> None:
        """Raises Unauthorized (no key, or an unknown one) or Forbidden (too small a scope)."""
        if self.open:
            return
        if token is None:
            raise Unauthorized("Send an API key as 'Authorization: Bearer <key>'.")
        granted = self._find(token)
        if granted is None:
            raise Unauthorized("This API key is not known.")
        if SCOPES.index(granted) < SCOPES.index(needed):
            raise Forbidden(f"This needs a key of scope '{needed}'; yours is '{granted}'.")

    def _find(self, token: str) -> Scope | None:
        """Compares with every key, so that the time taken tells nothing about them."""
        sent = token.encode()
        matches = [
            scope for key, scope in self._keys.items() if hmac.compare_digest(key.encode(), sent)
        ]
        return matches[0] if matches else None


def refuse_foreign_pages(request: Request) -> None:
    """An open server trusts whoever reaches it, and a web page reaches it through its reader's
    browser. So a page of another origin is refused, and so is a page that made its own host
    name point to this machine (DNS rebinding)."""
    host = request.headers.get("host", "").lower()
    origin = request.headers.get("origin")
    if not is_loopback(PORT.sub("", host).strip("[]")):
        raise Forbidden(
            f"Without API keys the server answers to this machine's own names only, not to "
            f"{host!r}; use http://localhost, or configure PALIMPSEST_API_KEYS."
        )
    if origin is not None and origin.lower().partition("://")[2] != host:
        raise Forbidden("Without API keys, requests from other web sites are refused.")


def require(needed: Scope) -> Callable[[Request, Credentials], Awaitable[None]]:
    """A dependency: the caller's key must have this scope."""

    async def check(request: Request, credentials: Credentials) -> None:
        keyring: Keyring = request.app.state.keyring
        if keyring.open:
            refuse_foreign_pages(request)
        keyring.authorise(credentials.credentials if credentials else None, needed)

    return check


Reader = Depends(require(Scope.READ))
EditorKey = Depends(require(Scope.EDIT))
AdminKey = Depends(require(Scope.ADMIN))
