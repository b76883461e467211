"""Branches and prompts whose calls have texts of unequal length, as Cosmos 3's: what is measured is added up over all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusers_accel.api import patch
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Stored, Stripe
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.scores import Scores
from tests.families.cosmos3 import COSMOS3, Characters

PROMPTS = ["a robot pours tea", "a robot pours tea into a cup of blue glass on a table by the window"]
CANDIDATES = (
    DENSE,
    Method(select=Band(0.4)),
    Method(select=Stripe(0.4, calibrated=True)),
    Method(AxisOrder("hwf"), Draft(0.4), rest=Kept(2)),
)


class AllCharacters(Characters):
    """One token for each character."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(character) % 128 for character in conversation[-1]["content"]])


@pytest.fixture
def pipe() -> Any:
    pipe = COSMOS3.pipe()
    pipe.text_tokenizer = AllCharacters()
    return pipe


def call() -> dict[str, Any]:
    given = COSMOS3.call()
    return {name: value for name, value in given.items() if name not in ("prompt", "generator", "output_type")}


def options(**overrides: Any) -> dict[str, Any]:
    usual = {"candidates": CANDIDATES, "rows": 64, "budget": Budget.density(0.75), "progress": False}
    return {"call": call(), **usual, **overrides}


def test_a_search_measures_all_and_its_plan_keeps_its_word(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, int]] = set()
    stock = RunProbe.measure

    def measure(probe: RunProbe, site: Any, call: Any, *rest: Any) -> None:
        seen.add((call.branch, call.layout.tokens - call.layout.queries))
        stock(probe, site, call, *rest)

    monkeypatch.setattr(RunProbe, "measure", measure)
    plan = search_plan(pipe, PROMPTS, scores_path=tmp_path / "s.safetensors", **options())
    assert len({text for branch, text in seen if branch == "cond"}) == 2, "two prompts"
    assert len({text for _, text in seen}) == 3, "and one for what is not wanted"
    scores = Scores.load(tmp_path / "s.safetensors")
    # Two branches and two prompts in each span that has a step; the first step of a span reuses nothing.
    assert sorted(set(scores.samples("transformer")[..., 1].ravel().tolist())) == [0, 4]
    assert len(scores.impacts) == len(scores.spans)
    with patch(pipe, plan) as patched:
        COSMOS3.run(pipe, COSMOS3.call(prompt=PROMPTS[0]))
        realised = patched.report().density
    assert realised == pytest.approx(plan.provenance["predicted"]["density"], abs=0.01)


def test_stored_masks_are_refused_there(pipe: Any) -> None:
    stored = (DENSE, Method(AxisOrder("hwf"), Stored(0.4)))
    with pytest.raises(RuntimeError, match="search without the method set of stored masks"):
        search_plan(pipe, PROMPTS, **options(candidates=stored))
