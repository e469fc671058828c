"""Zip archives: parts of files are files, and lists of members have bounds."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import archives
from service.archives import ArchiveError, ImageArchive, Section, is_archive


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


def opened(data: bytes, most_images: int = 10, most_bytes: int = 1000, member_bytes: int = 100) -> ImageArchive:
    section = Section(io.BytesIO(b"before" + data + b"after"), 6, len(data))
    return ImageArchive(section, most_images=most_images, most_bytes=most_bytes, member_bytes=member_bytes)


@given(
    st.binary(max_size=50),
    st.integers(0, 20),
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(-60, 60), st.sampled_from([0, 1, 2]), st.integers(-1, 60))),
)
def test_a_section_is_a_file(data: bytes, start: int, size: int, steps: list[tuple[int, int, int]]) -> None:
    size = min(size, max(0, len(data) - start))
    section, plain = Section(io.BytesIO(data), start, size), io.BytesIO(data[start : start + size])
    for offset, whence, count in steps:
        position = offset + (0, plain.tell(), size)[whence]
        if position < 0:
            with pytest.raises(ValueError, match="seek"):
                section.seek(offset, whence)
            continue
        # io.BytesIO refuses seeks from elsewhere that are not 0; places count from the start here.
        assert section.seek(offset, whence) == plain.seek(position)
        assert section.read(count) == plain.read(count)
        assert section.tell() == plain.tell()


def test_images_are_told_by_their_names() -> None:
    names = [
        "a.PNG",
        "x/b.jpeg",
        "x/y/c.tif",
        "d.txt",
        "noname",
        ".e.png",
        "__MACOSX/f.png",
        "in.zip",
        "dir.png/g.webp",
    ]
    archive = opened(packed(dict.fromkeys(names, b"data")))
    assert [member.filename for member in archive.images] == ["a.PNG", "x/b.jpeg", "x/y/c.tif", "dir.png/g.webp"]
    assert (archive.nested, archive.others) == (["in.zip"], 2)
    assert archive.read(archive.images[0]) == b"data"


def test_bounds() -> None:
    many = packed({f"{i}.png": b"x" * 90 for i in range(10)})
    assert len(opened(many).images) == 10
    for bounds in ({"most_images": 9}, {"most_bytes": 899}):
        with pytest.raises(ArchiveError, match="allowed are") as caught:
            opened(many, **bounds)
        assert caught.value.code == "archive_too_large"
    small = opened(many, member_bytes=89)
    with pytest.raises(ArchiveError, match="90 bytes"):
        small.read(small.images[0])


def test_a_member_that_says_less_than_it_holds_is_not_expanded() -> None:
    data = bytearray(packed({"a.png": bytes(10_000)}))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + place
        data[at : at + 4] = (50).to_bytes(4, "little")
    archive = opened(bytes(data))
    with pytest.raises(ArchiveError, match="damaged"):
        archive.read(archive.images[0])


def test_a_long_list_of_members_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed({f"{i}.txt": b"" for i in range(50)})
    assert opened(data).others == 50
    monkeypatch.setattr(archives, "DIRECTORY_BYTES", 1000)
    with pytest.raises(ArchiveError, match="allowed are 1000"):
        opened(data)


def test_what_is_an_archive() -> None:
    def kind(name: str, data: bytes) -> bool:
        return is_archive(name, Section(io.BytesIO(data), 0, len(data)))

    assert kind("a.bin", packed({"a": b""}))
    assert kind("a.bin", packed({}))
    assert kind("a.ZIP", b"")
    assert not kind("a.png", b"\x89PNG")
