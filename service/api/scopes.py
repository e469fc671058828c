"""Which scope each route needs: said once for each router, beside where it is included; what is not said is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts

from service.access.caller import Scope

Part = tuple[APIRouter, Scope | None]
"""A router, and what its routes need; None for what is open to anyone."""

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


@dataclass(frozen=True)
class Route:
    """A route of the table."""

    path: str
    """With the names of its parameters."""
    name: str
    regex: re.Pattern[str]
    methods: frozenset[str]
    """None of them for a mounted app, which has all."""
    scope: Scope | None

    def takes(self, method: str, path: str) -> bool:
        return (not self.methods or method in self.methods) and self.regex.match(path) is not None


class RouteScopes:
    """The table of an app's routes."""

    def __init__(self, app: FastAPI, parts: Sequence[Part]) -> None:
        """Raises ``LookupError`` for a route of the app that is of none of the parts: it would be nobody's to guard."""
        self._routes = [
            Route(str(route.path), str(route.name or ""), route.path_regex, frozenset(route.methods or ()), scope)
            for router, scope in parts
            for route in iter_route_contexts(router.routes)
        ]
        known = {(route.path, route.methods) for route in self._routes}
        for route in iter_route_contexts(app.routes):
            if (route.path, frozenset(route.methods or ())) not in known:
                raise LookupError(f"{route.path}: nothing says which scope this route needs")
        plain = {(method, route.path) for route in self._routes for method in route.methods if "{" not in route.path}
        self._plain = {place: self._matching(*place) for place in plain}

    def needed(self, method: str, path: str) -> frozenset[Scope] | None:
        """All scopes that a request needs; None for one that is open to anyone.

        For what is no route a key is needed, of whatever scope: who has none cannot find out what there is.
        """
        place = (method, path)
        return self._plain[place] if place in self._plain else self._matching(method, path)

    def _matching(self, method: str, path: str) -> frozenset[Scope] | None:
        scopes = [route.scope for route in self._routes if route.takes(method, path)]
        if scopes and all(scope is None for scope in scopes):
            return None
        return frozenset(scope for scope in scopes if scope is not None)

    def find(self, method: str, path: str) -> Route | None:
        """The route of a request that was refused before anybody looked for it."""
        return next((route for route in self._routes if route.takes(method, path)), None)

    def describe(self, document: dict[str, Any]) -> None:
        """Tell an OpenAPI document which keys its operations need, and how these are refused."""
        document.setdefault("components", {})["securitySchemes"] = SCHEMES
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                scopes = self.needed(method.upper(), path)
                if scopes is None:
                    continue
                operation["security"] = [{name: sorted(scopes)} for name in SCHEMES]
                responses = operation["responses"]
                if "4XX" not in responses:
                    responses["4XX"] = {"description": "No key, one without the scope, or too many requests"}
