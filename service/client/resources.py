"""What the service has beside jobs: models, and calibrations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypedDict, Unpack

from service.client import errors
from service.client.answers import CalibrationDetails, CalibrationSummary, ModelDescription, ModelSummary
from service.client.caller import Caller
from service.client.calls import Call, form, path
from service.client.errors import Unfinished
from service.client.uploads import ImageLike, files_of

POLL_SECONDS = 0.5
"""Between two looks at a calibration in the making."""


class AsyncModels:
    """Models that are served."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(self) -> list[ModelSummary]:
        """All of them."""
        return await self._caller.answer(
            Call(
                method="GET",
                path=path("models"),
                read=lambda answer: [ModelSummary.model_validate(model) for model in answer["data"]],
            )
        )

    async def get(self, name: str) -> ModelDescription:
        """All that is known of one."""
        return await self._caller.answer(
            Call(method="GET", path=path("models", name), read=ModelDescription.model_validate)
        )


class CalibrationFields(TypedDict, total=False):
    """Fields of /v1/calibrations beside the name and the images."""

    model: str | None
    seed: int
    replace: bool


class AsyncCalibrations:
    """What is normal, by name; ``model`` is the service's first where it is not given."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def create(
        self, name: str, images: ImageLike | Sequence[ImageLike], **fields: Unpack[CalibrationFields]
    ) -> CalibrationSummary:
        """Send normal images, or zip archives of them; the calibration is made in the background.

        Raises ``Conflict`` for a name that is taken, unless ``replace`` is true. Not repeated by itself where it may
        have arrived.
        """
        return await self._caller.answer(
            Call(
                method="POST",
                path=path("calibrations"),
                form=form({"name": name, **fields}),
                files=files_of(images),
                read=CalibrationSummary.model_validate,
                repeatable=False,
            )
        )

    async def list(self, model: str | None = None) -> list[CalibrationSummary]:
        """All of a model, the bundle's own as ``default``."""
        return await self._caller.answer(
            Call(
                method="GET",
                path=path("calibrations"),
                params={"model": model},
                read=lambda answer: [CalibrationSummary.model_validate(one) for one in answer["data"]],
            )
        )

    async def get(self, name: str, model: str | None = None) -> CalibrationDetails:
        """How far one is, and what is in it."""
        return await self._caller.answer(
            Call(
                method="GET",
                path=path("calibrations", name),
                params={"model": model},
                read=CalibrationDetails.model_validate,
            )
        )

    async def wait(self, name: str, model: str | None = None, timeout: float | None = None) -> CalibrationDetails:
        """Return when it is ready; raises its error, or ``Unfinished`` after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := await self.get(name, model)).status == "running":
            left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise Unfinished(f"calibration {name!r} is at {found.progress:.0%} after {timeout:g} seconds")
            await self._caller.connection.sleep(min(POLL_SECONDS, left))
        if found.error is not None:
            raise errors.of_body(found.error.model_dump())
        return found

    async def delete(self, name: str, model: str | None = None) -> None:
        """Forget one."""
        await self._caller.answer(
            Call(
                method="DELETE",
                path=path("calibrations", name),
                params={"model": model},
                read=lambda _: None,
                repeatable=False,
            )
        )
