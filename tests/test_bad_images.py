"""Every kind of picture comes out as the RGB it means, and every bad file gives one line that names it."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netgloss.data.images import UnreadableImage, image_size, list_files, open_image, open_mask
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


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside, inside / ".hidden", inside / "sub"):
        folder.mkdir()
    for file in (outside / "x.png", inside / ".h.png", inside / ".hidden" / "y.png", inside / "sub" / "z.png"):
        file.write_bytes(b"")
    (inside / "leaves.png").symlink_to(outside / "x.png")
    (inside / "stays.png").symlink_to(inside / "sub" / "z.png")
    (inside / "folder").symlink_to(outside)
    (inside / "broken.png").symlink_to(inside / "nothing.png")
    files, notes = list_files(inside)
    assert files == ["stays.png", "sub/z.png"]
    assert "3 links" in notes[0]
