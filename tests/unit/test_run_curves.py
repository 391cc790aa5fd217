"""The picture of a run's curves, where Prometheus has not all of them; tests/operations draws a real run."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from benchmarks import run_curves


class Sparse:
    """A source of which some expressions have a curve, and the others none."""

    begin = 0.0

    def __init__(self, *known: str) -> None:
        self._known = known

    def curves(self, expression: str) -> list[run_curves.Curve]:
        """One curve of two points, if the expression names something known."""
        known = any(name in expression for name in self._known)
        return [run_curves.Curve({"set": "lfw", "phase": "data"}, [0.0, 60.0], [0.5, 0.6])] if known else []


@pytest.mark.parametrize("known", [(), ("partial_fc_loss",), ("partial_fc_loss", "verification_accuracy")])
def test_what_a_run_has_not_is_left_empty(known: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # matplotlib's word on a legend without names is a warning.
        run_curves.draw(Sparse(*known), "sparse", tmp_path / "curves.png")  # type: ignore[arg-type]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
