"""The activation store: content address, chunks, damage, resume, targets that cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from netgloss.activations.key import StoreInfo, StoreKey, estimate_bytes, stored_shape
from netgloss.activations.store import Store
from netgloss.errors import UserError
from netgloss.runs.run import write_atomically

KEY = StoreKey(weights_hash="w" * 64, preprocessing={"size": [8, 8]}, layers=("a", "b.c"), data_fingerprint="d" * 64)
SHAPES = {"a": (3, 2, 2), "b.c": (5,)}
NUM = 600


def make_store(path: Path, key: StoreKey = KEY, num: int = NUM) -> Store:
    return Store.create(
        path,
        key=key,
        info=StoreInfo(model={"name": "m"}, class_names=("x", "ü")),
        shapes={name: SHAPES[name] for name in key.layers},
        ids=[f"dir/ï{i}.png" for i in range(num)],
        targets=np.arange(num) % 3 - 1,
        num_classes=4,
    )


def values(chunk_slice: slice, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    rows = np.arange(chunk_slice.start, chunk_slice.stop)[:, None] * size + np.arange(size)
    return rows.reshape(-1, *shape).astype(np.float32) / 7 - 1


def fill(store: Store, chunks: list[int] | None = None) -> None:
    for chunk in store.pending if chunks is None else chunks:
        where = store.chunk_slice(chunk)
        problems = ["broken" if i == 3 else "" for i in range(where.start, where.stop)]
        store.write_chunk(
            chunk,
            activations={name: values(where, SHAPES[name]).astype(store.key.dtype) for name in store.layers},
            positions={},
            logits=np.full((where.stop - where.start, 4), chunk, np.float32) if store.key.logits else None,
            problems=problems,
        )


def test_what_was_written_is_read_after_opening_again(tmp_path: Path) -> None:
    fill(make_store(tmp_path / "s"))
    store = Store.open(tmp_path / "s", expect=KEY)
    store.require_complete()
    assert len(store) == NUM
    assert store.ids[4] == "dir/ï4.png"
    assert store.info.class_names == ("x", "ü") or list(store.info.class_names) == ["x", "ü"]
    np.testing.assert_array_equal(
        store.read("b.c", np.array([599, 0])), values(slice(0, NUM), (5,)).astype("float16")[[599, 0]]
    )
    np.testing.assert_array_equal(store.read("a", slice(2, 9)), values(slice(2, 9), (3, 2, 2)).astype("float16"))
    assert store.problems == {"dir/ï3.png": "broken"}
    assert 3 not in store.valid
    assert len(store.valid) == NUM - 1
    assert not store.is_nonnegative("a")
    logits = store.read_logits(np.array([0, NUM - 1]))
    assert logits is not None
    assert logits[1, 0] == store.num_chunks - 1


def test_a_plain_zarr_reader_needs_nothing_of_netgloss(tmp_path: Path) -> None:
    import zarr

    fill(make_store(tmp_path / "s"))
    group = zarr.open_group(str(tmp_path / "s"), mode="r")
    np.testing.assert_array_equal(group["activations/b.c"][5], values(slice(5, 6), (5,)).astype("float16")[0])
    assert group.attrs["address"] == KEY.address


def test_the_address_changes_with_every_field() -> None:
    changed = {
        "weights_hash": "v",
        "preprocessing": {"size": [9, 8]},
        "layers": ("a",),
        "data_fingerprint": "e",
        "dtype": "float32",
        "logits": False,
        "positions": 4,
        "seed": 1,
        "precision": "bfloat16",
        "pool": "cls",
    }
    assert set(changed) == {f.name for f in dataclasses.fields(StoreKey)}
    addresses = {dataclasses.replace(KEY, **{name: value}).address for name, value in changed.items()}
    assert len(addresses | {KEY.address}) == len(changed) + 1


def test_a_store_of_another_network_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    other = dataclasses.replace(KEY, weights_hash="v" * 64)
    with pytest.raises(UserError, match="network's weights: wwwwwwwwwwww in the store, vvvvvvvvvvvv asked for"):
        Store.open(tmp_path / "s", expect=other)


def test_an_interrupted_store_says_so_and_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    fill(store, [1])
    again = Store.open(tmp_path / "s")
    assert again.pending == [c for c in range(again.num_chunks) if c != 1]
    with pytest.raises(UserError, match=r"incomplete .* run the capture command again"):
        again.require_complete()
    fill(again)
    again.require_complete()


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate"])
def test_damage_is_found_and_never_read_as_data(tmp_path: Path, damage: str) -> None:
    fill(make_store(tmp_path / "s"))
    chunk = next(p for p in sorted((tmp_path / "s" / "activations" / "a" / "c").rglob("*")) if p.is_file())
    data = bytearray(chunk.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    elif damage == "truncate":
        chunk.write_bytes(data[: len(data) // 2])
    else:
        chunk.unlink()
    with pytest.raises(UserError, match="damaged in activations/a"):
        Store.open(tmp_path / "s").read("a", slice(0, NUM))


def test_a_wrong_layer_is_answered_with_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no layer 'b'; it has b\.c"):
        make_store(tmp_path / "s").read("b", slice(0, 1))


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not an activation store"):
        make_store(tmp_path / "s")
    with pytest.raises(UserError, match="is not an activation store"):
        Store.open(tmp_path / "s")
    assert (tmp_path / "s" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    "junk", ['{"node_type": "group"', '{"zarr_format": 3, "node_type": "group", "attributes": {}}']
)
def test_malformed_metadata_is_one_line(tmp_path: Path, junk: str) -> None:
    make_store(tmp_path / "s")
    (tmp_path / "s" / "zarr.json").write_text(junk)
    with pytest.raises(UserError, match="is not an activation store"):
        Store.open(tmp_path / "s")


def test_a_missing_array_is_one_line(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "ids")
    with pytest.raises(UserError, match="is damaged"):
        Store.open(tmp_path / "s")


def test_too_small_a_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"need up to .* GB free; sub-sample"):
        make_store(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_way_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_array", lambda _name: type("Full", (), {"__setitem__": full})())
    with pytest.raises(UserError, match="the disk is full"):
        fill(store, [0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_target_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        make_store(tmp_path / "s")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path: Path, number: int, reason: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=f"cannot write to .*: {reason}"):
            make_store(tmp_path / "deep" / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(UserError, match=reason):
            write_atomically(tmp_path / "run.json", "{}")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .* in the way"):
        make_store(tmp_path / "file" / "s")


def test_sizes_are_known_beforehand() -> None:
    assert stored_shape((8, 4, 4), None) == (8, 4, 4)
    assert stored_shape((8, 4, 4), 5) == (5, 8)
    assert stored_shape((8, 4, 4), 16) == (8, 4, 4)
    assert stored_shape((8,), 5) == (8,)
    assert estimate_bytes({"m": (8, 4, 4), "v": (10,)}, 100, dtype="float16", positions=5) == (40 + 10) * 100 * 2
