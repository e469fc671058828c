"""Everything under /v2."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.inference_protocol import describing, inferring, repository

router = APIRouter()
for part in (describing, inferring, repository):
    router.include_router(part.router)
