"""Zip archives of images, as strangers send them: what is in them, and never more of it than is allowed.

Everything here blocks, so the API calls it in threads.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import IO

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ENCRYPTED = 0x1
"""Bit of a member's flags."""
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Compression that can be undone piece by piece; Python expands the other kinds without a bound."""
DIRECTORY_BYTES = 16 * 2**20
"""Largest list of members that is read; some 150,000 of them."""
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)
"""What :mod:`zipfile` raises on damaged archives."""


class ArchiveError(ValueError):
    """An archive, or a member of it, that cannot be used. ``code`` is stable, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Section(io.RawIOBase):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._position = file, start, 0
        self.size = size
        self.largest_read: int | None = None
        """Bytes beyond which one :meth:`read` is refused with ``ValueError``."""

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from its start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; ``ValueError`` for one before the start."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"seek: got {position}, allowed is 0 and more")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """Up to so many bytes, or all that are left."""
        left = max(0, self.size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if self.largest_read is not None and count > self.largest_read:
            raise ValueError(f"a piece of {count} bytes, allowed are {self.largest_read}")
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data


def is_archive(filename: str, file: Section) -> bool:
    """Whether a file is meant to be a zip archive: by its first bytes, or else its name."""
    file.seek(0)
    return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06") or filename.lower().endswith(".zip")


class ImageArchive:
    """The images in a zip archive."""

    def __init__(self, file: Section, *, most_images: int, most_bytes: int, member_bytes: int) -> None:
        """Read the list of members; raises :class:`ArchiveError`.

        At most ``most_images`` images, with ``member_bytes`` uncompressed bytes each and ``most_bytes`` together.
        """
        file.largest_read = DIRECTORY_BYTES
        try:
            self._archive = zipfile.ZipFile(file)
        except _DAMAGE as error:
            raise ArchiveError("invalid_archive", f"not a readable zip archive: {error}") from error
        file.largest_read = None
        self._member_bytes = member_bytes
        self.images: list[zipfile.ZipInfo] = []
        """Members in the order of the archive."""
        self.nested: list[str] = []
        """Archives inside; they are not opened."""
        self.others = 0
        """Members that are no images by their names."""
        for member in self._archive.infolist():
            parts = PurePosixPath(member.filename).parts
            # macOS adds a folder of attributes and files that begin with a dot; neither is anybody's image.
            if member.is_dir() or not parts or "__MACOSX" in parts or parts[-1].startswith("."):
                continue
            suffix = PurePosixPath(parts[-1]).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                self.images.append(member)
            elif suffix == ".zip":
                self.nested.append(member.filename)
            else:
                self.others += 1
        if len(self.images) > most_images:
            raise ArchiveError("archive_too_large", f"got {len(self.images)} images, allowed are {most_images}")
        total = sum(member.file_size for member in self.images)
        if total > most_bytes:
            raise ArchiveError("archive_too_large", f"got {total} uncompressed bytes, allowed are {most_bytes}")

    def read(self, member: zipfile.ZipInfo) -> bytes:
        """The bytes of a member; raises :class:`ArchiveError`."""
        if member.flag_bits & ENCRYPTED:
            raise ArchiveError("encrypted_archive", "the file is encrypted; send it without a password")
        if member.compress_type not in METHODS:
            raise ArchiveError(
                "unsupported_archive", f"compression method {member.compress_type}; allowed are stored and deflate"
            )
        if member.file_size > self._member_bytes:
            raise ArchiveError(
                "image_too_large", f"the file has {member.file_size} bytes, allowed are {self._member_bytes}"
            )
        try:
            # No more than the announced size is ever expanded.
            with self._archive.open(member) as file:
                return file.read(self._member_bytes + 1)
        except _DAMAGE as error:
            raise ArchiveError("invalid_archive", f"the file is damaged in the archive: {error}") from error
