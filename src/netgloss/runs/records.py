"""What a run folder holds, declared once: the records of run.json, concepts.json and scores.json.

Files are validated against these types by msgspec. A field without a default is required; unknown fields are dropped,
so that a newer netgloss may add some.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct, field

Index = Annotated[int, Meta(ge=0)]
Number = float | None
Free = dict[str, Any]


class LayerSpecRecord(Struct):
    """Shape of the explained layer, without the batch."""

    shape: list[Index] = []
    nonnegative: bool | None = None


class Unreadable(Struct):
    """An image that could not be read, and why."""

    id: str
    reason: str | None = None


class DataRecord(Struct):
    """The images of a run."""

    description: str | None = None
    fingerprint: str | None = None
    num_images: Index | None = None
    num_fit: Index | None = None
    num_heldout: Index | None = None
    unreadable: list[Unreadable] = []
    notes: list[str] = []


class TailRecord(Struct):
    """How logits follow from the layer."""

    mode: str | None = None
    affine: bool | None = None
    reason: str | None = None


class Manifest(Struct):
    """run.json, as far as the report reads it."""

    format_version: Index
    layer: str
    command: str | None = None
    method: str | None = None
    config: Free = {}
    model: Free = {}
    layer_spec: LayerSpecRecord = field(default_factory=LayerSpecRecord)
    data: DataRecord = field(default_factory=DataRecord)
    seeds: list[Index] = []
    versions: Free = {}
    created: str | None = None
    times: dict[str, Number] = {}
    tail: TailRecord = field(default_factory=TailRecord)
    warnings: list[str] = []
    num_judged: Index | None = None
    num_by_construction: Index = 0


class ScoreRecord(Struct):
    """An entry of scores.json."""

    metric: str
    value: Number = None
    low: Number = None
    high: Number = None
    baselines: dict[str, Number] = {}
    n: Index | None = None
    seeds: Any = None
    higher_is_better: bool | None = None
    definition: str | None = None


# -- concepts.json ----------------------------------------------------------------------------------------------------


class MapRecord(Struct):
    """A concept's map: base64 of uint8 between low and high."""

    grid: list[Index]
    data: str
    low: float
    high: float
    threshold: Index | None = None


class DriverRecord(Struct):
    """A concept behind a prediction."""

    concept: Index
    contribution: Number = None
    map: MapRecord | None = None


class RemovalRecord(Struct):
    """Logits with each driver weakened: ``at`` by driver, strength and class."""

    exact: bool
    strengths: list[float] = []
    classes: list[str] = []
    logits: list[float] = []
    ceiling: Number = None
    drivers: list[Index] = []
    at: list[list[list[float]]] = []

    def is_even(self) -> bool:
        """One logit for each driver, strength and class; strength 0 is among them."""
        sizes = [len(self.drivers), len(self.strengths), len(self.classes)]
        return (
            0.0 in self.strengths
            and len(self.logits) == sizes[2]
            and len(self.at) == sizes[0]
            and all(len(rows) == sizes[1] and all(len(row) == sizes[2] for row in rows) for rows in self.at)
        )


class ExplainedRecord(Struct, rename={"class_": "class"}):
    """What drove the prediction of an image; ``share`` of its logit that the concepts explain."""

    class_: str
    logit: Number = None
    base: Number = None
    gap: Number = None
    share: Number = None
    drivers: list[DriverRecord] = []
    removal: RemovalRecord | None = None


class ImageRecord(Struct):
    """An image that is shown; ``known`` if its label is a class of the network."""

    id: str
    label: str | None = None
    known: bool | None = None
    prediction: str | None = None
    probability: Number = None
    thumbnail: str | None = None
    split: str | None = None
    explained: ExplainedRecord | None = None


class LabelRecord(Struct):
    """A concept's name from annotations."""

    text: str
    metric: str | None = None
    value: Number = None


class HistogramRecord(Struct):
    """Activations of a concept."""

    edges: list[float] = []
    counts: list[float] = []


class GalleryEntry(Struct):
    """One of the strongest images of a concept."""

    image: Index
    value: Number = None
    map: MapRecord | None = None


class ServedClass(Struct, rename={"class_": "class"}):
    """A class whose logit a concept raises, and the number of its images."""

    class_: str
    contribution: Number = None
    share: Number = None
    images: Index | None = None


class Neighbour(Struct):
    """A similar concept."""

    concept: Index
    similarity: float


class DecodedRecord(Struct):
    """A concept taken out and alone, drawn by a decoder."""

    removed: str | None = None
    alone: str | None = None
    visibility: Number = None
    note: str | None = None


class ConceptRecord(Struct):
    """A concept."""

    id: Index
    name: str
    label: LabelRecord | None = None
    share_active: Number = None
    mean: Number = None
    max: Number = None
    importance: Number = None
    histogram: HistogramRecord | None = None
    stability: Number = None
    gallery: list[GalleryEntry] = []
    classes: list[ServedClass] = []
    neighbours: list[Neighbour] = []
    decoded: DecodedRecord | None = None
    scores: dict[str, Number] = {}


class ConceptMap(Struct):
    """Concepts as points in the plane."""

    points: list[list[float]] = []
    way: str | None = None
    of: str | None = None
    neighbours: Index | None = None
    kept: Number = None
    chance: Number = None


class Confusion(Struct):
    """How often one class was taken for another."""

    label: str
    prediction: str
    count: Index


class MistakeGroup(Struct):
    """Mistakes with the same concept behind them."""

    count: Index
    concept: Index | None = None
    share: Number = None
    margin: Number = None
    pairs: list[Confusion] = []
    images: list[Index] = []
    recognised_without: Index | None = None
    replayed: Index | None = None


class Mistakes(Struct):
    """Mistakes among the labelled images."""

    labelled: Index
    wrong: Index
    groups: list[MistakeGroup] = []


class UnmatchedClass(Struct):
    """A class of the images that is none of the network: how many images, how they are predicted most often."""

    label: str
    images: Index
    nearest: str | None = None
    prediction: str | None = None
    predicted: Index = 0


class ClassConcept(Struct):
    """What a concept adds to the logit of a class, with its interval."""

    concept: Index
    contribution: Number = None
    low: Number = None
    high: Number = None
    share: Number = None


class Deletion(Struct):
    """Cross-deletion of concepts: what is lost of each when one is taken out."""

    images: Index
    concepts: list[Index] = []
    lost: list[list[Number]] = []
    random: list[Number] = []


class ClassRecord(Struct, rename={"class_": "class"}):
    """A class."""

    class_: str
    num_images: Index | None = None
    accuracy: Number = None
    agreement: Number = None
    mean_logit: Number = None
    base: Number = None
    gap: Number = None
    concepts: list[ClassConcept] = []
    deletion: Deletion | None = None


class CompletenessGap(Struct):
    """What base and contributions leave of the rebuilt logit."""

    mean_abs: Number = None
    relative: Number = None


class TypicalShare(Struct):
    """Share of the network's own logit that base and concepts explain: median over ``images``, with its interval."""

    share: float
    images: Index
    low: Number = None
    high: Number = None


class Importance(Struct):
    """How contributions were computed."""

    kind: str | None = None
    completeness_gap: CompletenessGap | None = None
    explained: TypicalShare | None = None
    definition: str | None = None


class Concepts(Struct):
    """concepts.json."""

    format_version: Index
    layer: str
    grid: list[Index] = []
    importance: Importance = field(default_factory=Importance)
    images: list[ImageRecord] = []
    concepts: list[ConceptRecord] = []
    map: ConceptMap | None = None
    mistakes: Mistakes | None = None
    unmatched: list[UnmatchedClass] = []
    classes: list[ClassRecord] = []

    def problems(self) -> str:
        """The first reference that points at nothing, or table of the wrong size; "" if there is none.

        Concepts are known by their position: ids count up from 0.
        """
        for i, concept in enumerate(self.concepts):
            if concept.id != i:
                return f"concepts[{i}].id should be {i}, is {concept.id}"
        groups = self.mistakes.groups if self.mistakes else []
        images = [entry.image for concept in self.concepts for entry in concept.gallery]
        images += [i for group in groups for i in group.images]
        bad = next((i for i in images if i >= len(self.images)), None)
        if bad is not None:
            return f"refers to image {bad}, there are {len(self.images)} images"
        bad = next((k for k in self._named(groups) if k >= len(self.concepts)), None)
        if bad is not None:
            return f"refers to concept {bad}, there are {len(self.concepts)} concepts"
        for i, image in enumerate(self.images):
            if image.explained and image.explained.removal and not image.explained.removal.is_even():
                return f"images[{i}].explained.removal has tables of uneven size"
        if self.map and (len(self.map.points) != len(self.concepts) or any(len(p) != 2 for p in self.map.points)):
            return f"map.points should be {len(self.concepts)} pairs"
        return ""

    def _named(self, groups: list[MistakeGroup]) -> list[int]:
        """Every concept that something refers to."""
        explained = [image.explained for image in self.images if image.explained]
        named = [driver.concept for entry in explained for driver in entry.drivers]
        named += [k for entry in explained if entry.removal for k in entry.removal.drivers]
        named += [k for entry in self.classes if entry.deletion for k in entry.deletion.concepts]
        named += [use.concept for entry in self.classes for use in entry.concepts]
        named += [near.concept for concept in self.concepts for near in concept.neighbours]
        return named + [group.concept for group in groups if group.concept is not None]


# -- audit.json -------------------------------------------------------------------------------------------------------


class FindingRecord(Struct, rename={"class_": "class"}):
    """A finding of the audit: what makes the network answer with a class although it is not the object.

    ``effect`` is the share of other classes' images that become the class, with its 95 % interval; ``control`` the same
    without the region or cue.
    """

    kind: str
    class_: str
    region: bool
    effect: float
    low: float
    high: float
    q_value: float
    sentence: str
    control: Number = None
    lost: Number = None
    lost_control: Number = None
    evidence: list[str] = []
    examples: list[str] = []
    concept: Index | None = None
    concepts: list[Index] = []
    concept_share: Number = None
    concept_lost: Number = None
    concept_lost_random: Number = None
    picture: str | None = None


class AuditTest(Struct, rename={"class_": "class"}):
    """A class and the region or cue that was tested for it."""

    class_: str
    kind: str
    detail: str | None = None
    gained: Number = None
    gained_control: Number = None
    lost: Number = None
    lost_control: Number = None
    low: Number = None
    high: Number = None
    p_value: Number = None
    n: Index | None = None
    area: Number = None
    signs: dict[str, Number] = {}


class AuditRecord(Struct):
    """audit.json."""

    format_version: Index
    summary: str
    findings: list[FindingRecord] = []
    tested: list[AuditTest] = []
    limits: list[str] = []
    searched: Index = 0
    images: Index = 0
