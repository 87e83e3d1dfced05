"""Hostile inputs: each case makes files in a folder and gives a command line that must be refused.

``CASES`` is a table of (name, make); ``make(folder, good)`` writes below ``folder`` and returns the arguments. ``good``
is a folder with an intact ``store``, ``run`` and ``images``, to be copied and damaged. Code that a case plants touches
``folder / "ran"``.
"""

# ruff: noqa: E501
from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

Make = Callable[[Path, Path], list[str]]
CASES: list[tuple[str, Make]] = []
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**30
ODD_NAMES = ["../../evil", "/etc/passwd", "<script>alert(1)</script>", "a\nb", "\x1b[31mred", "a\0b", "x" * 5000, "",
             "‮gnp.exe", "\ud800", "[/red]", "{0.__class__}", "%s%n", "; rm -rf /", "$(touch ran)"]  # fmt: skip


def add(name: str, make: Make) -> None:
    CASES.append((name, make))


class Runs:
    """Unpickling it touches a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def capturing(images: object, *more: object, out: str = "out/store") -> list[str]:
    return ["capture", "--model", "critters", "--layer", "block5", "--images", str(images), "--out", out,
            *map(str, more)]  # fmt: skip


# -- images -----------------------------------------------------------------------------------------------------------


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], next_ifd: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + struct.pack("<I", next_ifd)


def zipped(names: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


BOMB = zlib.compress(b"\0" * 50_000_000, 9)
IMAGES: dict[str, bytes] = {
    "empty.png": b"",
    "text.png": b"hello",
    "html.jpg": b"<html><script>alert(1)</script>",
    "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "zeros.bmp": bytes(5000),
    "noise.webp": np.random.default_rng(0).bytes(5000),
    "elf.png": b"\x7fELF" + bytes(100),
    "pdf.jpg": b"%PDF-1.7\n",
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n",
    "psd.png": b"8BPS\0\1" + bytes(40),
    "icon.png": b"\0\0\1\0\1\0" + bytes(40),
    "zip.png": zipped({"../../evil.txt": b"x"}),
    "tar.jpg": tarred("../../evil.txt"),
    "gzip.png": b"\x1f\x8b\x08" + bytes(20),
    "bomb-wide.png": png(60_000, 60_000, BOMB, depth=1, colour=0),
    "bomb-int32.png": png(2**31 - 1, 2**31 - 1, b""),
    "no-size.png": png(0, 0, b""),
    "no-data.png": png(8, 8, b""),
    "half-data.png": png(8, 8, zlib.compress(bytes(100))[:9]),
    "bad-depth.png": png(8, 8, zlib.compress(bytes(300)), depth=7),
    "bad-colour.png": png(8, 8, zlib.compress(bytes(300)), colour=9),
    "bomb-text.png": png(8, 8, b"", extra=chunk(b"zTXt", b"k\0\0" + BOMB)),
    "bomb-profile.png": png(8, 8, b"", extra=chunk(b"iCCP", b"k\0\0" + BOMB)),
    "bad-crc.png": encoded("PNG")[:20] + b"\xff" + encoded("PNG")[21:],
    "signature.png": encoded("PNG")[:8],
    "cut.png": encoded("PNG")[:200],
    "header.jpg": encoded("JPEG")[:2],
    "cut.jpg": encoded("JPEG")[:300],
    "tables.jpg": b"\xff\xd8" + b"\xff\xdb\0\x43\0" + bytes(10),
    "no-frame.jpg": b"\xff\xd8\xff\xd9",
    "length-zero.jpg": b"\xff\xd8\xff\xe0\0\0",
    "wide.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;",
    "no-frame.gif": b"GIF89a\1\0\1\0\0\0\0;",
    "cut.gif": encoded("GIF")[:60],
    "cut.webp": encoded("WEBP")[:40],
    "riff.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    "cut.bmp": encoded("BMP")[:60],
    "wide.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**31 - 1, 1, 1, 24, 0, 0, 0, 0, 0, 0),
    "high.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "loop.tif": tiff((256, 4, 1, 10), next_ifd=8),
    "wide.tif": tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), (258, 3, 1, 8), (273, 4, 1, 8)),
    "outside.tif": tiff((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (273, 4, 1, 2**31), (279, 4, 1, 2**31)),
    "many.tif": tiff((256, 4, 2**32 - 1, 8)),
    "cut.tif": encoded("TIFF")[:40],
    "wide.ppm": b"P6\n99999999 99999999\n255\n",
    "negative.ppm": b"P6\n-5 -5\n255\n" + bytes(75),
    "white-zero.ppm": b"P6\n2 2\n0\n" + bytes(12),
    "words.ppm": b"P6\nten ten\n255\n",
    "plain-cut.ppm": b"P3\n9 9\n255\n1 2 3",
}


def one_image(name: str, data: bytes) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        (folder / "images").mkdir()
        (folder / "images" / name).write_bytes(data)
        return capturing("images")

    return make


for _name, _data in IMAGES.items():
    add(f"image {_name}", one_image(_name, _data))


def special(kind: str) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        (folder / "images").mkdir()
        path = folder / "images" / "a.png"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                with socket.socket(socket.AF_UNIX) as one:
                    one.bind("a.png")
            finally:
                os.chdir(here)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            path.symlink_to(kind)
        return capturing("images") if not kind.startswith("=") else []

    return make


for _kind in (
    "fifo",
    "socket",
    "folder",
    "loop",
    "/dev/zero",
    "/dev/stdin",
    "/etc/passwd",
    "gone.png",
    "..",
    "/proc/self/mem",
):
    add(f"image is {_kind}", special(_kind))
for _path in ("/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem", "gone", "", "a\0b", "x" * 5000, "~nobody/x",
              "\x1b[2J", "critters:0", "critters:-3", "critters:many", "critters:" + "9" * 30, "critters:" + "9" * 5000,
              "critters:5,size=nan", "critters:5,seed=None", "critters:5,size=-4", "critters:5,size=99999999",
              "critters:5,x", "critters:5,__class__=1", "critters:5,seed=" + "(" * 3000, "timm:", "timm:x,root=gone",
              "timm:../../x,root=.", "timm:folder,root=.,reader=__import__('os')", "http://127.0.0.1:9/x.png",
              "file:///etc/passwd", "s3://nobody/nothing", "gone.npz:test", "\ud800.png"):  # fmt: skip
    add(f"images {_path[:30]!r} {len(_path)}", lambda folder, good, path=_path: capturing(path))


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


X = np.zeros((4, 8, 8, 3), np.uint8)
ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "no zip": lambda f: b"PK\3\4 nothing",
    "cut": lambda f: npz(x=X)[:100],
    "empty": lambda f: zipped({}),
    "pickled": lambda f: npz(x=np.array([Runs(f / "ran")] * 4, object)),
    "pickled classes": lambda f: npz(x=X, y=np.zeros(4, int), classes=np.array([Runs(f / "ran")], object)),
    "pickle as array": lambda f: zipped({"x.npy": pickle.dumps(Runs(f / "ran"))}),
    "code in header": lambda f: zipped({"x.npy": npy("__import__('pathlib').Path('ran').touch()")}),
    "deep header": lambda f: zipped({"x.npy": npy("(" * 110)}),
    "huge shape": lambda f: zipped({"x.npy": npy("{'descr':'|u1','fortran_order':False,'shape':(10**9,10**9)}")}),
    "claims more": lambda f: zipped({"x.npy": npy("{'descr':'|u1','fortran_order':False,'shape':(99999999,64,64,3)}")}),
    "negative shape": lambda f: zipped({"x.npy": npy("{'descr':'|u1','fortran_order':False,'shape':(-1,8,8,3)}")}),
    "version 9": lambda f: zipped({"x.npy": npy("{}", version=b"\x09\x00")}),
    "bomb": lambda f: zipped(
        {"x.npy": npy("{'descr':'|u1','fortran_order':False,'shape':(1,8,8,3)}", bytes(30_000_000))}
    ),
    "outside": lambda f: zipped({"../../x.npy": b""}),
    "one dimension": lambda f: npz(x=np.zeros(9, np.uint8)),
    "no images": lambda f: npz(x=X[:0]),
    "five channels": lambda f: npz(x=np.zeros((4, 8, 8, 5), np.uint8)),
    "nan": lambda f: npz(x=np.full((4, 8, 8, 3), np.nan)),
    "inf": lambda f: npz(x=np.full((4, 8, 8, 3), np.inf)),
    "bytes as floats": lambda f: npz(x=255 * np.ones((4, 8, 8, 3))),
    "complex": lambda f: npz(x=X.astype(complex)),
    "texts": lambda f: npz(x=np.array(["a"] * 4)),
    "dates": lambda f: npz(x=np.zeros((4, 8, 8), "datetime64[s]")),
    "records": lambda f: npz(x=np.zeros((4, 8, 8), [("a", "u1")])),
    "labels too few": lambda f: npz(x=X, y=np.zeros(2, int)),
    "labels are floats": lambda f: npz(x=X, y=np.zeros(4)),
    "labels are huge": lambda f: npz(x=X, y=np.full(4, 2**62)),
    "labels below -1": lambda f: npz(x=X, y=np.full(4, -7)),
    "labels beyond classes": lambda f: npz(x=X, y=np.full(4, 3), classes=np.array(["a"])),
    "labels are a map": lambda f: npz(x=X, y=np.zeros((4, 8), int)),
}


def archive(data: Callable[[Path], bytes]) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        (folder / "a.npz").write_bytes(data(folder))
        return capturing("a.npz")

    return make


for _name, _make in ARRAYS.items():
    add(f"arrays {_name}", archive(_make))


# -- checkpoints and networks -----------------------------------------------------------------------------------------


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def torch_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


CHECKPOINTS: dict[str, Callable[[Path], bytes]] = {
    "empty.pth": lambda f: b"",
    "text.pth": lambda f: b"hello",
    "pickle.pth": lambda f: pickle.dumps(Runs(f / "ran")),
    "pickle0.pt": lambda f: pickle.dumps(Runs(f / "ran"), protocol=0),
    "pickle.bin": lambda f: pickle.dumps({"state_dict": Runs(f / "ran")}),
    "pickle.ckpt": lambda f: torch_bytes({"a": torch.zeros(2), "b": Runs(f / "ran")}),
    "pickle.safetensors": lambda f: pickle.dumps(Runs(f / "ran")),
    "module.pth": lambda f: torch_bytes(torch.nn.Linear(2, 2)),
    "list.pth": lambda f: torch_bytes([torch.zeros(2)]),
    "number.pth": lambda f: torch_bytes(3),
    "mixed.pth": lambda f: torch_bytes({"a": torch.zeros(2), "b": 3}),
    "nested.pth": lambda f: torch_bytes({"state_dict": {"state_dict": {"state_dict": {"a": torch.zeros(2)}}}}),
    "none.pth": lambda f: torch_bytes({}),
    "cut.pth": lambda f: torch_bytes({"a": torch.zeros(200)})[:300],
    "zip.pth": lambda f: zipped({"../../evil": b"x"}),
    "zip-pickle.pth": lambda f: zipped(
        {"archive/data.pkl": pickle.dumps(Runs(f / "ran")), "archive/version": b"3", "archive/byteorder": b"little"}
    ),
    "bomb.pth": lambda f: zipped({"archive/data.pkl": b"\x80\x02]" + b"(" * 1_000_000, "archive/version": b"3"}),
    "script.pth": lambda f: zipped(
        {"archive/code/__torch__.py": b"x", "archive/constants.pkl": b"", "archive/version": b"3"}
    ),
    "other.pth": lambda f: torch_bytes({"stem.conv.weight": torch.zeros(2), "x<script>": torch.zeros(1)}),
    "names.pth": lambda f: torch_bytes({name: torch.zeros(1) for name in ODD_NAMES if "\ud800" not in name}),
    "empty.safetensors": lambda f: b"",
    "short.safetensors": lambda f: b"\1\0\0",
    "long.safetensors": lambda f: struct.pack("<Q", 2**63) + b"{}",
    "gigabytes.safetensors": lambda f: struct.pack("<Q", 2**32) + b"{}",
    "no-json.safetensors": lambda f: header(b"{nothing"),
    "deep.safetensors": lambda f: header(DEEP.encode()),
    "list.safetensors": lambda f: header(b"[1, 2]"),
    "offsets.safetensors": lambda f: header(tensor(offsets=(0, 2**40)), bytes(8)),
    "backwards.safetensors": lambda f: header(tensor(offsets=(8, 0)), bytes(8)),
    "shape.safetensors": lambda f: header(tensor(shape=(2**40, 2**40)), bytes(8)),
    "negative.safetensors": lambda f: header(tensor(shape=(-2,)), bytes(8)),
    "dtype.safetensors": lambda f: header(tensor("F999"), bytes(8)),
    "hole.safetensors": lambda f: header(tensor(offsets=(4, 12)), bytes(12)),
    "trailing.safetensors": lambda f: header(tensor(), bytes(99)),
    "utf8.safetensors": lambda f: header(b'{"\xff": 1}'),
}


def checkpoint(name: str, data: Callable[[Path], bytes]) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        (folder / name).write_bytes(data(folder))
        return ["layers", "--model", "torchvision:squeezenet1_0", "--checkpoint", name]

    return make


for _name, _make in CHECKPOINTS.items():
    add(f"checkpoint {_name}", checkpoint(_name, _make))
for _path in ("/dev/zero", "/dev/null", "gone.pth", ".", "", "a\0b", "x" * 5000, "\x1b]0;evil\x07"):
    add(f"checkpoint {_path[:20]!r}",
        lambda folder, good, path=_path: ["layers", "--model", "torchvision:squeezenet1_0", "--checkpoint", path])  # fmt: skip
for _model in ("", ":", "timm:", "torchvision:", "timm:../../x", "torchvision:<script>", "timm:resnet18.<b>", "gone.py:f",
               "/dev/zero.py:f", "timm:hf-hub:evil/repo", "hf-hub:evil/repo", "os:system", "critters:3", "\x1b[31m",
               "timm:local-dir:/etc", "a\0b.py:f", "torchvision:segmentation.fcn_resnet50", "torchvision:raft_large",
               "x" * 5000, "\ud800"):  # fmt: skip
    add(f"model {_model[:30]!r}", lambda folder, good, model=_model: ["layers", "--model", model, "--random-weights"])

FLAGS: dict[str, list[str]] = {
    "classes half": ["--num-classes", "0.5"],
    "classes negative": ["--num-classes", "-5"],
    "classes huge": ["--num-classes", "999999999999999"],
    "classes word": ["--num-classes", "many"],
    "classes beyond integers": ["--num-classes", "9" * 40],
    "size zero": ["--input-size", "0"],
    "size negative": ["--input-size", "-3"],
    "size huge": ["--input-size", "10000000"],
    "size beyond integers": ["--input-size", "9" * 40],
    "mean nan": ["--mean", "nan", "nan", "nan"],
    "mean inf": ["--mean", "inf", "0", "0"],
    "mean of two": ["--mean", "0.5", "0.5"],
    "std zero": ["--std", "0", "0", "0"],
    "std negative": ["--std", "-1", "1", "1"],
    "std nan": ["--std", "nan", "1", "1"],
    "names gone": ["--class-names", "gone.txt"],
    "names device": ["--class-names", "/dev/full"],
    "names folder": ["--class-names", "."],
    "unknown flag": ["--rm", "-rf"],
}
for _name, _flags in FLAGS.items():
    add(f"network flag {_name}",
        lambda folder, good, flags=_flags: ["layers", "--model", "torchvision:squeezenet1_0", "--random-weights", *flags])  # fmt: skip


def names_file(data: bytes) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        (folder / "names.txt").write_bytes(data)
        return ["layers", "--model", "critters", "--class-names", "names.txt"]

    return make


for _name, _data in {"too few": b"a\n", "not utf-8": b"\xff\xfe\n" * 8, "empty": b"", "one long": b"a" * 10**6,
                     "many": b"a\n" * 10**5}.items():  # fmt: skip
    add(f"class names {_name}", names_file(_data))


# -- masks and annotations --------------------------------------------------------------------------------------------


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "0.png", "width": 64, "height": 64}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
        **changes,
    }


def shaped(**changes: Any) -> dict[str, Any]:
    return coco(annotations=[{"id": 1, "image_id": 1, "category_id": 1, **changes}])


def pictured(**changes: Any) -> dict[str, Any]:
    return coco(images=[{"id": 1, "file_name": "0.png", "width": 64, "height": 64, **changes}])


def listed(**changes: Any) -> list[Any]:
    return [
        {"file": "0.png", "size": [64, 64], "cls": "c", "objects": [{"bbox": [0, 0, 9, 9], "parts": {}}], **changes}
    ]


ANNOTATIONS: dict[str, Any] = {
    "empty text": "",
    "no json": "{",
    "deep": DEEP,
    "huge number": '{"images": [' + "9" * 5000 + "]}",
    "not utf-8": b"\xff\xfe\xff",
    "null": None,
    "number": 3,
    "empty list": [],
    "empty record": {},
    "no categories": {"images": [], "annotations": []},
    "images a record": coco(images={}),
    "image a number": coco(images=[3]),
    "image null": coco(images=[None]),
    "no file name": coco(images=[{"id": 1, "width": 9, "height": 9}]),
    "file name a list": pictured(file_name=["0.png"]),
    "file name outside": pictured(file_name="../../etc/passwd"),
    "file name absolute": pictured(file_name="/etc/passwd"),
    "file name backslashes": pictured(file_name="..\\..\\evil"),
    "width zero": pictured(width=0),
    "width negative": pictured(width=-64),
    "width huge": pictured(width=HUGE),
    "width a text": pictured(width="64"),
    "width nan": pictured(width=float("nan")),
    "width infinite": pictured(width=float("inf")),
    "width fraction": pictured(width=63.5),
    "width true size differs": pictured(width=99),
    "id a list": pictured(id=[1]),
    "category no name": coco(categories=[{"id": 1}]),
    "category name a number": coco(categories=[{"id": 1, "name": 7}]),
    "category id a list": coco(categories=[{"id": [], "name": "x"}]),
    "keypoints a number": coco(categories=[{"id": 1, "name": "x", "keypoints": 5}]),
    "no such category": shaped(category_id=99),
    "no such image": shaped(image_id=99),
    "box of three": shaped(bbox=[1, 2, 3]),
    "box of texts": shaped(bbox=["1", 2, 3, 4]),
    "box nan": shaped(bbox=[float("nan"), 0, 1, 1]),
    "box infinite": shaped(bbox=[0, 0, float("inf"), 1]),
    "box negative": shaped(bbox=[0, 0, -5, 5]),
    "box of huge integers": shaped(bbox=[0, 0, 10**400, 5]),
    "box null": shaped(bbox=None),
    "polygon odd": shaped(segmentation=[[1, 2, 3]]),
    "polygon texts": shaped(segmentation=[["a", "b"]]),
    "polygon numbers": shaped(segmentation=[1, 2, 3, 4]),
    "polygon nan": shaped(segmentation=[[0, 0, float("nan"), 1, 2, 2]]),
    "polygon huge": shaped(segmentation=[[0, 0, 1e308, -1e308, 2, 1e308]]),
    "keypoints two": shaped(keypoints=[1, 2]),
    "keypoints unnamed": shaped(keypoints=[1, 2, 2]),
    "list entry a number": [3],
    "list no objects": [{"file": "0.png", "size": [64, 64], "cls": "c"}],
    "list objects a number": listed(objects=3),
    "list file outside": listed(file="../x.png"),
    "list size of one": listed(size=[64]),
    "list class a list": listed(cls=["c"]),
    "list box backwards": listed(objects=[{"bbox": [9, 9, 0, 0]}]),
    "list parts a list": listed(objects=[{"bbox": [0, 0, 9, 9], "parts": [1]}]),
    "list part box text": listed(objects=[{"bbox": [0, 0, 9, 9], "parts": {"p": "x"}}]),
}


def annotations(content: Any) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        shutil.copytree(good / "run", folder / "run")
        (folder / "marks" / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "marks" / "images" / "0.png")
        data = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        (folder / "marks" / "annotations.json").write_bytes(data)
        return ["evaluate", "run", "--annotations", "marks"]

    return make


for _name, _content in ANNOTATIONS.items():
    add(f"annotations {_name}", annotations(_content))


def masks(data: bytes | None, classes: bytes | None, name: str = "0.png") -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        shutil.copytree(good / "run", folder / "run")
        for part in ("images", "masks"):
            (folder / "marks" / part).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "marks" / "images" / "0.png")
        if data is not None:
            (folder / "marks" / "masks" / name).write_bytes(data)
        if classes is not None:
            (folder / "marks" / "classes.json").write_bytes(classes)
        return ["evaluate", "run", "--annotations", "marks"]

    return make


def mask(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


FINE = mask(np.ones((64, 64), np.uint8))
for _name, _mask in {
    "none": None, "empty": b"", "text": b"x", "colour": encoded("PNG", (64, 64)), "jpeg": encoded("JPEG", (64, 64)),
    "values above 255": mask(np.full((64, 64), 300, np.uint16)), "bomb": IMAGES["bomb-wide.png"], "cut": FINE[:50],
    "another size": mask(np.ones((9, 9), np.uint8)),
}.items():  # fmt: skip
    add(f"mask {_name}", masks(_mask, b'{"1": "thing"}'))
for _name, _classes in {
    "no json": b"{", "deep": DEEP.encode(), "number": b"3", "text": b'"abc"', "keys words": b'{"one": "thing"}',
    "keys negative": b'{"-1": "thing"}', "keys huge": b'{"99999999999": "thing"}', "names numbers": b'{"1": 5}',
    "names lists": b'{"1": ["x"]}', "not utf-8": b'{"1": "\xff"}', "too many": json.dumps(["x"] * 300).encode(),
    "null": b"null",
}.items():  # fmt: skip
    add(f"mask classes {_name}", masks(FINE, _classes))
add("mask of another image", masks(FINE, b'{"1": "thing"}', "other.png"))
for _path in ("/dev/zero", "gone", "", "a\0b", "/etc/passwd", "critters:0", "critters:x", "x" * 5000):

    def _annotated(folder: Path, good: Path, path: str = _path) -> list[str]:
        shutil.copytree(good / "run", folder / "run")
        return ["evaluate", "run", "--annotations", path]

    add(f"annotations path {_path[:20]!r}", _annotated)


# -- stores -----------------------------------------------------------------------------------------------------------


def damage(change: Callable[[Path], object], *verb: str, parts: tuple[str, ...] = ("store", "run")) -> Make:
    """Copies the intact folders, changes them, and runs a command on them."""

    def make(folder: Path, good: Path) -> list[str]:
        for part in parts:
            shutil.copytree(good / part, folder / part)
        change(folder)
        return list(verb)

    return make


def edit(path: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Changes a JSON file: ``change`` alters the value in place, or returns another."""

    def apply(folder: Path) -> object:
        file = folder / path
        value = json.loads(file.read_text())
        told = change(value)
        return file.write_text(json.dumps(value if told is None else told))

    return apply


def put(name: str, value: Any) -> Callable[[Any], None]:
    """Sets a dotted entry of a JSON value."""

    def change(record: Any) -> None:
        *path, last = name.split(".")
        for key in path:
            record = record[int(key) if isinstance(record, list) else key]
        record[last] = value

    return change


def write(path: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(data)


def remove(path: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def link(path: str, target: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> object:
        remove(path)(folder)
        return (folder / path).symlink_to(target)

    return apply


FITTING = ("fit", "pca", "--store", "store", "--out", "out/run", "--num-concepts", "2", "--seeds", "1")
EVALUATING = ("evaluate", "run", "--untrained-images", "0")
ARRAY, ROOT = "store/activations/block5/zarr.json", "store/zarr.json"
STORE: dict[str, Callable[[Path], object]] = {
    "gone": remove("store"),
    "a file": lambda f: (remove("store")(f), (f / "store").write_bytes(b"x")),
    "empty": lambda f: (remove("store")(f), (f / "store").mkdir()),
    "a pickle": lambda f: (remove("store")(f), (f / "store").write_bytes(pickle.dumps(Runs(f / "ran")))),
    "linked to a device": link("store", "/dev/zero"),
    "linked to itself": link("store", "store"),
    "root gone": remove(ROOT),
    "root empty": write(ROOT, b""),
    "root no json": write(ROOT, b"{"),
    "root deep": write(ROOT, DEEP.encode()),
    "root a list": write(ROOT, b"[]"),
    "root not utf-8": write(ROOT, b"\xff\xff"),
    "root a fifo": lambda f: (remove(ROOT)(f), os.mkfifo(f / ROOT)),
    "format 99": edit(ROOT, put("attributes.netgloss_store", 99)),
    "format a text": edit(ROOT, put("attributes.netgloss_store", "1")),
    "zarr 99": edit(ROOT, put("zarr_format", 99)),
    "node an array": edit(ROOT, put("node_type", "array")),
    "no attributes": edit(ROOT, put("attributes", {})),
    "key gone": edit(ROOT, lambda r: r["attributes"].pop("key") and None),
    "key a list": edit(ROOT, put("attributes.key", [])),
    "key unknown field": edit(ROOT, put("attributes.key.evil", 1)),
    "layers a text": edit(ROOT, put("attributes.key.layers", "block5")),
    "layers empty": edit(ROOT, put("attributes.key.layers", [])),
    "layer outside": edit(ROOT, put("attributes.key.layers", ["../../../etc"])),
    "dtype code": edit(ROOT, put("attributes.key.dtype", "__import__('os')")),
    "positions negative": edit(ROOT, put("attributes.key.positions", -5)),
    "positions a text": edit(ROOT, put("attributes.key.positions", "5")),
    "info a list": edit(ROOT, put("attributes.info", [])),
    "info unknown field": edit(ROOT, put("attributes.info.evil", 1)),
    "images a list": edit(ROOT, put("attributes.info.images", [1])),
    "fit images a text": edit(ROOT, put("attributes.info.images.num_fit", "x")),
    "fit images huge": edit(ROOT, put("attributes.info.images.num_fit", -HUGE)),
    "shapes a list": edit(ROOT, put("attributes.shapes", [])),
    "shapes empty": edit(ROOT, put("attributes.shapes", {})),
    "shape huge": edit(ROOT, put("attributes.shapes.block5", [2**40, 2**40, 2**40])),
    "shape negative": edit(ROOT, put("attributes.shapes.block5", [-112, 8, 8])),
    "shape zero": edit(ROOT, put("attributes.shapes.block5", [0, 8, 8])),
    "shape other": edit(ROOT, put("attributes.shapes.block5", [56, 8, 16])),
    "shape a text": edit(ROOT, put("attributes.shapes.block5", "big")),
    "shape nan": edit(ROOT, put("attributes.shapes.block5", [float("nan")])),
    "shape of five": edit(ROOT, put("attributes.shapes.block5", [112, 8, 8, 1, 1])),
    "chunk images zero": edit(ROOT, put("attributes.chunk_images", 0)),
    "chunk images negative": edit(ROOT, put("attributes.chunk_images", -8)),
    "chunk images a text": edit(ROOT, put("attributes.chunk_images", "x")),
    "chunk images infinite": edit(ROOT, put("attributes.chunk_images", float("inf"))),
    "array gone": remove("store/activations"),
    "array no json": write(ARRAY, b"{"),
    "array shape huge": edit(ARRAY, put("shape", [40, 2**30, 2**30, 2**30])),
    "array shape negative": edit(ARRAY, put("shape", [-1, 112, 8, 8])),
    "array fewer images": edit(ARRAY, put("shape", [4, 112, 8, 8])),
    "array other features": edit(ARRAY, put("shape", [40, 99, 8, 8])),
    "array dtype": edit(ARRAY, put("data_type", "object")),
    "array dtype int": edit(ARRAY, put("data_type", "int8")),
    "array chunk zero": edit(ARRAY, put("chunk_grid.configuration.chunk_shape", [0, 0, 0, 0])),
    "array chunk huge": edit(ARRAY, put("chunk_grid.configuration.chunk_shape", [2**40, 112, 8, 8])),
    "array codec unknown": edit(ARRAY, put("codecs", [{"name": "evil"}])),
    "array codec pickle": edit(ARRAY, put("codecs", [{"name": "numcodecs.pickle"}])),
    "array codecs none": edit(ARRAY, put("codecs", [])),
    "array fill huge": edit(ARRAY, put("fill_value", "x" * 100)),
    "chunk gone": remove("store/activations/block5/c"),
    "chunk empty": write("store/activations/block5/c/0/0/0/0", b""),
    "chunk noise": write("store/activations/block5/c/0/0/0/0", np.random.default_rng(0).bytes(999)),
    "chunk bomb": write("store/activations/block5/c/0/0/0/0", BOMB),
    "chunk device": link("store/activations/block5/c/0/0/0/0", "/dev/full"),
    "ids gone": remove("store/ids"),
    "ids chunk noise": write("store/ids/c/0", b"noise"),
    "ids fewer": edit("store/ids/zarr.json", put("shape", [3])),
    "targets fewer": edit("store/targets/zarr.json", put("shape", [3])),
    "targets chunk noise": write("store/targets/c/0", b"noise"),
    "targets are texts": edit("store/targets/zarr.json", put("data_type", "string")),
    "complete gone": remove("store/complete"),
    "complete missing chunks": remove("store/complete/c"),
    "complete fewer": edit("store/complete/zarr.json", put("shape", [0])),
    "minimum gone": remove("store/minimum"),
    "problems noise": lambda f: (
        (f / "store/problems/c").mkdir(exist_ok=True),
        (f / "store/problems/c/0").write_bytes(b"noise"),
    ),
}
for _name, _change in STORE.items():
    add(f"store {_name}", damage(_change, *FITTING))
for _layer in ODD_NAMES:
    add(f"store layer {_layer[:20]!r}", damage(lambda f: None, *FITTING, "--layer", _layer))
for _name in ("logits gone", "other weights"):
    _change = (
        remove("store/logits") if _name == "logits gone" else edit(ROOT, put("attributes.key.weights_hash", "0" * 64))
    )
    add(f"store at evaluation {_name}", damage(_change, *EVALUATING))
for _file in ("letter.txt", "zarr.json"):

    def _occupied(folder: Path, good: Path, file: str = _file) -> list[str]:
        (folder / "mine").mkdir()
        (folder / "mine" / file).write_text("dear")
        return capturing("critters:8", out="mine")

    add(f"store over {_file}", _occupied)
for _out in ("/dev/null", "/proc/x/store", "/dev/null/store", "a\0b", "x" * 5000, "/sys/kernel/store"):
    add(f"store out {_out[:20]!r}", lambda folder, good, out=_out: capturing("critters:8", out=out))


# -- run folders ------------------------------------------------------------------------------------------------------


def explainer_header(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    """Changes the metadata of explainer.safetensors."""

    def apply(folder: Path) -> object:
        from safetensors import safe_open

        path = folder / "run" / "explainer.safetensors"
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        change(metadata)
        return save_file(state, path, metadata=metadata)

    return apply


def entry(field: str, name: str, value: Any) -> Callable[[dict[str, str]], object]:
    def change(metadata: dict[str, str]) -> object:
        record = json.loads(metadata[field])
        record[name] = value
        return metadata.update({field: json.dumps(record)})

    return change


def planted(folder: Path) -> str:
    """A Python file that leaves a mark when it is run."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return f"{folder / 'evil.py'}:f"


RUN_JSON = "run/run.json"
FOLDER: dict[str, Callable[[Path], object]] = {
    "gone": remove("run"),
    "a file": lambda f: (remove("run")(f), (f / "run").write_bytes(b"x")),
    "linked to a device": link("run", "/dev/zero"),
    "run.json gone": remove(RUN_JSON),
    "run.json empty": write(RUN_JSON, b""),
    "run.json no json": write(RUN_JSON, b"{"),
    "run.json deep": write(RUN_JSON, DEEP.encode()),
    "run.json deep record": write(RUN_JSON, b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "run.json not utf-8": write(RUN_JSON, b"\xff"),
    "run.json a list": write(RUN_JSON, b"[]"),
    "run.json null": write(RUN_JSON, b"null"),
    "run.json a folder": lambda f: (remove(RUN_JSON)(f), (f / RUN_JSON).mkdir()),
    "run.json a device": link(RUN_JSON, "/dev/full"),
    "run.json only a format": write(RUN_JSON, b'{"format_version": 1}'),
    "run.json huge integer": write(RUN_JSON, b'{"format_version": ' + b"9" * 5000 + b"}"),
    "format 99": edit(RUN_JSON, put("format_version", 99)),
    "format a text": edit(RUN_JSON, put("format_version", "1")),
    "layer a list": edit(RUN_JSON, put("layer", ["x"])),
    "layer_spec a text": edit(RUN_JSON, put("layer_spec", "x")),
    "data a list": edit(RUN_JSON, put("data", [])),
    "seeds a text": edit(RUN_JSON, put("seeds", "012")),
    "warnings a text": edit(RUN_JSON, put("warnings", "x")),
    "warnings numbers": edit(RUN_JSON, put("warnings", [1, 2])),
    "times texts": edit(RUN_JSON, put("times", {"a": "long"})),
    "config a list": edit(RUN_JSON, put("config", [1])),
    "model a text": edit(RUN_JSON, put("model", "critters")),
}
REPORTED: dict[str, Callable[[Path], object]] = {
    "concepts gone": remove("run/concepts.json"),
    "concepts no json": write("run/concepts.json", b"{"),
    "concepts deep": write("run/concepts.json", DEEP.encode()),
    "concepts a list": write("run/concepts.json", b"[]"),
    "concept ids": edit("run/concepts.json", put("concepts.0.id", 7)),
    "concept id huge": edit("run/concepts.json", put("concepts.0.id", HUGE)),
    "concept id nan": edit("run/concepts.json", put("concepts.0.id", float("nan"))),
    "gallery beyond": edit("run/concepts.json", put("concepts.0.gallery", [{"image": 9999, "value": 1, "map": None}])),
    "gallery a text": edit("run/concepts.json", put("concepts.0.gallery", "x")),
    "map not base64": edit("run/concepts.json", put("concepts.0.gallery", [
        {"image": 0, "value": 1, "map": {"grid": [8, 8], "data": "!!", "low": 0, "high": 1, "threshold": 1}}])),
    "map of another size": edit("run/concepts.json", put("concepts.0.gallery", [
        {"image": 0, "value": 1, "map": {"grid": [9**9, 9**9], "data": "AAAA", "low": 0, "high": 1}}])),
    "map of no size": edit("run/concepts.json", put("concepts.0.gallery", [
        {"image": 0, "value": 1, "map": {"grid": [], "data": "", "low": 0, "high": 1}}])),
    "grid texts": edit("run/concepts.json", put("grid", ["8", "8"])),
    "images a record": edit("run/concepts.json", put("images", {})),
    "classes numbers": edit("run/concepts.json", put("classes", [1])),
    "histogram texts": edit("run/concepts.json", put("concepts.0.histogram", {"edges": ["a"], "counts": [1]})),
    "scores no json": write("run/scores.json", b"["),
    "scores a record": write("run/scores.json", b"{}"),
    "score a number": write("run/scores.json", b"[1]"),
    "score value a text": edit("run/scores.json", put("0.value", "high")),
    "score baselines a list": edit("run/scores.json", put("0.baselines", [1])),
    "history no json inside": write("run/history.jsonl", b'{"seed": 0, "step": 1}\nnoise\n{"seed": 0, "step": 2}\n'),
    "history without steps": write("run/history.jsonl", b'{"seed": 0}\n'),
    "history texts": write("run/history.jsonl", b'{"seed": 0, "step": "x"}\n'),
}  # fmt: skip
LOADED: dict[str, Callable[[Path], object]] = {
    "explainer gone": remove("run/explainer.safetensors"),
    "explainer empty": write("run/explainer.safetensors", b""),
    "explainer pickle": lambda f: write("run/explainer.safetensors", pickle.dumps(Runs(f / "ran")))(f),
    "explainer a folder": lambda f: (remove("run/explainer.safetensors")(f), (f / "run/explainer.safetensors").mkdir()),
    "explainer a device": link("run/explainer.safetensors", "/dev/zero"),
    "explainer long": write("run/explainer.safetensors", struct.pack("<Q", 2**60)),
    "explainer no metadata": write("run/explainer.safetensors", header(tensor(), bytes(8))),
    "explainer no method": explainer_header(lambda m: m.pop("method")),
    "explainer method unknown": explainer_header(lambda m: m.update(method="evil")),
    "explainer method dunder": explainer_header(lambda m: m.update(method="__init__")),
    "explainer method base": explainer_header(lambda m: m.update(method="base")),
    "explainer method path": explainer_header(lambda m: m.update(method="../../os")),
    "explainer method code": lambda f: explainer_header(lambda m: m.update(method=planted(f)))(f),
    "explainer method stdlib": explainer_header(lambda m: m.update(method=os.__file__)),
    "explainer config deep": explainer_header(lambda m: m.update(config=DEEP)),
    "explainer config a list": explainer_header(lambda m: m.update(config="[1]")),
    "explainer config unknown": explainer_header(entry("config", "evil", 1)),
    "explainer concepts huge": explainer_header(entry("config", "num_concepts", 10**12)),
    "explainer concepts negative": explainer_header(entry("config", "num_concepts", -1)),
    "explainer concepts text": explainer_header(entry("config", "num_concepts", "6")),
    "explainer concepts infinite": explainer_header(entry("config", "num_concepts", float("inf"))),
    "explainer concepts null": explainer_header(entry("config", "num_concepts", None)),
    "explainer shape huge": explainer_header(entry("spec", "shape", [10**12, 8, 8])),
    "explainer shape text": explainer_header(entry("spec", "shape", "abc")),
    "explainer shape null": explainer_header(entry("spec", "shape", None)),
    "explainer upper a list": explainer_header(entry("spec", "upper", [1])),
    "explainer spec unknown": explainer_header(entry("spec", "evil", 1)),
    "explainer notes deep": explainer_header(lambda m: m.update(notes=DEEP)),
    "explainer notes number": explainer_header(lambda m: m.update(notes="3")),
    "explainer tensor gone": lambda f: save_file({"a": torch.zeros(1)}, f / "run/explainer.safetensors", metadata=_metadata(f)),
    "model gone": edit(RUN_JSON, lambda r: r.pop("model") and None),
    "model a number": edit(RUN_JSON, put("model", 3)),
    "model empty": edit(RUN_JSON, put("model", {})),
    "model name a list": edit(RUN_JSON, put("model.name", ["critters"])),
    "model name unknown": edit(RUN_JSON, put("model.name", "evil")),
    "model name code": lambda f: edit(RUN_JSON, put("model.name", planted(f)))(f),
    "model checkpoint gone": edit(RUN_JSON, put("model.checkpoint", "/nowhere.pth")),
    "model checkpoint device": edit(RUN_JSON, put("model.checkpoint", "/dev/zero")),
    "model checkpoint a list": edit(RUN_JSON, put("model.checkpoint", [1])),
    "model classes a number": edit(RUN_JSON, put("model.class_names", 5)),
    "model classes few": edit(RUN_JSON, put("model.class_names", ["a"])),
    "model hash": edit(RUN_JSON, put("model.weights_hash", "0" * 64)),
    "model hash a number": edit(RUN_JSON, put("model.weights_hash", 5)),
    "model imagenet a number": edit(RUN_JSON, put("model.imagenet", 5)),
    "model seed huge": edit(RUN_JSON, put("model.seed", HUGE)),
    "model seed a text": edit(RUN_JSON, put("model.seed", "x")),
    "model number of classes": edit(RUN_JSON, put("model.num_classes", "x")),
    "model preprocessing a text": edit(RUN_JSON, put("model.preprocessing", "x")),
    "model size huge": edit(RUN_JSON, put("model.preprocessing.size", [10**9, 10**9])),
    "model size text": edit(RUN_JSON, put("model.preprocessing.size", "ab")),
    "model size infinite": edit(RUN_JSON, put("model.preprocessing.size", [float("inf")] * 2)),
    "model resize null list": edit(RUN_JSON, put("model.preprocessing.resize", [None, None])),
    "model mean texts": edit(RUN_JSON, put("model.preprocessing.mean", ["a", "b", "c"])),
    "model std zero": edit(RUN_JSON, put("model.preprocessing.std", [0, 0, 0])),
    "model channels": edit(RUN_JSON, put("model.preprocessing.channels", 10**9)),
    "model preprocessing unknown": edit(RUN_JSON, put("model.preprocessing.evil", 1)),
    "layer unknown": edit(RUN_JSON, put("layer", "<script>")),
    "seeds empty": edit(RUN_JSON, put("seeds", [])),
    "seeds outside": edit(RUN_JSON, put("seeds", ["0/../../../x", "1"])),
    "seeds a number": edit(RUN_JSON, put("seeds", 5)),
    "seeds gone": edit(RUN_JSON, lambda r: r.pop("seeds") and None),
}  # fmt: skip
JUDGED: dict[str, Callable[[Path], object]] = {
    "store gone": edit(RUN_JSON, put("store", "/nowhere")),
    "store a number": edit(RUN_JSON, put("store", 5)),
    "store a device": edit(RUN_JSON, put("store", "/dev/zero")),
    "store null byte": edit(RUN_JSON, put("store", "a\0b")),
    "store missing": edit(RUN_JSON, lambda r: r.pop("store") and None),
    "store address": edit(RUN_JSON, put("store_address", "0" * 64)),
}


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "run" / "explainer.safetensors", framework="pt") as file:
        return dict(file.metadata())


def showing(change: Callable[[Path], object]) -> Make:
    def make(folder: Path, good: Path) -> list[str]:
        shutil.copytree(good / "run", folder / "run")
        change(folder)
        return ["show", "run", str(good / "images" / "0.png"), "--out", "out"]

    return make


for _name, _change in {**FOLDER, **REPORTED}.items():
    if _name not in ("seeds a text", "model a text"):
        add(f"report {_name}", damage(_change, "report", "run", parts=("run",)))
for _name, _change in {**LOADED, **{n: FOLDER[n] for n in ("run.json deep", "model a text", "layer a list")}}.items():
    add(f"show {_name}", showing(_change))
for _name, _change in JUDGED.items():
    add(f"evaluate {_name}", damage(_change, *EVALUATING))
for _name in ("explainer method code", "model name code", "explainer concepts huge", "seeds empty"):
    add(f"evaluate {_name}", damage(LOADED[_name], *EVALUATING))
add("fit model imagenet", damage(edit(ROOT, put("attributes.info.model.imagenet", "../../evil")), "fit", "srae",
    "--store", "store", "--out", "out/run", "--layer", "block5", "--seeds", "1"))  # fmt: skip
for _image in ("gone.png", "/dev/zero", "", "a\0b", "critters:0", "\x1b[31m", "../../x"):

    def _show(folder: Path, good: Path, image: str = _image) -> list[str]:
        shutil.copytree(good / "run", folder / "run")
        return ["show", "run", image, "--out", "out"]

    add(f"show image {_image!r}", _show)


# -- configs, names and outputs ---------------------------------------------------------------------------------------

CONFIGS: dict[str, list[str]] = {
    "concepts zero": ["nmf", "--num-concepts", "0"],
    "concepts negative": ["pca", "--num-concepts", "-4"],
    "concepts too many": ["pca", "--num-concepts", "999999"],
    "concepts huge": ["nmf", "--num-concepts", "9" * 12],
    "concepts beyond integers": ["kmeans", "--num-concepts", "9" * 40],
    "concepts huge for atoms": ["random-directions", "--num-concepts", "9" * 13],
    "concepts huge for a code": ["topk-sae", "--num-concepts", "9" * 13],
    "concepts nan": ["nmf", "--num-concepts", "nan"],
    "concepts fraction": ["nmf", "--num-concepts", "2.5"],
    "concepts text": ["nmf", "--num-concepts", "$(touch ran)"],
    "steps zero": ["topk-sae", "--steps", "0"],
    "batch zero": ["topk-sae", "--batch-size", "0"],
    "rate nan": ["topk-sae", "--lr", "nan"],
    "rate negative": ["topk-sae", "--lr", "-1"],
    "rate infinite": ["topk-sae", "--lr", "inf", "--steps", "3"],
    "top-k too many": ["topk-sae", "--num-concepts", "4", "--top-k", "9"],
    "top-k zero": ["topk-sae", "--top-k", "0"],
    "seeds zero": ["pca", "--seeds", "0"],
    "seeds negative": ["pca", "--seeds", "-2"],
    "precision": ["topk-sae", "--precision", "evil"],
    "device": ["pca", "--device", "evil"],
    "method file gone": ["gone.py:F"],
    "method path": ["../../os"],
    "method dunder": ["__init__"],
    "method private": ["_rows"],
    "method base": ["base"],
    "method html": ["<script>"],
    "method escape": ["\x1b[31m"],
    "method null": ["a\0b.py:F"],
}  # fmt: skip
for _name, _arguments in CONFIGS.items():

    def _config(folder: Path, good: Path, arguments: list[str] = _arguments) -> list[str]:
        given = [] if "--num-concepts" in arguments else ["--num-concepts", "4"]
        seeds = [] if "--seeds" in arguments else ["--seeds", "1"]
        return ["fit", *arguments, *given, *seeds, "--store", str(good / "store"), "--out", "out/run"]

    add(f"config {_name}", _config)
for _name, _more in {
    "batch zero": ["--batch-size", "0"], "positions negative": ["--positions", "-1"], "dtype": ["--dtype", "object"],
    "workers": ["--workers", "-3"], "layer twice odd": ["--layer", "block5", "../x"],
    "workers a word": ["--workers", "all"], "seed a word": ["--seed", "x"], "eval images": ["--eval-images", "gone"],
}.items():  # fmt: skip
    add(f"capture {_name}", lambda folder, good, more=_more: capturing("critters:8", *more))
for _layer in ODD_NAMES:
    add(f"layer {_layer[:20]!r}",
        lambda folder, good, layer=_layer: ["capture", "--model", "critters", "--layer", layer, "--images", "critters:8",
                                            "--out", "out/store"])  # fmt: skip
for _verb in ("", "-", "--", "__init__", "../x", "<b>", "\x1b[31mexplain", "explain\0", "x" * 5000):
    add(f"command {_verb[:20]!r}", lambda folder, good, verb=_verb: [verb])


def occupied(folder: Path, good: Path) -> list[str]:
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("dear")
    return ["fit", "pca", "--store", str(good / "store"), "--out", "mine", "--num-concepts", "2", "--seeds", "1"]


add("run over a letter", occupied)
for _out in ("/dev/null", "/proc/x/run", "/dev/null/run", "a\0b", "x" * 5000):
    add(f"run out {_out[:20]!r}",
        lambda folder, good, out=_out: ["fit", "pca", "--store", str(good / "store"), "--out", out, "--num-concepts",
                                        "2", "--seeds", "1"])  # fmt: skip
