"""Sources: what is found where, stable ids and fingerprints, splits, class names, and one line for every mistake."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netgloss.data import ArraySource, ImageSource, UnreadableImage, match_classes, open_images, split
from netgloss.data.sources import FileSource, open_sources
from netgloss.errors import UserError


def save(path: Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for value, name in enumerate(
        ("dog/b.png", "dog/a.JPG", "cat/deep/er/c.webp", "cat/d.tiff", "cat/e.bmp", "dog/f.gif")
    ):
        save(tmp_path / "pets" / name, 40 * value)
    return tmp_path / "pets"


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folder_of_classes(pets: Path) -> None:
    (pets / "notes.txt").write_text("x")
    (pets / "cat/.hidden.png").write_bytes(b"")
    (pets / "bird").mkdir()
    source = open_images(pets)
    assert source.ids == ["cat/d.tiff", "cat/deep/er/c.webp", "cat/e.bmp", "dog/a.JPG", "dog/b.png", "dog/f.gif"]
    assert source.class_names == ["cat", "dog"]
    assert source.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.targets.dtype == np.int64
    assert source.notes == [
        "1 files with other endings passed over: notes.txt",
        "1 hidden files passed over: cat/.hidden.png",
        "class folders without images: bird",
    ]
    assert source.description == "6 images of pets"
    assert source.image(4).getpixel((0, 0)) == (0, 0, 0)
    assert source.image(0).getpixel((0, 0)) == (120, 120, 120)
    assert source.size(0) == (4, 3)
    assert source.annotation(0) is None


def test_flat_mixed_and_single(pets: Path) -> None:
    flat = open_images(pets / "dog")
    assert (flat.class_names, flat.targets.tolist()) == ([], [-1, -1, -1])
    save(pets / "loose.png")
    mixed = open_images(pets)
    assert mixed.targets.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert mixed.notes == ["1 images lie next to the class folders and have no class"]
    one = open_images(pets / "loose.png")
    assert (one.ids, one.targets.tolist(), one.image(0).size) == (["loose.png"], [-1], (4, 3))


def test_folders_of_splits_are_pointed_out(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png")
    save(tmp_path / "val/b.png")
    assert "train, val: was one of these folders meant?" in open_images(tmp_path).notes[0]


def test_what_is_missing_or_empty_is_one_line(pets: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*/pest; near it: pets"):
        open_images(pets.parent / "pest" / "dog")
    (pets.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .*/empty: looked for jpg, .* ppm, .*found no files at all"):
        open_images(pets.parent / "empty")
    (pets.parent / "empty/a.txt").write_text("")
    with pytest.raises(UserError, match=r"found 1 files with other endings passed over: a\.txt"):
        open_images(pets.parent / "empty")
    with pytest.raises(UserError, match=r"neither a folder nor an \.npz file nor an image"):
        open_images(pets.parent / "empty/a.txt")
    with pytest.raises(UserError, match="cannot open a dict as images"):
        open_images({})  # type: ignore[arg-type]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    save(tmp_path / "ok.png", 9)
    os.rename(tmp_path / "ok.png", os.path.join(os.fsencode(tmp_path), b"\xff.png"))
    source = open_images(tmp_path)
    assert source.ids == ["\\xff.png"]
    assert source.image(0).getpixel((0, 0)) == (9, 9, 9)
    assert len(source.fingerprint) == 64


# -- fingerprint and subset -------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_pictures_not_of_the_place(pets: Path) -> None:
    first = open_images(pets).fingerprint
    other = pets.parent / "elsewhere" / "animals"
    shutil.copytree(pets, other)
    os.utime(other / "dog/b.png", (1, 1))
    assert open_images(other).fingerprint == first
    assert pickle.loads(pickle.dumps(open_images(other))).fingerprint == first
    changes = [
        lambda: save(other / "dog/b.png", 1),
        lambda: os.rename(other / "dog/b.png", other / "dog/bb.png"),
        lambda: os.rename(other / "dog", other / "hound"),
        lambda: save(other / "dog/z.png"),
        lambda: os.remove(other / "dog/b.png"),
    ]
    for change in changes:
        shutil.rmtree(other)
        shutil.copytree(pets, other)
        change()
        assert open_images(other).fingerprint != first


def formats_of(pixels: np.ndarray, kind: str, orientation: int) -> bytes:
    """A picture as a file of a kind, with an EXIF orientation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "BMP"]),
    megabytes=st.sampled_from([0, 0, 0, 5]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    set_back=st.booleans(),
    opened_before=st.booleans(),
)
def test_fingerprint_sees_every_change_in_place(
    kind: str, megabytes: int, where: float, flip: int, set_back: bool, opened_before: bool
) -> None:
    """Any byte of any file, same length, and even with the time of its last change set back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a.{kind.lower()}"
        pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
        file.write_bytes(formats_of(pixels, kind, 1) + bytes(megabytes << 20))
        source, before = open_images(folder), os.stat(file)
        first, state = source.fingerprint, source.known_state
        with open(file, "r+b") as stream:
            stream.seek(int(where * before.st_size))
            old = stream.read(1)[0]
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([old ^ flip]))
        if set_back:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(file).st_size == before.st_size
        again = source if opened_before else open_images(folder)
        again.recall(state, first)
        assert again.fingerprint != first
        assert not again.is_of(first)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_fingerprint_sees_the_orientation(kind: str, tmp_path: Path) -> None:
    found = set()
    for orientation in range(1, 9):
        (tmp_path / "a.png").write_bytes(formats_of(np.zeros((8, 8, 3), np.uint8), kind, orientation))
        found.add(open_images(tmp_path).fingerprint)
    assert len(found) == 8


def test_unchanged_files_are_not_read_again(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the files stands for their content, unless it is so new that a change could be missed."""
    assert open_images(pets).known_state == ""
    time.sleep(2.1)
    source = open_images(pets)
    first, state = source.fingerprint, source.known_state
    assert len(state) == 64
    read: list[int] = []
    monkeypatch.setattr(FileSource, "_digest", lambda self, i: read.append(i) or b"x")
    assert source.fingerprint == first
    for other in (open_images(pets), open_images(pets).subset(range(6))):
        other.recall(state, first)
        assert other.is_of(first)
    assert read == []
    checked = open_sources(pets, verify=True)
    checked.recall(state, first)
    assert checked.fingerprint != first
    assert sorted(read) == list(range(6))
    os.utime(pets / "dog/b.png")
    assert source.fingerprint != first


def test_fingerprints_of_earlier_versions_still_count(pets: Path) -> None:
    """Version 0.1.0 hashed the length and 4 KiB of each file; this is its fingerprint of these two files."""
    (pets / "cat").rename(pets.parent / "cat")
    for name, data in (("a.JPG", b"abc"), ("b.png", bytes(9000)), ("f.gif", b"")):
        (pets / "dog" / name).write_bytes(data)
    digest = hashlib.sha256(b"['dog']")
    for name, data in (("a.JPG", b"3:abc"), ("b.png", b"9000:" + bytes(4096)), ("f.gif", b"0:")):
        digest.update(f"\ndog/{name}\0{0}\0".encode() + hashlib.sha256(data).digest())
    source = open_images(pets)
    assert source.fingerprint != digest.hexdigest()
    assert source.is_of(digest.hexdigest())
    assert source.subset([0, 1, 2]).is_of(digest.hexdigest())
    assert not source.subset([0, 1]).is_of(digest.hexdigest())


def test_fingerprint_of_arrays_sees_each_byte_and_label() -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    first = ArraySource(x, np.arange(5)).fingerprint
    other = x.copy()
    other[3, 2, 1, 0] ^= 1
    assert ArraySource(x.copy(), np.arange(5)).fingerprint == first
    assert (
        len({first, ArraySource(other, np.arange(5)).fingerprint, ArraySource(x, np.arange(5)[::-1]).fingerprint}) == 3
    )
    assert ArraySource(x, np.arange(5), list("abcde")).fingerprint != first
    assert ArraySource(x.reshape(5, 6, 4, 3), np.arange(5)).fingerprint != first


def test_subset(pets: Path) -> None:
    source = open_images(pets)
    part = source.subset(np.array([4, 1]))
    assert part.ids == ["dog/b.png", "cat/deep/er/c.webp"]
    assert part.targets.tolist() == [1, 0]
    assert part.class_names == source.class_names
    assert part.image(0).tobytes() == source.image(4).tobytes()
    assert part.subset([1]).ids == ["cat/deep/er/c.webp"]
    os.remove(pets / "dog/a.JPG")
    os.remove(pets / "dog/f.gif")
    os.remove(pets / "cat/d.tiff")
    os.remove(pets / "cat/e.bmp")
    assert part.subset([1, 0]).fingerprint == open_images(pets).fingerprint  # as if these had been all


def test_a_file_that_vanished_is_unreadable_and_changes_the_fingerprint(pets: Path) -> None:
    source, before = open_images(pets), open_images(pets).fingerprint
    os.remove(pets / "dog/b.png")
    with pytest.raises(UnreadableImage, match=r"dog/b\.png: no such file"):
        source.image(4)
    assert source.fingerprint != before


def test_many_files_are_fingerprinted_fast(tmp_path: Path) -> None:
    data = os.urandom(5000)
    for i in range(2000):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    start = time.perf_counter()
    assert len(open_images(tmp_path).fingerprint) == 64
    assert time.perf_counter() - start < 2


def test_sources_go_to_data_loading_processes(pets: Path) -> None:
    class Pixels(torch.utils.data.Dataset):
        def __init__(self, source: ImageSource) -> None:
            self.source = source

        def __len__(self) -> int:
            return len(self.source)

        def __getitem__(self, i: int) -> int:
            return self.source.image(i).getpixel((0, 0))[0]

    loader = torch.utils.data.DataLoader(Pixels(open_images(pets)), batch_size=6, num_workers=1)
    assert [round(v / 40) for v in next(iter(loader)).tolist()] == [3, 2, 4, 1, 0, 5]


# -- arrays -----------------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RGB, RGB),
        (RGB[..., 0], RGB[..., [0, 0, 0]]),
        (RGB[..., :1], RGB[..., [0, 0, 0]]),
        (RGB.transpose(0, 3, 1, 2), RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (RGB.astype(np.float64) / 255, RGB),
        (torch.from_numpy(RGB).permute(0, 3, 1, 2), RGB),
        (torch.from_numpy(RGB), RGB),
        (
            torch.from_numpy(RGB[:, :3, :, :3]),
            RGB[:, :3, :, :3].transpose(0, 2, 3, 1),
        ),  # both orders fit: channels first
        (RGB[:, :3, :, :3], RGB[:, :3, :, :3]),  # both orders fit: channels last
        ((torch.from_numpy(RGB).permute(0, 3, 1, 2) / 255).requires_grad_(), RGB),
        (torch.zeros(2, 1, 4, 5, dtype=torch.bfloat16), 0 * RGB),
    ],
)
def test_arrays_of_every_order(images: Any, expected: np.ndarray) -> None:
    source = open_images(images)
    assert np.array_equal(np.stack([np.asarray(source.image(i)) for i in range(2)]), expected)
    assert source.size(0) == source.image(0).size
    assert (source.ids, source.targets.tolist()) == (["000000", "000001"], [-1, -1])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((4, 4), np.uint8), "got \\(4, 4\\)"),
        (np.zeros((4, 4, 3), np.uint8), "got \\(4, 4, 3\\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), "got \\(2, 4, 4, 2\\)"),
        (np.zeros((0, 4, 4), np.uint8), "got \\(0, 4, 4\\)"),
        (np.zeros((2, 0, 4, 3), np.uint8), "got"),
        (np.full((2, 4, 4), 2.0), "must lie in \\[0, 1\\], got 2 to 2"),
        (np.full((2, 4, 4), np.nan), "got nan to nan"),
        (np.zeros((2, 4, 4), np.int64), "got int64"),
        (np.zeros((2, 4, 4), object), "got object"),
    ],
)
def test_arrays_that_are_no_images(images: np.ndarray, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        open_images(images)


def test_targets_of_arrays() -> None:
    source = ArraySource(RGB, [1, -1])
    assert (source.class_names, source.targets.tolist()) == (["class 0", "class 1"], [1, -1])
    assert ArraySource(RGB, np.array([[1], [0]]), ["a", "b"]).targets.tolist() == [1, 0]
    for bad, reason in (
        ([0], "2 images need 2"),
        ([0.0, 1.0], "whole numbers"),
        ([0, 5], "one of 2 classes, got 0 to 5"),
    ):
        with pytest.raises(UserError, match=reason):
            ArraySource(RGB, bad, ["a", "b"])


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez_compressed(path, x=RGB, y=[1, 0], classes=["cat", "dog"])
    source = open_images(path)
    assert (source.class_names, source.targets.tolist()) == (["cat", "dog"], [1, 0])
    assert np.array_equal(np.asarray(source.image(1)), RGB[1])
    assert source.description == "2 images of some.npz"
    np.savez(path, x_train=RGB, y_train=[1, 0], x_test=RGB[:1, ..., 0])
    assert open_images(f"{path}:train").class_names == ["class 0", "class 1"]
    assert open_images(f"{path}:test").targets.tolist() == [-1]
    with pytest.raises(UserError, match=r"no array 'x', but x_train, y_train, x_test; say some\.npz:train"):
        open_images(path)
    with pytest.raises(UserError, match="no array 'x_val', but x_train"):
        open_images(f"{path}:val")
    with pytest.raises(UserError, match=r"no such file or folder: .*sone\.npz; near it: some\.npz"):
        open_images(f"{tmp_path}/sone.npz:test")


def header(shape: tuple[int, ...], descr: str = "|u1", version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (header((10**9, 10**9)) + b"\0" * 10, r"claims the shape \(1000000000, 1000000000\)"),
        (header((2, 4, 4)) + b"\0" * 31, "claims the shape"),
        (header((-1, 4, 4)) + b"\0" * 31, "claims the shape|not a readable"),
        (header((2, 4, 4), "|O") + b"\0" * 32, "holds Python objects"),
        (header((2, 4, 4), version=b"\7\0") + b"\0" * 32, "unknown format version"),
        (b"\x93NUMPY\1\0\xff\xff{", "not a readable .npz archive"),
        (b"cos\nsystem\n(S'true'\ntR.", "not a readable .npz archive"),
        (b"", "not a readable .npz archive"),
        (header((2, 4, 4)).replace(b"{", b"(") + b"\0" * 32, "not a readable .npz archive"),
    ],
)
def test_hostile_npz(tmp_path: Path, member: bytes, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(UserError, match=reason) as caught:
        open_images(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=RGB)
    data = (tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(data)
    flipped[300] ^= 255
    for bad in (b"", b"text", data[:100], data[:-5], bytes(flipped), b"\x93NUMPY\1\0"):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.npz"):
            open_images(tmp_path / "bad.npz")


# -- timm and critters ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves the archive to the garbage collector
def test_timm_folder_and_tar_agree_with_our_own(pets: Path) -> None:
    for path in (pets / "cat/d.tiff", pets / "cat/e.bmp", pets / "dog/f.gif", pets / "cat/deep/er/c.webp"):
        path.unlink()
    save(pets / "cat/c.png", 7)
    ours, timm = open_images(pets), open_images(f"timm:folder,root={pets}")
    assert (timm.ids, timm.class_names) == (ours.ids, ours.class_names)
    assert timm.targets.tolist() == ours.targets.tolist()
    assert timm.fingerprint == ours.fingerprint
    assert timm.image(0).tobytes() == ours.image(0).tobytes()
    (pets / "dog/a.JPG").write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match=r"dog/a\.JPG: not a picture"):
        timm.image(1)
    os.remove(pets / "dog/a.JPG")
    with pytest.raises(UnreadableImage, match=r"dog/a\.JPG: no such file"):
        timm.image(1)
    with tarfile.open(pets.parent / "pets.tar", "w") as tar:
        tar.add(pets / "cat", "cat")
        tar.add(pets / "dog", "dog")
    packed = open_images(f"timm:,root={pets.parent / 'pets.tar'}")
    assert packed.class_names == ["cat", "dog"]
    assert sorted(packed.image(i).getpixel((0, 0))[0] for i in range(len(packed))) == [0, 7]
    assert pickle.loads(pickle.dumps(packed)).fingerprint == packed.fingerprint


def test_timm_through_torchvision(pets: Path) -> None:
    source = open_images(f"timm:torch/image_folder,root={pets},split=train")
    assert source.class_names == ["cat", "dog"]
    assert source.targets.tolist() == [0, 0, 0, 1, 1]  # torchvision knows no gif
    assert source.image(4).size == (4, 3)
    (pets / "dog/b.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="000004"):
        source.image(4)


def test_timm_mistakes_are_one_line(pets: Path) -> None:
    for spec, reason in (
        (f"timm:torch/nothing,root={pets}", "timm cannot open .*Unknown torchvision dataset nothing"),
        (f"timm:torch/cifar10,root={pets}", "timm cannot open .*not found or corrupted"),
        (f"timm:folder,root={pets}x", "no such file or folder: .*petsx; near it: pets"),
        ("timm:torch/cifar10", "say where the images lie, timm:torch/cifar10,root=FOLDER"),
        ("timm:folder", "say where the images lie, timm:folder,root=FOLDER"),
        (f"timm:folder,{pets}", "expected key=value"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            open_images(spec)
        assert "\n" not in str(caught.value)


def test_critters() -> None:
    source = open_images("critters:12,seed=1,size=64")
    other = open_images("critters:12,seed=2,size=64")
    assert len(source) == 12
    assert source.image(3).size == source.size(3) == (64, 64)
    annotation = source.annotation(3)
    assert annotation is not None
    assert annotation.mask is not None
    assert set(source.targets.tolist()) <= set(range(len(source.class_names)))
    assert source.fingerprint != other.fingerprint
    part = pickle.loads(pickle.dumps(source)).subset([5])
    assert part.image(0).tobytes() == source.image(5).tobytes()
    assert np.array_equal(part.annotation(0).mask, source.annotation(5).mask)
    assert len(open_images("critters")) > 12
    for spec, reason in (
        ("critters:5,sed=1", "no option 'sed'; did you mean seed"),
        ("critters:five", "number of scenes, got 'five'"),
        ("critters:5,seed=x", "seed must be of type int, got 'x'"),
        ("critters:5,size=1", "size"),
        ("critters:0", "at least 1"),
    ):
        with pytest.raises(UserError, match=reason):
            open_images(spec)


# -- split ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    targets=st.lists(st.integers(-1, 3), min_size=1, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 100),
)
def test_split_is_a_stratified_partition_that_ignores_order(targets: list[int], fraction: float, seed: int) -> None:
    n = len(targets)
    source = ArraySource(np.zeros((n, 2, 2), np.uint8), np.array(targets), list("abcd"))
    fit, held = split(source, fraction)
    assert sorted([*fit, *held]) == list(range(n))
    assert (np.sort(fit) == fit).all()
    for value in set(targets):
        members = np.flatnonzero(source.targets == value)
        count = np.isin(members, fit).sum()
        assert abs(count - fraction * len(members)) <= 0.5 + 1e-9 or count in (1, len(members) - 1)
        assert count >= 1
        assert count < len(members) or len(members) == 1
    order = np.random.default_rng(seed).permutation(n)
    shuffled = source.subset(order)
    assert {shuffled.ids[i] for i in split(shuffled, fraction)[0]} == {source.ids[i] for i in fit}


def test_split_of_one_image_and_of_a_silly_fraction() -> None:
    source = ArraySource(np.zeros((1, 2, 2), np.uint8))
    fit, held = split(source)
    assert (fit.tolist(), held.tolist()) == ([0], [])
    for fraction in (0, 1, -3, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            split(source, fraction)


# -- class names ------------------------------------------------------------------------------------------------------

IMAGENET = ["tench, Tinca tinca", "lesser panda, red panda", "crane", "crane", "Zebra"]
WNIDS = ["n1", "n2", "n3", "n4", "n5"]


@pytest.mark.parametrize(
    ("names", "classes", "wnids", "expected"),
    [
        (["n2", "n9", "n1"], IMAGENET, WNIDS, [1, -1, 0]),
        (["tench", "Lesser_Panda", "zebra", "crane", "red panda"], IMAGENET, WNIDS, [0, 1, 4, -1, -1]),
        (["tench, Tinca tinca", "n1"], IMAGENET, None, [0, -1]),
        (["cat", "CAT "], ["Cat", "cat"], None, [1, -1]),  # exact beats alike; alike twice is a tie
        (["ankle-boot"], ["Bag", "Ankle boot"], None, [1]),
        (["x", "y"], ["cat", "dog"], None, [-1, -1]),  # as many, but nothing agrees: no guess
        (["x", "y"], ["class 0", "class 1"], None, [-1, -1]),
        (["0", "1", "2"], ["cat", "dog", "eel"], None, [0, 1, 2]),
        (["class 2", "class 0", "class 1"], ["cat", "dog", "eel"], None, [2, 0, 1]),
        (["0", "1"], ["cat", "dog", "eel"], None, [-1, -1]),
        (["1", "2", "3"], ["cat", "dog", "eel"], None, [-1, -1, -1]),
        (["0", "2"], ["class 0", "class 1", "class 2"], None, [0, 2]),
        ([], ["cat"], None, []),
    ],
)
def test_match_classes(names: list[str], classes: list[str], wnids: list[str] | None, expected: list[int]) -> None:
    found = match_classes(names, classes, wnids)
    assert found.dtype == np.int64
    assert found.tolist() == expected


# -- real data and imports --------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_sources(shared: Path) -> None:
    rows = [line.split("\t") for line in (shared / "weights/imagenet_classes.tsv").read_text().splitlines()[1:]]
    wnids, names = [row[1] for row in rows], [row[2] for row in rows]
    train = open_images(shared / "data/imagenette/train")
    assert match_classes(train.class_names, names, wnids).tolist() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    fit, held = split(train)
    assert (len(fit), len(held)) == (1200, 300)
    animals = open_images(shared / "data/animals")
    expected = {"goldfish": 1, "koala": 105, "lion": 291, "tiger": 292, "zebra": 340, "hamster": 333}
    expected |= {"lesser_panda": 387, "giant_panda": 388}
    matched = match_classes(animals.class_names, names).tolist()
    assert dict(zip(animals.class_names, matched, strict=True)) == expected
    cifar = open_images(shared / "data/cifar10/cifar10_test2000.npz")
    assert (len(cifar), cifar.class_names[0], np.bincount(cifar.targets).tolist()) == (2000, "airplane", [200] * 10)
    fashion = open_images(f"{shared}/data/fashion_mnist/fashion_mnist.npz:test")
    assert (len(fashion), fashion.image(0).mode, fashion.size(0)) == (10000, "RGB", (28, 28))


def test_heavy_packages_wait_until_used() -> None:
    code = "import sys, netgloss.data; print({'timm', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_open_file_objects_work_too() -> None:
    from netgloss.data import open_image

    file = io.BytesIO()
    Image.new("L", (2, 2), 9).save(file, "PNG")
    assert open_image(file).getpixel((1, 1)) == (9, 9, 9)
