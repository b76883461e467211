"""What is left of attention's calls where only some steps run, and for how many steps each of them stands."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_accel.search.coverage import Coverage

SPANS = ((0.0, 0.5), (0.5, 1.0))


def test_all_steps_stand_for_themselves() -> None:
    found = Coverage.of(SPANS, ["transformer"] * 8, "transformer", range(8))
    whole = Coverage.whole(2)
    assert (found.computed == whole.computed).all() and (found.covers == whole.covers).all()


def test_a_computed_step_stands_for_those_that_follow_it() -> None:
    # Steps 0 1 2 3 | 4 5 6 7: 0 stands for 0 1, 2 for 2 3 4, 5 for 5 6, 7 for itself.
    found = Coverage.of(SPANS, ["transformer"] * 8, "transformer", (0, 2, 5, 7))
    assert found.computed.tolist() == [0.5, 0.5]
    assert found.covers.tolist() == [[1.0, 0.25], [0.0, 0.75]]
    assert found.covers.sum() * 4 == 8  # nothing is lost, nothing counts twice


def test_a_span_without_a_computed_step_is_covered_by_the_one_before() -> None:
    found = Coverage.of(((0.0, 0.25), (0.25, 0.75), (0.75, 1.0)), ["transformer"] * 4, "transformer", (0, 3))
    assert found.computed.tolist() == [1.0, 0.0, 1.0]
    assert found.covers.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(("name", "computed"), [("transformer", [1.0, 0.0]), ("transformer_2", [0.0, 2 / 3])])
def test_experts_cover_their_own_steps_only(name: str, computed: list[float]) -> None:
    transformers = ["transformer", *["transformer_2"] * 3]
    found = Coverage.of(((0.0, 0.25), (0.25, 1.0)), transformers, name, (0, 1, 3))
    assert found.computed == pytest.approx(computed)
    mine = np.array([1, 0] if name == "transformer" else [0, 1])
    assert found.covers.sum(0) == pytest.approx(mine)
