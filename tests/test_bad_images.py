"""Every kind of picture comes out as the RGB it means, and every bad file gives one line that names it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netgloss.data import images
from netgloss.data.images import UnreadableImage, image_size, list_files, open_image, open_mask, remark
from netgloss.data.sources import open_images
from netgloss.errors import UserError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode=None if mode in ("L", "RGB") else mode)


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_image(io.BytesIO(data))
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [round(v / 257) for v in values[0].tolist()]
    for kind in ("PNG", "TIFF"):
        image = open_image(io.BytesIO(encoded(Image.fromarray(values), kind)))
        assert np.asarray(image)[0].tolist() == [[v, v, v] for v in expected]


def test_sixteen_bit_portable_greymap_and_colour_png() -> None:
    assert pixel(b"P5\n2 1\n65535\n" + struct.pack(">HH", 65535, 0x8080)) == (255, 255, 255)
    assert pixel(b"P5\n2 1\n65535\n" + struct.pack(">HH", 65535, 0x8080), 1) == (128, 128, 128)
    assert pixel(b"P5\n1 1\n1023\n" + struct.pack(">H", 1023)) == (255, 255, 255)
    assert pixel(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 0x8080, 0))) == (255, 128, 0)


def test_float_tiff() -> None:
    grey = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert [pixel(encoded(Image.fromarray(grey), "TIFF"), x)[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(UnreadableImage, match="between 0 and 1, got 0 to 2"):
        open_image(io.BytesIO(encoded(Image.fromarray(2 * grey), "TIFF")))
    with pytest.raises(UnreadableImage, match="between 0 and 65535, got -1 to -1"):
        open_image(io.BytesIO(encoded(Image.fromarray(np.full((1, 1), -1, np.int32)), "TIFF")))


def test_transparency_lies_on_white() -> None:
    half = encoded(Image.new("LA", (1, 1), (0, 51)), "PNG")  # 20 % black over white
    assert pixel(half) == (204, 204, 204)
    assert pixel(encoded(Image.new("RGBA", (1, 1), (200, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG", transparency=(9, 9, 9))) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=bytes([0, 255]))
    assert [pixel(data, 0), pixel(data, 1)] == [(255, 255, 255), (40, 50, 60)]
    assert pixel(encoded(palette, "GIF", transparency=1), 1) == (255, 255, 255)


def test_grey_bilevel_palette_and_cmyk() -> None:
    assert pixel(encoded(Image.new("L", (1, 1), 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (1, 1), 1), "PNG")) == (255, 255, 255)
    cyan = pixel(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95), 8, 8)
    assert np.allclose(cyan, (0, 255, 255), atol=3)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixel(data) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    """A JPEG stored with tag o shows the same picture as the upright one, by the definition of the EXIF standard."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # top left is white
    undo = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud]
    stored = undo[(orientation - 1) % 4](upright) if orientation <= 4 else None
    if stored is None:  # row 0 is the (left, right, right, left) side, column 0 the (top, top, bottom, bottom)
        turned = upright.swapaxes(0, 1)
        stored = {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=100)
    assert image_size(io.BytesIO(data)) == (32, 16)
    assert np.abs(np.asarray(open_image(io.BytesIO(data))).astype(int) - upright).max() < 8


@pytest.mark.parametrize(
    "junk", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
def test_damaged_metadata_does_not_cost_the_picture(junk: bytes) -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=junk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(pixel(data), (255, 0, 0), atol=3)


JPEG = encoded(noise(), "JPEG")
BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (encoded(noise(), "PNG")[:2000], "truncated|broken|Truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"this is no picture\n", "not a picture that Pillow knows"),
    "zeros.png": (b"\0" * 4096, "not a picture"),
    "signature.png": (b"\x89PNG\r\n\x1a\n", "not a picture"),
    "bomb.png": (png(20000, 20000, 8, 2, b"\0"), "pixels, Pillow's limit"),
    "huge.png": (png(12000, 10000, 8, 0, b"\0"), "truncated|broken"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "corrupt.gif": (b"GIF89a\x04\0\x04\0\x80\0\0" + b"\xff" * 30, "."),
    "corrupt.tif": (b"II*\0\x08\0\0\0\xff\xff" + b"\x01" * 50, "."),
    "corrupt.webp": (b"RIFF\x20\0\0\0WEBPVP8 " + b"\1" * 20, "."),
    "corrupt.bmp": (b"BM" + b"\xff" * 60, "."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_line_with_the_name(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(encoded(noise(), "PNG"))
    source = open_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match=reason) as caught:
            source.image(source.ids.index(name))
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value, UserError)
    assert source.image(source.ids.index("good.png")).size == (64, 48)
    assert len(source.fingerprint) == 64


def test_truncation_at_every_place_is_told_or_harmless() -> None:
    for data in (
        JPEG,
        encoded(noise("L", (9, 9)), "PNG"),
        encoded(noise(size=(9, 9)), "TIFF"),
        encoded(noise(), "WEBP"),
    ):
        for length in range(0, len(data) - 1, max(len(data) // 60, 1)):
            with contextlib.suppress(UnreadableImage):
                assert open_image(io.BytesIO(data[:length]), name="cut").mode == "RGB"


def test_several_jpegs_in_one_file() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    assert np.allclose(pixel(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])), (255, 0, 0), atol=3)


def test_large_but_legal_pictures_open_without_a_warning() -> None:
    blank = zlib.compress((b"\0" + b"\0" * 1250) * 10000, 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", blank) + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(io.BytesIO(data)) == (10000, 10000)


def test_one_pixel() -> None:
    assert pixel(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")) == (1, 2, 3)


def test_missing_folder_and_odd_names(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"gone\.png: no such file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="it is a folder"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image(tmp_path / "pipe.png")
    (tmp_path / "two\nlines.png").write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        open_image(tmp_path / "two\nlines.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableImage, match="null"):
        open_image("a\0b.png")


def test_masks_keep_their_values() -> None:
    palette = Image.fromarray(np.array([[0, 7], [255, 3]], np.uint8)).convert("L")
    indexed = Image.fromarray(np.array([[0, 7], [2, 3]], np.uint8), "P")
    indexed.putpalette(list(range(30)))
    assert open_mask(io.BytesIO(encoded(palette, "PNG"))).tolist() == [[0, 7], [255, 3]]
    assert open_mask(io.BytesIO(encoded(indexed, "PNG"))).tolist() == [[0, 7], [2, 3]]
    assert open_mask(io.BytesIO(encoded(Image.fromarray(np.array([[5]], np.uint16)), "PNG"))).dtype == np.uint8
    with pytest.raises(UnreadableImage, match="grey or palette image, got mode RGB"):
        open_mask(io.BytesIO(encoded(noise(), "PNG")))
    with pytest.raises(UnreadableImage, match="between 0 and 255, got 256 to 256"):
        open_mask(io.BytesIO(encoded(Image.fromarray(np.array([[256]], np.uint16)), "PNG")))


def test_read_pictures_hold_no_open_file(tmp_path: Path) -> None:
    for name, data in (("a.gif", encoded(noise("L"), "GIF")), ("b.jpg", JPEG)):
        (tmp_path / name).write_bytes(data)
        before = len(os.listdir("/dev/fd"))
        image = open_image(tmp_path / name)
        assert len(os.listdir("/dev/fd")) == before
        assert pickle.loads(pickle.dumps(image)).tobytes() == image.tobytes()


def test_threads_leave_the_process_warnings_alone() -> None:
    bad_exif = encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert {image.size for image in pool.map(open_image, [io.BytesIO(bad_exif) for _ in range(300)])} == {(8, 8)}
    assert list(warnings.filters) == before


def test_links_are_followed_and_what_is_passed_over_is_named(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside, inside / ".hidden", inside / "sub"):
        folder.mkdir()
    for file in (outside / "x.png", inside / ".h.png", inside / "._z.png", inside / "sub" / "z.png"):
        file.write_bytes(b"")
    (inside / "leaves.png").symlink_to(outside / "x.png")
    (inside / "stays.png").symlink_to(inside / "sub" / "z.png")
    (inside / "folder").symlink_to(outside)
    (inside / "again").symlink_to(inside / "sub")
    (inside / "sub" / "loop").symlink_to(inside)
    (inside / "broken.png").symlink_to(inside / "nothing.png")
    os.mkfifo(inside / "pipe.png")
    files, notes = list_files(inside)
    assert files == ["folder/x.png", "leaves.png", "stays.png", "sub/z.png"]
    assert notes == [
        "1 broken links passed over: broken.png",
        "1 files of macOS (._NAME) passed over: ._z.png",
        "1 files that are not regular (pipes, devices) passed over: pipe.png",
        "1 hidden files passed over: .h.png",
        "1 hidden folders passed over: .hidden",
        "2 links to folders that are read already passed over: again, sub/loop",
        f"2 links out of {inside} were followed: folder, leaves.png",
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tangle_of_linked_folders_gives_each_file_once(data: st.DataObject) -> None:
    """Folders that link to each other in any way: it ends, and every real file is found exactly once."""
    number = data.draw(st.integers(1, 5))
    pairs = st.tuples(st.integers(0, number - 1), st.integers(0, number - 1))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        stored = [(root if data.draw(st.booleans()) else Path(temporary)) / f"folder{i}" for i in range(number)]
        for i, folder in enumerate(stored):
            folder.mkdir()
            (folder / f"{i}.PNG").write_bytes(b"")
            (root / f"link{i}").symlink_to(folder)
        for n, (i, j) in enumerate(data.draw(st.lists(pairs, max_size=12))):
            (stored[i] / f"to{n}").symlink_to(stored[j])
        files, _ = list_files(root)
        assert sorted(file.rpartition("/")[2] for file in files) == [f"{i}.PNG" for i in range(number)]
        source = open_images(root)
        assert len(source.class_names) == number
        assert sorted(source.targets.tolist()) == list(range(number))


def test_every_file_is_read_or_named(tmp_path: Path) -> None:
    for name in ("cat/É 1.PnG", "cat/b.JPG", "cat/c.jfif", "dog/d.TIF", "dog/e.mpo", "dog/f.pgm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    others = ("cat/x.tga", "cat/y.HEIC", "dog/._b.jpg", "dog/.DS_Store", "readme.txt", "noending")
    for name in others:
        (tmp_path / name).write_bytes(b"")
    source = open_images(tmp_path)
    said = " | ".join(source.notes)
    heic = not any("HEIC" in name for name in source.ids)  # read where its plug-in is installed
    assert len(source) == 6 + (not heic)
    assert all(name in said for name in others if heic or "HEIC" not in name)
    assert "1 pictures of formats that are not read" in said
    assert "2 files with other endings" in said
    if heic:
        assert "pip install pillow-heif" in said


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.tga").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no images in .*not read .*a\.tga.*broken links passed over: gone\.png"):
        open_images(tmp_path)


# -- ranges, frames, sizes --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 10, 12, 14, 16]),
    kind=st.sampled_from(["PNG", "TIFF"]),
    colour=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_are_scaled_by_the_bits_that_a_file_uses(bits: int, kind: str, colour: bool, seed: int) -> None:
    white = 2**bits - 1
    values = np.random.default_rng(seed).integers(0, white + 1, (3, 4, 3) if colour else (3, 4)).astype(np.uint16)
    values.flat[0] = white
    if colour:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        data = png(4, 3, 16, 2, rows)
    else:
        data = encoded(Image.fromarray(values), kind)
    image = open_image(io.BytesIO(data))
    expected = values.astype(float) * 255 / white
    found = np.asarray(image).astype(float)
    assert np.abs(found - (expected if colour else expected[..., None])).max() <= (1 if bits == 16 else 0.5)
    assert (remark(image) == "") == (bits == 16)
    assert bits == 16 or f"values of {bits} bits" in remark(image)


def test_the_range_that_a_file_states_is_believed() -> None:
    dark = b"P5\n1 1\n65535\n" + struct.pack(">H", 1000)
    assert pixel(dark) == (4, 4, 4)
    assert remark(open_image(io.BytesIO(dark))) == ""


def test_several_frames_are_said() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        several = io.BytesIO(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert remark(open_image(several)) == "the first of several frames or pages was read", kind
        assert remark(open_image(io.BytesIO(encoded(frames[0], kind)))) == ""


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000"]),
    st.integers(1, 8),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_the_size_in_the_header_is_that_of_the_picture(kind: str, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO(encoded(noise(size=size), kind, exif=exif))
    assert image_size(data) == open_image(data).size


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["RGBA", "LA", "P", "CMYK", "L", "1", "I;16"]), st.integers(1, 30), st.integers(1, 30))
def test_strips_change_nothing(mode: str, width: int, height: int) -> None:
    """A large picture is converted part by part; the parts together are what the whole gives."""
    values = np.random.default_rng(0).integers(0, 65536, (height, width)).astype(np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else noise("RGBA", (width, height)).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    whole = open_image(io.BytesIO(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_STRIP", 7)
        assert open_image(io.BytesIO(data)).tobytes() == whole.tobytes()
