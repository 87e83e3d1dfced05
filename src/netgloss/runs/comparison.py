"""A finished comparison: the record of comparison.json, with accessors and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netgloss.errors import UserError
from netgloss.figures.comparison import value_text
from netgloss.runs.run import read_json, to_json
from netgloss.runs.views import harmless

SYMBOLS = {
    "beats random": "",
    "differs from random": "",
    "not distinguishable from random": "≈",
    "worse than random": "↓",
    "": "",
}


class Comparison:
    """A finished comparison.

    Attributes
    ----------
    record : everything, as ``comparison.json`` holds it: ``methods``, ``metrics``, ``scores`` and ``verdicts`` by
        method and metric, ``differences`` by metric.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = json.loads(to_json(record))

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """One that was written before.

        Raises
        ------
        UserError : the folder holds none.
        """
        record = read_json(Path(folder) / "comparison.json")
        if not isinstance(record, dict) or record.get("format_version") != 1 or "scores" not in record:
            raise UserError(f"{folder} holds no comparison of format 1")
        return cls(record)

    @property
    def methods(self) -> list[str]:
        """Rows that were measured, in order."""
        return [m["name"] for m in self.record["methods"] if not m["reason"]]

    @property
    def left_out(self) -> dict[str, str]:
        """Rows that were not, and why."""
        return {m["name"]: m["reason"] for m in self.record["methods"] if m["reason"]}

    @property
    def metrics(self) -> list[str]:
        return [m["name"] for m in self.record["metrics"]]

    def score(self, method: str, metric: str) -> dict[str, Any] | None:
        """A score record, or None where the method has none."""
        return self.record["scores"].get(method, {}).get(metric)

    def mark(self, method: str, metric: str) -> str:
        """The verdict against random of a score, "" where there is none."""
        return self.record["verdicts"].get(method, {}).get(metric, {}).get("mark", "")

    def cell(self, method: str, metric: str) -> str:
        """``value (low .. high)`` with ``≈`` for "not distinguishable from random" and ``↓`` for worse."""
        return f"{value_text(self.score(method, metric))} {SYMBOLS[self.mark(method, metric)]}".rstrip()

    def to_csv(self) -> str:
        """One line per method and metric, with its baselines in columns of their own."""
        scores = [(name, self.score(name, metric)) for name in self.methods for metric in self.metrics]
        given = [(name, score) for name, score in scores if score is not None]
        baselines = list(dict.fromkeys(b for _, score in given for b in score["baselines"]))
        fields = ["method", "metric", "value", "low", "high", "n", "seeds", "higher_is_better", "mark"]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*fields, *(f"baseline {name}" for name in baselines)])
        for name, score in given:
            own = [
                name,
                *(_plain(score[f]) for f in ("metric", "value", "low", "high", "n", "seeds", "higher_is_better")),
            ]
            baseline_values = [_plain(score["baselines"].get(b)) for b in baselines]
            writer.writerow([harmless(own[0]), *own[1:], self.mark(name, score["metric"]), *baseline_values])
        return buffer.getvalue()

    def kind(self, name: str) -> str:
        """Kind of a row: "method", "control" or "foreign"."""
        return next(m["kind"] for m in self.record["methods"] if m["name"] == name)

    def reads(self, name: str) -> str:
        """How a row reads the layer: "rows", "pooled" or "maps"."""
        return next(m["reads"] for m in self.record["methods"] if m["name"] == name)

    def pairs(self, metric: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Differences in both directions, by (row, column)."""
        found = {}
        for one in self.record["differences"].get(metric, []):
            found[one["a"], one["b"]] = one
            back = _OPPOSITE.get(one["verdict"], one["verdict"])
            low, high = (None if end is None else -end for end in (one["high"], one["low"]))
            found[one["b"], one["a"]] = {"value": -one["value"], "low": low, "high": high, "verdict": back}
        return found


_OPPOSITE = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}


def _plain(value: Any) -> Any:
    return "" if value is None else value
