"""Pictures that are small as files and huge as pixels, and folders with one bad picture: little memory, one line."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import netgloss
from netgloss.activations import image_batches
from netgloss.classifiers import load_classifier, preprocessing
from netgloss.classifiers.preprocessing import INTERPOLATIONS, Preprocessing
from netgloss.cli import main
from netgloss.data import ArraySource, open_images
from netgloss.errors import UserError
from netgloss.workflows.serve import UploadExplainer


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """More address space than this raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def png(width: int, height: int) -> bytes:
    """A grey picture in a few bytes: bright on the left and above, dark elsewhere."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, half = zlib.compressobj(9), (width + 1) // 2
    row = b"\0" + b"\xc8" * half + b"\x32" * (width - half)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


LONG = st.sampled_from([60_000, 1_000_000, 20_000_000])
SHAPES = st.one_of(
    st.tuples(LONG, st.integers(1, 3)), st.tuples(st.integers(1, 3), st.sampled_from([60_000, 1_000_000]))
)


@settings(max_examples=12, deadline=None)
@given(SHAPES, st.sampled_from([256, None, (300, 260)]), st.sampled_from(INTERPOLATIONS))
def test_thin_pictures_need_little_memory(
    shape: tuple[int, int], resize: int | tuple[int, int] | None, interpolation: str
) -> None:
    """To resize the whole picture first would take up to 3.9 TB."""
    prepare = Preprocessing((224, 224), resize=resize, interpolation=interpolation)
    image = Image.new("RGB", shape, (7, 8, 9))
    with at_most(600):
        pixels = prepare.bytes(image)
    assert tuple(pixels.shape) == (3, 224, 224)
    if resize is not None:
        assert pixels.flatten(1).unique(dim=1).tolist() == [[7], [8], [9]]


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.one_of(st.integers(1, 60), st.tuples(st.integers(1, 60), st.integers(1, 60))),
    st.sampled_from(INTERPOLATIONS),
)
def test_the_crop_in_the_source_is_the_crop_of_the_resized_picture(
    shape: tuple[int, int], size: tuple[int, int], resize: int | tuple[int, int], interpolation: str
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    if interpolation in ("nearest", "box"):  # where a pixel lies on the border, rounding decides: its neighbour is near
        values[:] = (np.arange(shape[0])[None, :, None] + np.arange(shape[1])[:, None, None]) // 2
    else:
        values = values // 4 + 90
    image, prepare = Image.fromarray(values), Preprocessing(size, resize=resize, interpolation=interpolation)
    whole = prepare.bytes(image).int()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "_MOST_PIXELS", 0)
        part = prepare.bytes(image).int()
    assert (whole - part).abs().max() <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> netgloss.Run:
    plain = netgloss.EvaluationOptions(untrained_images=0)
    out = tmp_path_factory.mktemp("bombs") / "run"
    return netgloss.explain(
        "nmf", "critters", "block5", "critters:40", out=out, num_concepts=3, seeds=1, evaluation=plain
    )


def bombs(folder: Path) -> Path:
    folder.mkdir()
    (folder / "long.png").write_bytes(png(60_000, 1))
    (folder / "high.png").write_bytes(png(1, 60_000))
    return folder


@pytest.mark.usefixtures("little_memory")
def test_every_place_that_decodes_bounds_its_memory(run: netgloss.Run, tmp_path: Path) -> None:
    """A folder, an array, show and an upload; 60,000 x 1 pixels took 11.8 GB at an input of 224."""
    folder = bombs(tmp_path / "images")
    assert all(file.stat().st_size < 400 for file in folder.iterdir())
    classifier = load_classifier("torchvision:squeezenet1_0", random_weights=True)
    thin = ArraySource(np.full((2, 1, 60_000), 200, np.uint8))
    for source in (open_images(folder), thin):
        pixels, reasons = next(image_batches(classifier, source, [0, 1], workers=0))
        assert reasons == ["", ""]
        assert tuple(pixels.shape) == (2, 3, 224, 224)
    assert len(netgloss.show(run, folder, out=tmp_path / "shown")) == 2
    explain = UploadExplainer(run, device="cpu").explain
    assert explain(png(60_000, 1))["image"]["prediction"]
    with pytest.raises(UserError, match="at most"):
        explain(png(10_000, 6_000))


def test_one_bad_picture_does_not_stop_show(
    run: netgloss.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named and left out wherever it stands; the exit code is 2 only if all are bad."""
    folder = tmp_path / "images"
    folder.mkdir()
    scenes = netgloss.open_images("critters:3,seed=9")
    for i, name in enumerate(("b", "d", "e")):
        scenes.image(i).save(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    (folder / "f.gif").write_bytes(b"")
    (folder / "g.png").write_bytes(png(20_000, 1)[:60])
    (folder / "._h.png").write_bytes(b"")
    main(["show", str(run.path), str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0001-b.png", "0003-d.png", "0004-e.png"]
    for name in ("a.png", "c.png", "f.gif", "g.png", "._h.png"):
        assert name in said
    assert "3 of 7 images explained, 4 left out" in said
    for name in ("b", "d", "e"):
        (folder / f"{name}.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["show", str(run.path), str(folder), "--out", str(tmp_path / "none")])
    assert stopped.value.code == 2


def test_show_leaves_out_what_does_not_fit_in_memory(run: netgloss.Run) -> None:
    class Large(ArraySource):
        def image(self, i: int) -> Image.Image:
            if i == 1:
                raise MemoryError
            return super().image(i)

    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    assert [one.image for one in netgloss.show(run, Large(pixels))] == ["000000", "000002"]


def test_what_is_odd_about_pictures_is_said_once_for_all(run: netgloss.Run, tmp_path: Path) -> None:
    from netgloss.progress import Silent

    class Lines(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, message: str) -> None:
            self.lines.append(message)

    folder, frames = tmp_path / "images", [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    folder.mkdir()
    for name in "ab":
        frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((64, 64), 4095, np.uint16)).save(folder / "c.png")
    frames[0].save(folder / "d.png")
    said = Lines()
    netgloss.capture(run.classifier(), open_images(folder), ["block5"], tmp_path / "store", progress=said)
    notes = [line for line in said.lines if line.startswith("note: ")]
    assert notes == [
        "note: 2 images: the first of several frames or pages was read (a.gif, b.gif)",
        "note: 1 image: values of 12 bits in a 16-bit file were scaled so that 4095 is white (c.png)",
    ]
    buffer = io.BytesIO((folder / "c.png").read_bytes())
    assert netgloss.data.open_image(buffer).getpixel((0, 0)) == (255, 255, 255)
