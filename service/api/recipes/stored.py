"""Recipes that are kept with their jobs: any process makes the answer of one, as often as it is asked for."""

from __future__ import annotations

from fastapi import Response
from pydantic import BaseModel

from service.api.context import Context
from service.api.recipes.base import Done, Prepared, Recipe
from service.api.recipes.classes import ClassesRecipe
from service.api.recipes.images import ImagesRecipe
from service.api.recipes.latents import LatentsRecipe
from service.api.recipes.scores import ScoresRecipe
from service.api.running import timing
from service.broker.base import JobStatus
from service.errors import InternalError, NotFound
from service.jobs import JobResult, Op
from service.messages import MessageError, pack, unpack

RECIPES: dict[Op, type[Recipe]] = {
    Op.SAMPLE: ImagesRecipe,
    Op.DECODE: ImagesRecipe,
    Op.DENOISE: ImagesRecipe,
    Op.SCORE: ScoresRecipe,
    Op.ENCODE: LatentsRecipe,
    Op.CLASSIFY: ClassesRecipe,
}


def packed(prepared: Prepared) -> bytes:
    """A recipe as the broker keeps it; may block for some milliseconds."""
    return pack(prepared.recipe.to_wire())


def unknown_job(job_id: str) -> NotFound:
    """The error for a job that is not there, or not for this caller."""
    return NotFound(
        f"job: {job_id[:100]!r} is not known; results are kept for a limited time", code="job_not_found", param="job"
    )


async def recipe_of(context: Context, status: JobStatus) -> Recipe:
    """The recipe that was kept with a job; raises ``NotFound``, or where what it is about has changed since."""
    data = await context.broker.recipe(status.id)
    if not data:
        # It was answered to who asked for it, and only waits to be forgotten.
        raise unknown_job(status.id)
    try:
        return await RECIPES[status.op].from_wire(context, status.model, unpack(data))
    except (MessageError, LookupError, TypeError) as error:
        raise InternalError("the job was accepted by another version of the service; send it again") from error


async def stored_answer(
    context: Context, status: JobStatus, result: JobResult, accept: str | None
) -> Response | BaseModel:
    """The answer of a job that was completed, as the synchronous call would have given it for this Accept header."""
    recipe = await recipe_of(context, status)
    seconds = (status.ended or status.created) - status.created
    return await recipe.render(
        context,
        Done(
            job_id=status.id,
            model=status.model,
            result=result,
            timing=timing(result, seconds),
            file_format=recipe.file_format(accept),
        ),
    )
