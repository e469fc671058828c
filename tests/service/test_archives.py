"""Zip archives: parts of files are files, and lists of members have bounds."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import archives
from service.archives import Allowance, ArchiveError, ImageArchive, Section, is_archive


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


def allowance(members: int = 100, images: int = 10, unpacked_bytes: int = 1000) -> Allowance:
    return Allowance(members=members, images=images, unpacked_bytes=unpacked_bytes)


def opened(data: bytes, allowed: Allowance | None = None, member_bytes: int = 100) -> ImageArchive:
    section = Section(io.BytesIO(b"before" + data + b"after"), 6, len(data))
    return ImageArchive(section, allowed or allowance(), member_bytes=member_bytes)


def too_large(data: bytes, allowed: Allowance) -> str:
    with pytest.raises(ArchiveError) as caught:
        opened(data, allowed)
    assert caught.value.code == "archive_too_large"
    return str(caught.value)


def changed(data: bytes, place: int, value: int, size: int = 4, signature: bytes = b"PK\x01\x02") -> bytes:
    """An archive that says something else of all its members."""
    patched, at = bytearray(data), data.find(signature)
    while at >= 0:
        patched[at + place : at + place + size] = value.to_bytes(size, "little")
        at = data.find(signature, at + 1)
    return bytes(patched)


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
    assert len(opened(many, allowance(members=10, unpacked_bytes=900)).images) == 10
    together = "in all archives together"
    assert too_large(many, allowance(images=9)) == f"got 10 images, allowed are 9 {together}"
    assert too_large(many, allowance(members=9)) == f"got 10 members, allowed are 9 {together}"
    assert too_large(many, allowance(unpacked_bytes=899)) == f"got 900 uncompressed bytes, allowed are 899 {together}"
    small = opened(many, member_bytes=89)
    with pytest.raises(ArchiveError, match="90 bytes"):
        small.read(small.images[0])


@pytest.mark.parametrize("name", ["folder/", "notes.txt", "inner.zip", ".hidden.png", "__MACOSX/a.png"])
def test_what_is_no_image_counts(name: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for i in range(5):
            content.writestr(f"{i}/{name}", b"" if name == "folder/" else b"x" * 10)
    data = buffer.getvalue()
    assert opened(data, allowance(members=5, images=0, unpacked_bytes=50)).images == []
    assert "got 5 members, allowed are 4" in too_large(data, allowance(members=4))
    if name == "folder/":
        data = changed(data, 24, 10)
    assert "got 50 uncompressed bytes, allowed are 49" in too_large(data, allowance(unpacked_bytes=49))


@pytest.mark.parametrize(
    ("allowed", "what"),
    [
        (allowance(members=25), "got 10 members after 20"),
        (allowance(images=12), "got 5 images after 10"),
        (allowance(unpacked_bytes=29), "got 10 uncompressed bytes after 20"),
    ],
)
def test_archives_of_one_request_share_an_allowance(allowed: Allowance, what: str) -> None:
    data = packed({f"{i}.{kind}": b"x" for i in range(5) for kind in ("png", "txt")})
    opened(data, allowed)
    opened(data, allowed)
    assert f"{what} in the archives before it, allowed are" in too_large(data, allowed)


def test_a_name_that_is_there_twice_counts_twice() -> None:
    data = packed({"1.png": b"one", "2.png": b"two"}).replace(b"2.png", b"1.png")
    archive = opened(data)
    assert [archive.read(member) for member in archive.images] == [b"one", b"two"]
    assert "got 2 members" in too_large(data, allowance(members=1))


def test_too_many_members_are_refused_before_they_are_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed({f"{i}.txt": b"" for i in range(101)})

    def unfolded(*_: object) -> None:
        raise AssertionError("zipfile made a member of the list")

    monkeypatch.setattr(zipfile, "ZipInfo", unfolded)
    # The end of the archive may say what it likes about their number.
    for said in (101, 1, 0):
        lying = changed(changed(data, 8, said, 2, b"PK\x05\x06"), 10, said, 2, b"PK\x05\x06")
        assert "got 101 members, allowed are 100" in too_large(lying, allowance())


def test_sizes_beyond_four_gigabytes_count() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content, content.open("a.txt", "w", force_zip64=True) as member:
        member.write(b"x")
    size, extra = 2**40, struct.pack("<2HQ", 1, 8, 2**40)
    data = changed(changed(buffer.getvalue(), 24, 0xFFFFFFFF), 30, len(extra), 2)
    place = data.index(b"PK\x01\x02") + 46 + len("a.txt")
    data = data[:place] + extra + data[place:]
    end = data.index(b"PK\x05\x06")
    listed = int.from_bytes(data[end + 12 : end + 16], "little") + len(extra)
    data = changed(data, 12, listed, 4, b"PK\x05\x06")
    assert f"got {size} uncompressed bytes, allowed are 1000" in too_large(data, allowance())


def test_a_member_that_says_less_than_it_holds_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed({"a.png": bytes(2**22)})
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        data = changed(data, place, 50, signature=signature)
    archive = opened(data, member_bytes=2**21)
    with pytest.raises(ArchiveError, match="damaged"):
        archive.read(archive.images[0])
    # One that also lies about the checksum passes for what it says.
    data = changed(data, 16, zlib.crc32(bytes(50)))
    archive = opened(data, member_bytes=2**21)
    tracemalloc.start()
    try:
        assert archive.read(archive.images[0]) == bytes(50)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_members_that_share_their_bytes_are_refused() -> None:
    data = packed({"0.png": bytes(range(90)), "1.png": b"x", "2.png": b"x"})
    [one, *_] = opened(data).images
    with pytest.raises(ArchiveError, match="compressed bytes, the archive has") as caught:
        opened(changed(changed(data, 20, len(data) // 2), 42, one.header_offset))
    assert caught.value.code == "invalid_archive"


def test_a_long_list_of_members_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed({f"{i:02}.txt": b"" for i in range(50)})
    assert opened(data).others == 50
    monkeypatch.setattr(archives, "LIST_BYTES", 5000)
    allowed = allowance()
    opened(data, allowed)
    # 46 bytes and six of a name each.
    assert "got 2600 bytes in the list of members after 2600 in the archives before" in too_large(data, allowed)
    monkeypatch.setattr(archives, "LIST_BYTES", 1000)
    monkeypatch.setattr(archives, "END_BYTES", 1000)
    assert "got 2600 bytes in the list of members, allowed are 1000" in too_large(data, allowance())


def test_comments_count_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        content.comment = b"c" * 2000
    monkeypatch.setattr(archives, "LIST_BYTES", 5000)
    allowed = allowance()
    for _ in range(2):
        assert opened(buffer.getvalue(), allowed).images == []
    assert "got 2000 bytes in the list of members after 4000" in too_large(buffer.getvalue(), allowed)


def test_a_large_extra_field_is_refused() -> None:
    def with_extra(size: int) -> bytes:
        info = zipfile.ZipInfo("a.png")
        info.extra = struct.pack("<2H", 0x9999, size - 4) + bytes(size - 4)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as content:
            content.writestr(info, b"data")
        return buffer.getvalue()

    assert len(opened(with_extra(archives.EXTRA_BYTES)).images) == 1
    with pytest.raises(ArchiveError, match="4097 bytes, allowed are 4096") as caught:
        opened(with_extra(archives.EXTRA_BYTES + 1))
    assert caught.value.code == "unsupported_archive"


def test_an_empty_archive_is_one() -> None:
    assert opened(packed({})).images == []


def test_a_member_without_a_name_is_no_image() -> None:
    archive = opened(packed({"a.png": b"data"}).replace(b"a.png", b"\0.png"))
    assert (archive.images, archive.nested, archive.others) == ([], [], 0)


@given(st.data())
def test_damage_anywhere_is_an_archive_error(data: st.DataObject) -> None:
    content = bytearray(packed({"a/": b"", "a/1.png": b"one" * 20, "2.png": b"two", "b.txt": b"text"}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    # Anything else that is raised fails the test.
    with contextlib.suppress(ArchiveError):
        archive = opened(bytes(content))
        for member in archive.images:
            assert len(archive.read(member)) <= 100


def test_what_is_an_archive() -> None:
    def kind(name: str, data: bytes) -> bool:
        return is_archive(name, Section(io.BytesIO(data), 0, len(data)))

    assert kind("a.bin", packed({"a": b""}))
    assert kind("a.bin", packed({}))
    assert kind("a.ZIP", b"")
    assert not kind("a.png", b"\x89PNG")
