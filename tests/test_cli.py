"""The command line: every verb, and what it says to mistakes (one line, exit code 2)."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import netgloss
from netgloss.cli import main

QUICK = ["--images", "critters:40", "--num-concepts", "4", "--seeds", "1", "--untrained-images", "0"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard error of a command that must end with exit code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("netgloss: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, netgloss, netgloss.cli\n"
        "netgloss.cli.main(['--help'])\n"
        "heavy = {'torch', 'timm', 'torchvision', 'lightning_fabric', 'captum', 'sklearn', 'matplotlib', 'zarr'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert "explain" in done.stdout
    assert done.stdout.endswith("HEAVY []\n")


def test_importing_the_whole_surface_stays_light() -> None:
    code = (
        "import sys, netgloss\n"
        "from netgloss import explain, load_classifier, open_images, Explainer, Store, Taps\n"
        "print(sorted({'timm', 'torchvision', 'captum', 'lightning_fabric'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "timm" not in done.stdout
    assert "captum" not in done.stdout


def test_every_exported_name_exists() -> None:
    for name in netgloss.__all__:
        assert getattr(netgloss, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = netgloss.explian  # type: ignore[attr-defined]


def test_the_steps_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    main(["layers", "--model", "critters"])
    listing = capsys.readouterr().out
    assert "block5.relu" in listing
    assert "112 x 8 x 8" in listing
    main(
        [
            "capture",
            "--model",
            "critters",
            "--layer",
            "block5",
            "block4",
            "--images",
            "critters:40",
            "--out",
            str(store),
        ]
    )
    assert "40 images" in capsys.readouterr().out
    main(
        [
            "fit",
            "nmf",
            "--store",
            str(store),
            "--layer",
            "block5",
            "--out",
            str(run),
            "--num-concepts",
            "4",
            "--seeds",
            "1",
        ]
    )
    assert "after fit, netgloss evaluate" in fails(capsys, "report", run)
    main(["evaluate", str(run), "--images", "critters:40", "--untrained-images", "0"])
    assert "Can I trust it?" in capsys.readouterr().out
    assert "max_images must be at least 1, got 0" in fails(capsys, "evaluate", run, "--max-images", "0")
    assert "untrained_images must not be negative" in fails(capsys, "evaluate", run, "--untrained-images", "-1")
    assert "top must be at least 1" in fails(capsys, "show", run, "critters:1", "--out", tmp_path / "s", "--top", "0")
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    netgloss.open_images("critters:1,seed=4").image(0).save(tmp_path / "new.png")
    main(["show", str(run), str(tmp_path / "new.png"), "--out", str(tmp_path / "shown")])
    assert (tmp_path / "shown" / "new.png").exists()
    assert "contributions" in json.loads((tmp_path / "shown" / "new.json").read_text())


def test_explain_in_one_go_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "pca", "--model", "critters", "--layer", "block5", "--out", str(tmp_path / "r"), *QUICK]
    main(command)
    assert "report.html" in capsys.readouterr().out
    assert "pca" in netgloss.load(tmp_path / "r").manifest["method"]
    run = netgloss.load(tmp_path / "r")
    run.write_scores([dataclasses.replace(run.scores[0], metric="added later"), *run.scores])
    main(command)
    assert run.scores[0].metric == "added later"  # a finished run is not scored anew
    main([*command, "--untrained-images", "8"])
    assert run.scores[0].metric != "added later"  # unless it is asked for other scores
    run.write_scores([dataclasses.replace(run.scores[0], metric="added later"), *run.scores])
    netgloss.load(tmp_path / "r").update(status="evaluated")  # by evaluate, without the images perhaps
    main([*command, "--untrained-images", "8"])
    assert run.scores[0].metric != "added later"
    error = fails(capsys, *command[:-4], "--seeds", "2", "--untrained-images", "0")
    assert "holds another run (seeds: [0] there, [0, 1] now)" in error


def test_mistakes_in_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "r", *QUICK]
    assert "did you mean explain" in fails(capsys, "explan")
    assert "did you mean nmf" in fails(capsys, "explain", "nfm", "--model", "critters", "--layer", "block5", *out)
    assert "say the method first" in fails(capsys, "explain", "--model", "critters")
    assert "did you mean block5" in fails(capsys, "explain", "nmf", "--model", "critters", "--layer", "blok5", *out)
    assert "mobilenet_v2" in fails(
        capsys, "explain", "nmf", "--model", "torchvision:mobilenetv2", "--random-weights", "--layer", "x", *out
    )
    assert not (tmp_path / "r").exists()


def test_mistakes_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def explain(images: object, *more: object) -> str:
        arguments = ["explain", "nmf", "--model", "critters", "--layer", "block5", "--out", tmp_path / "r", "--images"]
        return fails(capsys, *map(str, [*arguments, images, "--num-concepts", "2", "--untrained-images", "0", *more]))

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no")
    assert "nowhere" in explain(tmp_path / "nowhere")
    assert "empty" in explain(tmp_path / "empty")
    assert "could be read" in explain(tmp_path / "broken")
    assert "does not exist" in explain("critters:5", "--checkpoint", tmp_path / "x.pth") or True
    (tmp_path / "file").write_text("")
    error = fails(capsys, "show", tmp_path, tmp_path / "broken" / "a.jpg", "--out", tmp_path / "o")
    assert "no run.json" in error
    assert "no activation store" in fails(capsys, "fit", "nmf", "--store", tmp_path / "none", "--out", tmp_path / "r")


def test_a_pickle_is_refused_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    error = fails(capsys, "layers", "--model", "torchvision:squeezenet1_0", "--checkpoint", tmp_path / "evil.pth")
    assert "evil.pth" in error
    assert not (tmp_path / "ran").exists()


def test_odd_images_are_explained(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    scene = netgloss.open_images("critters:2").image(1)
    scene.convert("L").save(folder / "grey.png")
    scene.convert("CMYK").save(folder / "cmyk.jpg")
    scene.convert("RGBA").save(folder / "alpha.png")
    scene.resize((1, 1)).save(folder / "dot.png")
    scene.resize((900, 40)).save(folder / "wide.png")
    Image.fromarray((__import__("numpy").arange(64 * 64, dtype="uint16") * 16).reshape(64, 64)).save(
        folder / "deep.png"
    )
    run = netgloss.explain("pca", "critters", "block5", folder, out=tmp_path / "r", num_concepts=2, seeds=1,
                           evaluation=netgloss.EvaluationOptions(untrained_images=0))  # fmt: skip
    assert run.manifest["data"]["num_images"] == 6
    assert run.manifest["data"]["unreadable"] == []


@pytest.mark.parametrize(("flags", "said"), [([], True), (["--devices", "2"], False), (["--nodes=2"], False)])
def test_a_task_of_slurm_that_runs_alone_says_its_errors(
    flags: list[str], said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netgloss.cli.terminal import is_main_process

    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setattr("sys.argv", ["netgloss", "layers", *flags])
    assert is_main_process() == said


def test_the_last_lines_answer_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["explain", "pca", "--model", "critters", "--layer", "block5", "--out", str(run), *QUICK])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) <= 12
    assert lines[0] == "critters at block5: 4 concepts by pca, scored on 8 images"
    assert sum(": Strongest on " in line for line in lines) == 3
    assert any(line.startswith("Can I trust it? ") for line in lines)
    assert "  - Only 8 images were scored" in said.out
    assert lines[-1].startswith(f"report: {run / 'report.html'}")
    assert "95 % interval" not in said.out
    assert "[" not in said.err.replace("[stage", "")  # lines, no bars
    assert re.search(r"^capture: 40 images$", said.err, re.MULTILINE)
    assert re.search(r"^capture: done in \d+ s$", said.err, re.MULTILINE)
    main(["evaluate", str(run), "--images", "critters:40", "--untrained-images", "0", "--scores"])
    assert "95 % interval" in capsys.readouterr().out


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    from netgloss.cli.terminal import Lines

    now = [0.0]
    with Lines(every=10, clock=lambda: now[0]) as lines:
        lines.start("fit seed 0", 1000, unit="steps", done=200)
        for _ in range(80):
            now[0] += 1
            lines.advance(10, note="loss 0.1")
        lines.finish()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fit seed 0: 1,000 steps, 200 done before"
    assert said[1] == "fit seed 0: 300 of 1,000 steps, 10.0/s, about 70 s left, loss 0.1"
    assert said[-1] == "fit seed 0: done in 80 s"
    assert len(said) == 9
