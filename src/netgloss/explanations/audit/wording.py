"""What the audit found, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from netgloss.explanations.audit.search import Audit, AuditOptions, ClassTest, Finding


def place_in_words(box: Sequence[float]) -> str:
    """Where a window (row, column, height, width, in shares) lies: "the lower left", "the middle"."""
    row, column = box[0] + box[2] / 2, box[1] + box[3] / 2
    vertical = "upper" if row < 0.38 else "lower" if row > 0.62 else ""
    horizontal = "left" if column < 0.38 else "right" if column > 0.62 else ""
    if vertical and horizontal:
        return f"the {vertical} {horizontal}"
    return f"the {vertical} middle" if vertical else f"the {horizontal}" if horizontal else "the middle"


def region_in_words(test: ClassTest) -> str:
    """What the test exchanged, as a noun phrase."""
    area = f"{test.area:.0%} of the picture"
    if test.kind == "border":
        return f"the border of the picture ({area})"
    if test.kind == "background":
        return f"what lies around the objects ({area})"
    if test.kind == "place":
        return f"a spot at {place_in_words(test.boxes[0])} ({area})"
    return f"a small patch ({area})"


def sentence(finding: Finding, class_names: Sequence[str]) -> str:
    """What the finding says, with its numbers."""
    test, name = finding.test, class_names[finding.test.class_index]
    if not test.boxes and test.kind not in ("border", "background"):
        text = f"Images of “{name}” are {test.detail} than others. Made so, {test.gained:.0%} of other images become it"
        return f"{text} ({test.gained_control:.0%} when changed the other way)."
    what = region_in_words(test)
    text = f"{what[0].upper()}{what[1:]}, put from images of “{name}” into others, "
    text += f"makes {test.gained:.0%} of them “{name}”"
    text += f" (control: {test.gained_control:.0%}). "
    text += f"With other pixels there, {test.lost:.0%} of its own images are no longer recognised"
    text += f" (control: {test.lost_control:.0%})."
    reasons = []
    if "same pixels" in finding.evidence:
        reasons.append(f"{test.signs['same pixels']:.0%} of its pixels are the same in nearly all images")
    if "always at one place" in finding.evidence:
        reasons.append(f"it lies at the same place in {test.signs['always at one place']:.0%} of them")
    if "off the object" in finding.evidence:
        reasons.append(f"{test.signs['off the object']:.0%} of it lies off the annotated objects")
    return f"{text} {'; '.join(reasons).capitalize()}." if reasons else text


def summary(audit: Audit, class_names: Sequence[str]) -> str:
    """The answer in one sentence."""
    if audit.findings:
        names = list(dict.fromkeys(f"“{class_names[f.test.class_index]}”" for f in audit.findings))
        number = len(audit.findings)
        return (
            f"{number} finding{'s' * (number > 1)} in {audit.searched} classes: the network recognises "
            f"{', '.join(names[:5])}{' and others' * (len(names) > 5)} by something other than the object."
        )
    if not audit.searched:
        return "Nothing was tested: no class has enough images that the network recognises."
    return f"Nothing found in {audit.searched} classes."


def limits(audit: Audit, options: AuditOptions, class_names: Sequence[str], *, masked: bool) -> list[str]:
    """What this audit could and could not have found."""
    n = options.test_pairs
    said = [
        f"A region or cue is found if it turns at least about {_needed(n, options.least_gain):.0%} of {n} images of "
        "other classes into the class; weaker reliance is not reported.",
        "Regions are squares of a sixth to a third of the picture's side, and its border; cues are tint, brightness, "
        "contrast, sharpness and grain. What is spread thinly over the picture, or needs several regions at once, is "
        "not found.",
    ]
    if not masked:
        said.append("Without annotations, a background that varies from image to image cannot be told from the object.")
    if audit.untested:
        names = ", ".join(class_names[c] for c in audit.untested[:8])
        more = f" and {len(audit.untested) - 8} more" if len(audit.untested) > 8 else ""
        said.append(
            f"Not tested, for fewer than {options.least_images} images that the network recognises (or beyond the "
            f"{options.max_classes} most frequent classes): {names}{more}."
        )
    return said


def _needed(n: int, least: float) -> float:
    """The smallest share of ``n`` whose 95 % interval lies above ``least``."""
    from scipy.stats import binomtest

    return next((k / n for k in range(n + 1) if binomtest(k, n).proportion_ci().low >= least), 1.0)
