"""Dictionaries made elsewhere: the same numbers as netgloss's own, and one line for each malformed file."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import netgloss
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.foreign import ForeignCodes, load_dictionary
from netgloss.evaluation.foreign_files import Arrays
from netgloss.explainers.base import Explainer, LayerSpec
from netgloss.workflows.capture import store_info
from netgloss.workflows.compare import compare
from netgloss.workflows.fit import fit

C, K = 6, 4


class FakeStore:
    """What the loader asks of a store: three images of a layer with a 2 x 3 grid."""

    ids = ["a.png", "b.png", "c.png"]
    shapes = {"layer": (C, 2, 3)}
    valid = np.arange(3)

    def __len__(self) -> int:
        return 3


SPEC = LayerSpec("layer", (C, 2, 3))


def arrays(**more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"dictionary": torch.randn(K, C, generator=g).numpy(), "bias": torch.randn(C, generator=g).numpy(), **more}


def encoder() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {"W_enc": torch.randn(C, K, generator=g).numpy(), "b_enc": torch.randn(K, generator=g).numpy()}


def load(given: Any) -> Any:
    return load_dictionary(given, FakeStore(), SPEC)  # type: ignore[arg-type]


ROWS = torch.randn(20, C, generator=torch.Generator().manual_seed(2))


def pre(given: dict[str, Any]) -> Tensor:
    return ROWS @ torch.as_tensor(given["W_enc"]) + torch.as_tensor(given["b_enc"])


# -- what is read -----------------------------------------------------------------------------------------------------


def test_decoder_and_activations() -> None:
    given = arrays(**encoder())
    before = pre(given)
    top = before.relu()
    top = torch.where(top >= top.topk(2, dim=1).values[:, 1:], top, 0)
    expected = {
        "none": before,
        "relu": before.relu(),
        "topk": top,
        "jumprelu": torch.where(before > 0.5, before, 0),
    }
    for kind, codes in expected.items():
        found = load({**given, "activation": kind, "k": np.array(2), "threshold": np.array(0.5)})
        torch.testing.assert_close(found.encode(ROWS), codes)
        decoded = codes @ torch.as_tensor(given["dictionary"]) + torch.as_tensor(given["bias"])
        torch.testing.assert_close(found.decode(codes), decoded)


def test_codes_without_an_encoder() -> None:
    found = load({**arrays(), "activation": "lstsq"})
    inside = torch.randn(5, K) @ found.dictionary + found.offset
    torch.testing.assert_close(found(inside), inside, atol=1e-4, rtol=1e-4)
    found = load({**arrays(), "activation": "nnls"})
    inside = torch.rand(5, K) @ found.dictionary + found.offset
    torch.testing.assert_close(found(inside), inside, atol=1e-3, rtol=1e-3)
    assert (found.encode(ROWS) >= 0).all()


def test_files_hold_the_same(tmp_path: Path) -> None:
    given = arrays(**encoder())
    np.savez(tmp_path / "a.npz", **given, activation="topk", k=2)
    save_file(
        {n: torch.as_tensor(v) for n, v in given.items()}, tmp_path / "b.safetensors", {"activation": "topk", "k": "2"}
    )
    save_file({n: torch.as_tensor(v) for n, v in given.items()}, tmp_path / "c.safetensors")
    codes = load({**given, "activation": "topk", "k": np.array(2)}).encode(ROWS)
    for name in ("a.npz", "b.safetensors", "c.safetensors,activation=topk,k=2"):
        torch.testing.assert_close(load(str(tmp_path / name)).encode(ROWS), codes)


def saelens(folder: Path, weights: dict[str, Tensor], **cfg: Any) -> Path:
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": C, "d_sae": K, **cfg}))
    return folder


def sae_weights() -> dict[str, Tensor]:
    given = {n: torch.as_tensor(v) for n, v in arrays(**encoder()).items()}
    return {"W_dec": given["dictionary"], "b_dec": given["bias"], "W_enc": given["W_enc"], "b_enc": given["b_enc"]}


def test_saelens_folders(tmp_path: Path) -> None:
    w = sae_weights()
    before = (ROWS - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    found = load(saelens(tmp_path / "standard", w, architecture="standard", apply_b_dec_to_input=True))
    torch.testing.assert_close(found.encode(ROWS), before.relu())
    torch.testing.assert_close(found(ROWS), before.relu() @ w["W_dec"] + w["b_dec"])
    plain = ROWS @ w["W_enc"] + w["b_enc"]
    found = load(saelens(tmp_path / "topk", w, architecture="topk", k=1, apply_b_dec_to_input=False))
    assert ((found.encode(ROWS) > 0).sum(1) <= 1).all()
    torch.testing.assert_close(found.encode(ROWS).amax(1), plain.amax(1).relu())
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}, "apply_b_dec_to_input": False}
    torch.testing.assert_close(load(saelens(tmp_path / "old", w, **old)).encode(ROWS), found.encode(ROWS))
    jump = {**w, "threshold": torch.full((K,), 0.3)}
    found = load(saelens(tmp_path / "jump", jump, architecture="jumprelu", apply_b_dec_to_input=False))
    torch.testing.assert_close(found.encode(ROWS), torch.where(plain > 0.3, plain, 0))


class LikeOvercomplete(nn.Module):
    """The layout of overcomplete 0.3's SAE: linear encoder with batch norm, ReLU, a dictionary with a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.final_block = nn.Sequential(nn.Linear(C, K), nn.BatchNorm1d(K))
        self.dictionary = nn.Module()
        self.dictionary._weights = nn.Parameter(torch.randn(K, C))
        self.dictionary.register_buffer("multiplier", torch.tensor(0.3))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.encoder.final_block(x)
        return before, before.relu()

    def get_dictionary(self) -> Tensor:
        return self.dictionary._weights * self.dictionary.multiplier.exp()


def test_an_overcomplete_model_as_a_module_and_as_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LikeOvercomplete()
    model.encoder.final_block(torch.randn(100, C) * 3 + 1)  # running statistics
    model.eval()
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, tmp_path / "sae.safetensors")
    in_python, from_file = load(model), load(f"{tmp_path / 'sae.safetensors'},activation=relu")
    torch.testing.assert_close(in_python.encode(ROWS), model.encode(ROWS)[1])
    torch.testing.assert_close(from_file.encode(ROWS), model.encode(ROWS)[1])
    torch.testing.assert_close(from_file.dictionary, model.get_dictionary().detach())
    torch.testing.assert_close(in_python(ROWS), from_file(ROWS))


def test_codes_follow_the_ids() -> None:
    maps = np.random.default_rng(0).random((3, K, 2, 3)).astype(np.float32)
    found = load(arrays(codes=maps))
    assert isinstance(found, ForeignCodes)
    assert found.reads == "rows"
    torch.testing.assert_close(found.concepts_of_images(torch.tensor([2, 0])), torch.from_numpy(maps[[2, 0]]))
    turned = load(arrays(codes=maps[::-1].copy(), ids=np.array(["c.png", "b.png", "a.png"])))
    torch.testing.assert_close(turned.table, found.table)
    assert load(arrays(codes=maps[..., 0, 0].copy())).reads == "pooled"
    with pytest.raises(UserError, match="cannot encode anything else"):
        found.encode(ROWS)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "has no array 'dictionary'"),
        (arrays(), "neither codes nor an encoder"),
        (arrays(activation="tanh"), "neither codes nor an encoder"),
        (arrays(**encoder()), "say its activation"),
        (arrays(**encoder(), activation="topk"), "topk needs k in 1 .. 4, got none"),
        (arrays(**encoder(), activation="topk", k=np.array(9)), "topk needs k in 1 .. 4, got 9"),
        (arrays(**encoder(), activation="topk", k=np.array(1.5)), "one whole number"),
        (arrays(**encoder(), activation="jumprelu"), "needs a threshold"),
        ({"dictionary": np.zeros((K, C + 1))}, "must be (K, C) with C = 6 features of layer 'layer', got (4, 7)"),
        ({"dictionary": np.zeros((0, C))}, "must be (K, C)"),
        ({"dictionary": np.zeros(C)}, "must be (K, C)"),
        ({"dictionary": np.full((K, C), np.nan)}, "holds NaN or Inf"),
        ({"dictionary": np.full((K, C), "x")}, "must hold numbers"),
        ({"dictionary": np.zeros((K, C), complex)}, "must hold numbers"),
        (arrays(bias=np.zeros(K)), "bias of the given arrays must have the shape (6,), got (4,)"),
        (arrays(W_enc=np.zeros((C, K + 1)), activation="relu"), "W_enc of the given arrays must be (C, K) = (6, 4)"),
        (arrays(codes=np.zeros((2, K))), "must be (3, 4) or (3, 4, 2, 3), got (2, 4)"),
        (arrays(codes=np.zeros((3, K, 3, 2))), "must be (3, 4) or (3, 4, 2, 3)"),
        (arrays(codes=np.zeros((2, K)), ids=np.array(["a.png", "b.png"])), "no codes for 1 images of the store (c.png"),
        (arrays(codes=np.zeros((4, K)), ids=np.array(["a.png", "b.png", "c.png", "a.png"])), "repeats ids"),
        (arrays(codes=np.zeros((3, K)), ids=np.zeros(3)), "must be texts"),
    ],
)
def test_arrays_that_do_not_fit(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


class Evil:
    """Writes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    np.savez(tmp_path / "evil.npz", dictionary=np.array([Evil(proof)], dtype=object))
    for name in ("evil.pt", "evil.pkl", "evil.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(proof)))
    (tmp_path / "evil2.npz").write_bytes(pickle.dumps(Evil(proof)))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil(proof)))
    for path in sorted(tmp_path.glob("evil*")):
        with pytest.raises(UserError) as caught:
            load(str(path))
        assert "\n" not in str(caught.value)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: None, "no dictionary at"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"PK\x03\x04 broken"), "cannot be read"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"\xff" * 64), "not a readable safetensors file"),
        (lambda p: p.mkdir(), "has no cfg.json"),
        (lambda p: p.with_suffix(".txt").write_text("hello"), "no .npz, .safetensors or SAELens folder"),
    ],
)
def test_malformed_files(tmp_path: Path, write: Any, said: str) -> None:
    write(tmp_path / "d")
    path = next(iter(tmp_path.iterdir()), tmp_path / "d.npz")
    with pytest.raises(UserError, match=said):
        load(str(path))


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netgloss.evaluation.foreign_files.LIMIT", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dictionary.npy", b"\0" * (2 << 20))
    with pytest.raises(UserError, match="unpacks to"):
        load(str(tmp_path / "bomb.npz"))


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm' is not supported"),
        ({"d_in": 7}, "cfg.json says d_in = 7"),
        ({"architecture": "topk"}, "topk needs k"),
    ],
)
def test_saelens_settings_that_are_not_known(tmp_path: Path, cfg: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(saelens(tmp_path / "sae", sae_weights(), **cfg))
    (tmp_path / "sae" / "cfg.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold an object"):
        load(str(tmp_path / "sae"))


def test_options_behind_the_path(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    with pytest.raises(UserError, match=r"activation=, k= and threshold="):
        load(f"{tmp_path / 'd.npz'},colour=red")
    assert load(f"{tmp_path / 'd.npz'},activation=nnls").config.activation == "nnls"


def test_words_are_numbers() -> None:
    with pytest.raises(UserError, match="k of x must be a number, got 'many'"):
        Arrays("x", words={"k": "many"}).integer("k")


# -- scored like netgloss's own ---------------------------------------------------------------------------------------


def test_a_pca_from_elsewhere_scores_as_ours(tmp_path: Path) -> None:
    """PCA's dictionary with its encoder, with least squares, and as a table of codes: the scores of PCA itself."""
    classifier = netgloss.load_classifier("critters")
    source = netgloss.open_images("critters:40")
    store = netgloss.capture(classifier, source, ["block5"], tmp_path / "store", info=store_info(classifier, source))
    run = fit(
        "pca", store, "block5", tmp_path / "pca", config=netgloss.find_explainer("pca").Config(num_concepts=5), seeds=1
    )
    explainer: Explainer = run.explainer
    atoms, offset = explainer.dictionary.numpy(), explainer.offset.numpy()  # type: ignore[union-attr, operator]
    given = {"dictionary": atoms, "bias": offset}
    activation = torch.from_numpy(store.read("block5", slice(None))).float()
    with torch.no_grad():
        codes = explainer.encode(activation)
    np.savez(tmp_path / "encoder.npz", **given, W_enc=atoms.T, b_pre=offset, activation="none")
    np.savez(tmp_path / "codes.npz", **given, codes=codes.numpy(), ids=np.array(store.ids))
    np.savez(tmp_path / "lstsq.npz", **given, activation="lstsq")
    np.savez(tmp_path / "pooled.npz", **given, codes=codes.mean((2, 3)).numpy())
    np.savez(tmp_path / "broken.npz", **given)
    names = ("encoder", "codes", "lstsq", "pooled", "broken")
    found = compare(
        [run],
        out=tmp_path / "out",
        dictionaries={name: str(tmp_path / f"{name}.npz") for name in names},
        faithfulness=FaithfulnessOptions(images=4, importance_images=2, steps=3, shapley_pairs=2, sobol_points=2),
        device="cpu",
    )
    assert found.methods == ["pca", "encoder", "codes", "lstsq", "pooled"]
    assert "neither codes nor an encoder" in found.left_out["broken"]
    for metric in ("r2", "agreement", "kl", "l0", "c_gain_logit", "c_carried_logit", "collinearity"):
        ours = found.score("pca", metric)
        assert ours is not None
        for name in names[:3]:
            got = found.score(name, metric)
            assert got is not None
            assert got["value"] == pytest.approx(ours["value"], rel=1e-3, abs=1e-4), (name, metric)
    one = next(d for d in found.record["differences"]["agreement"] if (d["a"], d["b"]) == ("pca", "pooled"))
    assert one["verdict"] in ("same", "better", "worse")
    pairs = {(d["a"], d["b"]) for d in found.record["differences"]["r2"]}
    assert ("pca", "codes") in pairs
    assert ("pca", "pooled") not in pairs, "fidelity of a mean is not comparable with that of its map"
