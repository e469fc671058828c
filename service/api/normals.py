"""Normal images as they are uploaded: files and zip archives of them, fitted to a model."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from model.anomaly.calibration import FEWEST_NORMALS
from model.anomaly.normals import distinct
from model.images import ImageError, fit_image, load_image
from service.api.forms import FormFile
from service.archives import Allowance, ArchiveError, ImageArchive, is_archive
from service.calibrator import MOST_VALUES
from service.errors import Canceled, InvalidRequest
from service.jobs import ModelInfo
from service.settings import Settings

MOST_PROBLEMS = 20
"""Bad files that an error lists: a folder is put right at once."""
MOST_SHOWN = 5
"""Archives that a notice or the source names."""
UNPACKED_SHARE = 8
"""Uncompressed bytes of all that is in the archives, as a multiple of the largest body."""
MEMBERS_SHARE = 4
"""Members of all archives, as a multiple of the most images: folders and what systems and people put beside images."""
PIXELS_OF_A_CALIBRATION = 1000
"""Pixels that all images may have together, as a multiple of what one may."""


@dataclass(frozen=True)
class Normals:
    """Different images fitted to a model, (N, C, H, W) uint8, with what is to be known about the upload."""

    pixels: NDArray[np.uint8]
    source: str
    notices: list[tuple[str, str]]


@dataclass(frozen=True)
class _Source:
    """One image before it was read."""

    param: str
    shown: str
    read: Callable[[], bytes]


def _shown_names(names: Sequence[str]) -> str:
    return ", ".join(name[:100] for name in names[:MOST_SHOWN]) + (", …" if len(names) > MOST_SHOWN else "")


class _Upload:
    """The sources in the files of a form; reading the archives' lists blocks."""

    def __init__(self, files: Sequence[FormFile], settings: Settings) -> None:
        self._settings = settings
        self.sources: list[_Source] = []
        self.notices: list[tuple[str, str]] = []
        """One of a kind: thousands of archives would have as many, which are kept and shown with the calibration."""
        self.archives: list[str] = []
        self._nested: list[str] = []
        self._with_others: list[str] = []
        self._others = 0
        self._allowance = Allowance(
            members=MEMBERS_SHARE * settings.max_calibration_images,
            images=settings.max_calibration_images,
            unpacked_bytes=UNPACKED_SHARE * settings.max_calibration_bytes,
        )
        for index, file in enumerate(files):
            param = f"files.{index}"
            if is_archive(file.filename, file.content):
                self._add_archive(file, param)
            else:
                shown = f"{param} ({file.filename[:100]})" if file.filename else param
                self.sources.append(_Source(param, shown, self._reader(file)))
        count, most = len(self.sources), settings.max_calibration_images
        if not FEWEST_NORMALS <= count <= most:
            raise InvalidRequest(
                f"files: got {count} images, allowed are {FEWEST_NORMALS} to {most}; some hundreds make good verdicts, "
                "and a level of 1% needs 200",
                param="files",
                code="invalid_count",
            )
        if self._nested:
            self.notices.append(("nested_archive", f"archives inside are not opened: {_shown_names(self._nested)}"))
        if self._others:
            shown = _shown_names(self._with_others)
            self.notices.append(("ignored_files", f"{self._others} files that are no images, in {shown}"))

    def _reader(self, file: FormFile) -> Callable[[], bytes]:
        limit = self._settings.max_body_bytes

        def read() -> bytes:
            if file.content.size > limit:
                raise ImageError("image_too_large", f"the file has {file.content.size} bytes, allowed are {limit}")
            file.content.seek(0)
            return file.content.read()

        return read

    def _add_archive(self, file: FormFile, param: str) -> None:
        name = file.filename or param
        try:
            archive = ImageArchive(file.content, self._allowance, member_bytes=self._settings.max_body_bytes)
        except ArchiveError as error:
            raise InvalidRequest(f"{param} ({name[:100]}): {error}", param=param, code=error.code) from error
        self.archives.append(name)

        def reader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
            return lambda: archive.read(member)

        for member in archive.images:
            path = member.filename[:200]
            self.sources.append(_Source(path, f"{path} in {param} ({name[:100]})", reader(member)))
        self._nested += [f"{inner[:100]} in {name}" for inner in archive.nested]
        if archive.others:
            self._with_others.append(name)
            self._others += archive.others


def _check_size(model: ModelInfo, count: int) -> None:
    """Refuse more images of a large model than memory is meant for."""
    most = MOST_VALUES // model.flow.num_dims
    if count > most:
        raise InvalidRequest(
            f"files: got {count} images of {model.flow.num_dims} values each, allowed are {most} of model "
            f"{model.name!r}",
            param="files",
            code="invalid_count",
        )


async def read_normals(
    request: Request,
    files: Sequence[FormFile],
    model: ModelInfo,
    settings: Settings,
    limiter: anyio.CapacityLimiter,
) -> Normals:
    """Decode all images and bring them to a model's size and colours, image by image in a thread.

    Exact copies count once. Raises ``InvalidRequest`` for a model of latents, for too few or too many images, for too
    many pixels in all, for an archive that cannot be read, and for images that cannot be used, the first 20 of which
    it names; ``Canceled`` for a client that has gone.
    """
    if model.codec is not None:
        raise InvalidRequest(
            f"model: got {model.name!r}, which models latents; calibrations are for models of pixels",
            param="model",
            code="unsupported_model",
        )
    upload = await anyio.to_thread.run_sync(_Upload, files, settings)
    count = len(upload.sources)
    _check_size(model, count)
    pixels = np.empty((count, model.image_channels, model.image_size, model.image_size), np.uint8)
    problems: list[tuple[_Source, str, str]] = []
    allowed = PIXELS_OF_A_CALIBRATION * settings.max_pixels

    def fit(index: int, source: _Source) -> int:
        decoded = load_image(source.read(), settings.max_pixels)
        width, height = decoded.image.size
        pixels[index] = fit_image(decoded, model.image_size, model.image_channels).pixels
        return width * height

    total = 0
    for index, source in enumerate(upload.sources):
        try:
            size = await anyio.to_thread.run_sync(fit, index, source, limiter=limiter)
        except (ImageError, ArchiveError) as error:
            problems.append((source, str(error), error.code))
            if len(problems) == MOST_PROBLEMS:
                break
        else:
            # Asked afterwards, so that an image's own size is never blamed for what the others used up.
            if total + size > allowed:
                raise InvalidRequest(
                    f"files: the pixels that all images may have together, {allowed:,}, are used up: "
                    f"{index - len(problems)} of {count} images with {total:,} pixels went in, and {source.shown} has "
                    f"{size:,}; send fewer images, or reduce them first: the model sees {model.image_size}x"
                    f"{model.image_size}",
                    param="files",
                    code="too_many_pixels",
                )
            total += size
        if await request.is_disconnected():
            raise Canceled("the client went away")
    if problems:
        first, _, code = problems[0]
        listed = "; ".join(f"{source.shown}: {message}" for source, message, _ in problems)
        more = " (and perhaps more)" if len(problems) == MOST_PROBLEMS else ""
        number = f"{len(problems)} images{more}" if len(problems) > 1 else "1 image"
        raise InvalidRequest(f"files: {number} cannot be used: {listed}", param=first.param, code=code)
    single = len(files) - len(upload.archives)
    parts = [f"{single} uploaded files"] if single else []
    if upload.archives:
        parts.append(_shown_names(upload.archives))
    kept = await anyio.to_thread.run_sync(distinct, pixels, limiter=limiter)
    if copies := count - len(kept):
        message = f"{copies} of {count} images are exact copies of others and were left out"
        if len(kept) < FEWEST_NORMALS:
            raise InvalidRequest(
                f"files: got {len(kept)} different images, allowed are {FEWEST_NORMALS} and more: {message}",
                param="files",
                code="invalid_count",
            )
        upload.notices.append(("duplicates", message))
        # Of the warnings nothing is kept once the calibration is ready; its source is.
        parts.append(f"without {copies} copies")
        pixels = pixels[kept]
    return Normals(pixels, "; ".join(parts), upload.notices)
