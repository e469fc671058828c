"""Zip archives of images, as strangers send them: what is in them, and never more of it than is allowed.

Everything here blocks, so the API calls it in threads.
"""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from posixpath import splitext
from typing import IO

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ENCRYPTED = 0x1
"""Bit of a member's flags."""
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Compression that can be undone piece by piece; Python expands the other kinds without a bound."""
LIST_BYTES = 16 * 2**20
"""Lists of members that are read in one request; some 150,000 members."""
EXTRA_BYTES = 4096
"""Largest extra field of a member: zipfile takes time with the square of its size."""
END_BYTES = 2**16 + 22
"""What zipfile reads of an archive's end to find the list: a comment and the record with its place."""
_ENTRY, _ENTRY_BYTES = b"PK\x01\x02", 46
_ENTRY_LENGTHS = struct.Struct("<28x3H")
"""Of a member in the list: sizes of its name, extra field and comment, which follow (APPNOTE 4.3.12)."""
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
        """Go to a place; for one before the start an error that is a ``ValueError`` and an ``OSError``."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            # Files raise OSError, which zipfile expects of archives too short for a record it looks for.
            raise io.UnsupportedOperation(f"seek: got {position}, allowed is 0 and more")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """Up to so many bytes, or all that are left."""
        self._file.seek(self._start + self._position)
        data = self._file.read(self.readable_bytes(size))
        self._position += len(data)
        return data

    def readable_bytes(self, size: int | None) -> int:
        """How many bytes :meth:`read` gives."""
        left = max(0, self.size - self._position)
        return left if size is None or size < 0 else min(size, left)

    def part(self) -> tuple[IO[bytes], int, int]:
        """The file, where it begins there, and its size."""
        return self._file, self._start, self.size


class Allowance:
    """What all archives of one request may hold together; each that is opened takes its part."""

    def __init__(self, *, members: int, images: int, unpacked_bytes: int) -> None:
        """So many members of any kind, images among them, and uncompressed bytes of all members."""
        self._most = {
            "members": members,
            "images": images,
            "uncompressed bytes": unpacked_bytes,
            "bytes in the list of members": LIST_BYTES,
        }
        self._taken = dict.fromkeys(self._most, 0)

    def check(self, what: str, amount: int) -> None:
        """Raise :class:`ArchiveError` for more than is left."""
        taken, most = self._taken[what], self._most[what]
        if taken + amount > most:
            before = f" after {taken} in the archives before it" if taken else ""
            raise ArchiveError(
                "archive_too_large", f"got {amount} {what}{before}, allowed are {most} in all archives together"
            )

    def take(self, what: str, amount: int) -> None:
        """The same, and count it."""
        self.check(what, amount)
        self._taken[what] += amount


class _Listing(Section):
    """An archive while zipfile reads its list of members: what is too much is refused before zipfile unfolds it."""

    def __init__(self, file: Section, allowance: Allowance) -> None:
        super().__init__(*file.part())
        self._allowance = allowance
        self.list_bytes = 0
        self.finished = False

    def read(self, size: int | None = -1) -> bytes:
        """The same; raises :class:`ArchiveError`."""
        if self.finished:
            return super().read(size)
        # Counted in the very bytes that zipfile uses: the number in the archive's end may say anything.
        if (count := self.readable_bytes(size)) > END_BYTES:
            self._allowance.check("bytes in the list of members", count)
        data = super().read(size)
        if data.startswith(_ENTRY):
            self.list_bytes = len(data)
            self._allowance.check("members", _count_members(data))
        return data


def _count_members(data: bytes) -> int:
    """Members in a list of them, up to where it is damaged; raises :class:`ArchiveError` for a large extra field."""
    place = count = 0
    while data.startswith(_ENTRY, place) and place + _ENTRY_BYTES <= len(data):
        name, extra, comment = _ENTRY_LENGTHS.unpack_from(data, place)
        if extra > EXTRA_BYTES:
            raise ArchiveError(
                "unsupported_archive", f"member {count} has an extra field of {extra} bytes, allowed are {EXTRA_BYTES}"
            )
        place += _ENTRY_BYTES + name + extra + comment
        count += 1
    return count


def is_archive(filename: str, file: Section) -> bool:
    """Whether a file is meant to be a zip archive: by its first bytes, or else its name."""
    file.seek(0)
    return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06") or filename.lower().endswith(".zip")


class ImageArchive:
    """The images in a zip archive."""

    def __init__(self, file: Section, allowance: Allowance, *, member_bytes: int) -> None:
        """Read the list of members; raises :class:`ArchiveError`.

        All members together have no more than is left of the allowance, and an image ``member_bytes`` uncompressed.
        """
        listing = _Listing(file, allowance)
        try:
            self._archive = zipfile.ZipFile(listing)
        except ArchiveError:
            raise
        except _DAMAGE as error:
            raise ArchiveError("invalid_archive", f"not a readable zip archive: {error}") from error
        listing.finished = True
        members = self._archive.infolist()
        # What is no image is never unpacked, but an archive of it costs memory and time all the same.
        allowance.take("bytes in the list of members", listing.list_bytes + len(self._archive.comment))
        allowance.take("members", len(members))
        allowance.take("uncompressed bytes", sum(member.file_size for member in members))
        packed = sum(member.compress_size for member in members)
        if packed > file.size:
            # Members that share their bytes: a small archive would be as much work as a large one.
            raise ArchiveError(
                "invalid_archive", f"its members have {packed} compressed bytes, the archive has {file.size}"
            )
        self._member_bytes = member_bytes
        self.images: list[zipfile.ZipInfo] = []
        """Members in the order of the archive."""
        self.nested: list[str] = []
        """Archives inside; they are not opened."""
        self.others = 0
        """Members that are no images by their names."""
        for member in members:
            *folders, name = member.filename.split("/")
            # macOS adds a folder of attributes and files that begin with a dot; neither is anybody's image, nor is what
            # has no name, such as a folder.
            if not name or name.startswith(".") or "__MACOSX" in folders:
                continue
            suffix = splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                self.images.append(member)
            elif suffix == ".zip":
                self.nested.append(member.filename)
            else:
                self.others += 1
        allowance.take("images", len(self.images))

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
            # zipfile cuts off what is beyond the announced size, but expands as much as it is asked for.
            with self._archive.open(member) as file:
                return file.read(member.file_size + 1)
        except _DAMAGE as error:
            raise ArchiveError("invalid_archive", f"the file is damaged in the archive: {error}") from error
