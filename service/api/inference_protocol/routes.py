"""Everything under /v2, and what a key needs for it."""

from __future__ import annotations

from service.access.caller import Scope
from service.api.inference_protocol import describing, inferring, repository
from service.api.scopes import Part

PARTS: tuple[Part, ...] = (
    (describing.health_router, None),
    (describing.router, Scope.INFER),
    (inferring.router, Scope.INFER),
    (repository.router, Scope.INFER),
    (repository.changes_router, Scope.ADMIN),
)
