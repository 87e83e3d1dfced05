"""The run folder: what was done, with what, and its results.

::

    run.json               status, command, method, config, model, layer, data, seeds, versions, times, warnings
    explainer.safetensors  the explainer of the first seed; explainer-seedN.safetensors those of the others
    history.jsonl          loss terms over the steps of learned methods
    scores.json            a list of Score records
    concepts.json          concepts, classes and example images as the report shows them
    concepts.csv           one line per concept
    images/                thumbnails
    figures/               figures of methods that draw some, and figures.json
    audit.json             findings of ``netgloss audit``, with their pictures in figures/
    report.html            all of it, in one file

Every file is written to a neighbour and renamed, so that a folder is complete or resumable, never half. Nothing is
pickled.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.activations.locations import remove_leftovers, writing_to
from netgloss.errors import UserError
from netgloss.runs.saved import load_explainer, read_safetensors

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from netgloss.activations import Store
    from netgloss.classifiers import Classifier
    from netgloss.explainers.base import Explainer
    from netgloss.metrics import Score
    from netgloss.runs.views import ConceptsRecord, ImageView

FORMAT_VERSION = 1
_MADE = (
    "explainer*.safetensors",
    "*.checkpoint.safetensors",
    "hardened-*.safetensors",
    "judged-*.json",
    "units.csv",
)
_IDENTITY = ("method", "config", "layer", "seeds", "store_address")


def versions() -> dict[str, str]:
    """Versions of netgloss and of what its numbers depend on."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("netgloss", "torch", "torchvision", "timm", "scikit-learn", "numpy", "zarr", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes ``path`` whole or not at all."""
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part{os.getpid()}")
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file; missing or malformed is one clear line."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not readable JSON: {reason}") from error


def to_json(value: Any) -> str:
    """Strict JSON: NaN and Inf become null, as no JSON reader outside Python takes them."""
    import math

    def clean(item: Any) -> Any:
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        if isinstance(item, Mapping):
            return {str(k): clean(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [clean(v) for v in item]
        return item

    return json.dumps(clean(value), indent=1, ensure_ascii=False, allow_nan=False)


class Run:
    """A run folder, open for reading and writing.

    ``run.explainer`` is the fitted explainer of the first seed, ``run.explainers()`` those of all; ``run.scores`` the
    score records; ``run.classifier()`` loads the network again and checks its weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"no run folder at {self.path}")
        self.manifest: dict[str, Any] = read_json(self.path / "run.json")
        self.network: Classifier | None = None
        """The explained network, where it cannot be loaded again by its name; used to rebuild explainers."""
        if not isinstance(self.manifest, dict) or self.manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{self.path} is not a run folder of format {FORMAT_VERSION}")

    # -- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, manifest: dict[str, Any]) -> Run:
        """A new run folder, or the one already there if it was made with the same settings (to continue or to
        repeat).
        """
        path = Path(path)
        fresh = {
            "format_version": FORMAT_VERSION,
            "status": "started",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "times": {},
            "warnings": [],
            **manifest,
        }
        if path.is_dir():
            remove_leftovers(path)
        if (path / "run.json").exists():
            run = cls(path)
            run.remove_leftovers()
            asked = json.loads(to_json(fresh))
            differing = [name for name in _IDENTITY if run.manifest.get(name) != asked.get(name)]
            if differing and any(any(path.glob(pattern)) for pattern in _MADE):
                said = "; ".join(f"{n}: {run.manifest.get(n)!r} there, {asked.get(n)!r} now" for n in differing)
                raise UserError(f"{path} holds another run ({said}); choose another --out")
            if differing:  # nothing was fitted yet: a first try that was refused
                run.manifest = {}
                run.update(**fresh)
            return run
        if path.exists() and (not path.is_dir() or any(p.name != "activations.zarr" for p in path.iterdir())):
            raise UserError(f"{path} exists and is not a run folder; choose another --out")
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "run.json", to_json(fresh))
        return cls(path)

    def remove_leftovers(self) -> None:
        """Removes what a killed command left half-written; for the one process that writes to the folder."""
        for folder in (self.path, self.path / "images", self.path / "dissection"):
            remove_leftovers(folder)

    def update(self, **values: Any) -> None:
        """Changes entries of run.json."""
        self.manifest.update(json.loads(to_json(values)))
        write_atomically(self.path / "run.json", to_json(self.manifest))

    def add_time(self, name: str, seconds: float) -> None:
        """Records how long a step took (added to what an interrupted run spent)."""
        times = dict(self.manifest.get("times", {}))
        times[name] = round(times.get(name, 0.0) + seconds, 2)
        self.update(times=times)

    # -- explainers -----------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        return str(self._entry("method", str))

    @property
    def layer(self) -> str:
        return str(self._entry("layer", str))

    @property
    def seeds(self) -> list[int]:
        seeds = self._entry("seeds", list)
        if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise UserError(f"{self.path / 'run.json'}: seeds should be whole numbers, at least one, got {seeds!r:.60}")
        return list(seeds)

    @property
    def store(self) -> str:
        """Where the activations are, or were; those inside the folder are found wherever it was moved."""
        self._check_kind()
        recorded, inside = str(self._entry("store", str)), self.path / "activations.zarr"
        moved = Path(recorded).name == inside.name and not os.path.exists(recorded) and inside.is_dir()
        return str(inside) if moved else recorded

    def check_store(self, store: Store) -> None:
        """Raises :class:`UserError` if the run was fitted on another store."""
        if store.key.address != self.manifest.get("store_address"):
            raise UserError(f"the store {store.path} is not the one that the run {self.path} was fitted on")

    def _check_kind(self) -> None:
        verb = self.manifest.get("method")
        if verb in ("consistency", "harden"):
            raise UserError(
                f"{self.path} is a run of netgloss {verb} and holds no explainer: name a run of explain or fit"
            )

    def _entry(self, name: str, kind: type) -> Any:
        value = self.manifest.get(name)
        if not isinstance(value, kind):
            raise UserError(f"{self.path / 'run.json'} is damaged: {name} is missing or not a {kind.__name__}")
        return value

    def explainer_path(self, seed: int) -> Path:
        """File of one seed's explainer."""
        self._check_kind()
        return self.path / ("explainer.safetensors" if seed == self.seeds[0] else f"explainer-seed{seed}.safetensors")

    def save_explainer(self, explainer: Explainer, seed: int) -> None:
        """Saves a fitted explainer with everything that is needed to build it again."""
        from safetensors.torch import save

        from netgloss.explainers.names import method_name

        header = {
            "method": method_name(type(explainer)),
            "config": json.dumps(dataclasses.asdict(explainer.config)),
            "spec": json.dumps(dataclasses.asdict(explainer.spec)),
            "seed": str(seed),
            "notes": json.dumps(list(getattr(explainer, "notes", []))),
        }
        if "section" in explainer.needs(explainer.config):
            header["model"] = json.dumps(self.manifest.get("model", {}))
        state = {name: value.contiguous() for name, value in explainer.state_dict().items()}
        write_atomically(self.explainer_path(seed), in_order(save(state, metadata=header)))

    @property
    def explainer(self) -> Explainer:
        """The explainer of the first seed, on the CPU in eval mode."""
        return load_explainer(self.explainer_path(self.seeds[0]), classifier=self.network)

    def explainers(self) -> list[Explainer]:
        """The explainers of all seeds."""
        return [load_explainer(self.explainer_path(seed), classifier=self.network) for seed in self.seeds]

    def checkpoint(self, seed: int) -> FileCheckpoint:
        """Where the fit of one seed keeps its state until it ends."""
        return FileCheckpoint(self.path / f"fit-seed{seed}.checkpoint.safetensors")

    # -- classifier and results -----------------------------------------------------------------------------------

    def classifier(self, *, checkpoint: str | Path | None = None, device: str = "cpu") -> Classifier:
        """The explained network, loaded again; its weights must hash to what the run was made with.

        Parameters
        ----------
        checkpoint : where the weights are now, if not where they were.
        """
        from netgloss.classifiers import load_from_spec

        return load_from_spec(self._entry("model", dict), checkpoint=checkpoint).to(device)

    @property
    def scores(self) -> list[Score]:
        """The score records; empty before ``evaluate``."""
        from netgloss.metrics import Score

        path = self.path / "scores.json"
        return [Score.from_dict(record) for record in read_json(path)] if path.exists() else []

    @property
    def concepts(self) -> ConceptsRecord:
        """What the report shows of concepts, classes and images; ``run.concepts[3]`` is a concept with a figure."""
        from netgloss.runs.views import ConceptsRecord

        return ConceptsRecord(read_json(self.path / "concepts.json"), self.path)

    def image(self, path: str | Path) -> ImageView:
        """The explanation of one of the run's own images, with ``figure()``; ``netgloss.show`` explains any other.

        Parameters
        ----------
        path : the image's id, its path, or the end of it.
        """
        from netgloss.runs.views import explained_image

        return explained_image(self.path, path)

    def table(self) -> Any:
        """One row per concept: a pandas frame where pandas is installed, else a list of dicts.

        The columns are those of ``concepts.csv``: number, name, share of all contributions, how often active,
        stability, classes that it stands for, what it is strongest on, and its strongest images.
        """
        from netgloss.runs.views import concept_rows

        rows = concept_rows(_read_concepts(self.path))
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def write_scores(self, scores: list[Score]) -> None:
        write_atomically(self.path / "scores.json", to_json([score.to_dict() for score in scores]))

    def write_concepts(self, concepts: dict[str, Any]) -> None:
        from netgloss.runs.views import concepts_csv

        write_atomically(self.path / "concepts.json", to_json(concepts))
        write_atomically(self.path / "concepts.csv", concepts_csv(_read_concepts(self.path)))

    def write_image(self, name: str, image: Image, *, quality: int = 82) -> None:
        """A picture below ``images/``: WebP if its name ends in .webp and Pillow can write that, else JPEG."""
        from PIL import features

        buffer = io.BytesIO()
        if name.endswith(".webp") and features.check("webp"):
            image.save(buffer, "WEBP", quality=quality)
        else:
            image.save(buffer, "JPEG", quality=quality, optimize=True)
        write_atomically(self.path / "images" / name, buffer.getvalue())

    def write_figures(self, drawn: Sequence[tuple[str, Any, str]]) -> None:
        """Figures as PNG below ``figures/``, listed with what they show in ``figures/figures.json``.

        ``drawn`` holds (file stem, matplotlib figure, text); figures written before stay listed.
        """
        folder = self.path / "figures"
        listed = {entry["file"]: entry for entry in self.figures}
        for stem, figure, text in drawn:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            write_atomically(folder / f"{stem}.png", buffer.getvalue())
            listed[f"{stem}.png"] = {"file": f"{stem}.png", "text": text}
        write_atomically(folder / "figures.json", to_json(list(listed.values())))

    def write_picture(self, stem: str, figure: Any) -> None:
        """One figure as PNG below ``figures/``, without listing it among those that the method drew."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        write_atomically(self.path / "figures" / f"{stem}.png", buffer.getvalue())

    def write_json(self, name: str, content: Any) -> None:
        """A JSON file of the run folder."""
        write_atomically(self.path / name, to_json(content))

    @property
    def figures(self) -> list[dict[str, str]]:
        """File and text of each figure below ``figures/``; empty if there are none."""
        path = self.path / "figures" / "figures.json"
        return read_json(path) if path.exists() else []

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to history.jsonl."""
        with writing_to(self.path), (self.path / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(" ".join(to_json(line).split()) + "\n")

    def trim_history(self, seed: int, step: int, *, arm: str | None = None) -> None:
        """Drops lines of ``seed`` (and ``arm`` of a hardening) after ``step``: a resumed fit writes them again."""
        path = self.path / "history.jsonl"
        if path.exists():
            kept = [
                line
                for line in read_history(path)
                if (line.get("seed"), line.get("arm")) != (seed, arm) or line.get("step", 0) <= step
            ]
            write_atomically(path, "".join(" ".join(to_json(line).split()) + "\n" for line in kept))

    def __repr__(self) -> str:
        lines = [f"Run {self.path}: {self.method} at {self.layer}, {self.manifest['status']}"]
        lines += [f"  {s.metric:<24}{s.value if s.value is not None else float('nan'):.4g}" for s in self.scores]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows of the run: its scores and leading concepts."""
        from netgloss.runs.notebook import summary

        return summary(self)


def _read_concepts(folder: Path) -> dict[str, Any]:
    """``concepts.json``, checked and completed."""
    from netgloss.runs.files import read_run

    return read_run(folder).concepts


class FileCheckpoint:
    """State of an unfinished fit, in one safetensors file (its values travel in the header)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.exists():
            return None
        tensors, header = read_safetensors(self.path)
        return tensors, json.loads(header["values"])

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        from safetensors.torch import save

        data = save(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata={"values": json.dumps(values)}
        )
        write_atomically(self.path, data)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history file; a last line cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def in_order(data: bytes) -> bytes:
    """A safetensors file with the entries of its header sorted: equal contents are equal bytes (safetensors writes the
    metadata in a random order).
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load(
    path: str | Path, *, checkpoint: str | Path | None = None, classifier: Classifier | nn.Module | None = None
) -> Run:
    """An existing run folder, with its network where that cannot be found by its name.

    Parameters
    ----------
    checkpoint : where the weights are now, if they were moved since the run.
    classifier : the network, if it was given as a module. Its preprocessing and class names are those of the run.

    Raises
    ------
    UserError : no run, or the weights are not those that the run was made with.
    """
    run = Run(path)
    if classifier is not None:
        from netgloss.classifiers import load_from_spec, network_of

        run.network = load_from_spec(run._entry("model", dict), net=network_of(classifier), checkpoint=checkpoint)
    elif checkpoint is not None:
        run.network = run.classifier(checkpoint=checkpoint)
    return run


def save_figure(folder: Path, stem: str, figure: Any, numbers: dict[str, Any]) -> list[Path]:
    """A figure as ``stem.png`` and its numbers as ``stem.json`` in ``folder``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    picture, record = folder / f"{stem}.png", folder / f"{stem}.json"
    write_atomically(picture, buffer.getvalue())
    write_atomically(record, to_json(numbers))
    return [picture, record]
