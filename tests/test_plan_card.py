"""A plan's card: what the plan tells stands in it, what it does not tell is said to be missing, and no text of it is markup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from diffusers_accel.forwards import easycache
from diffusers_accel.methods import Band, Method
from diffusers_accel.plan import Plan, Span
from diffusers_accel.plan.card import card
from diffusers_accel.shape import ModelShape

TUNED = {"goal": "PSNR 32 dB", "met": True, "speedup": 1.92, "psnr": 33.25, "interval": [32.125, 34.5], "clips": 16}
TOLD = {
    "search": {
        "model": "Wan-AI/Wan2.1",
        "pipeline": "WanPipeline",
        "call": {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0},
    },
    "device": "AMD EPYC, 2 threads",
    "torch": "2.13.0",
    "layout": {"frames": 21, "height": 30, "width": 52, "text_tokens": 0},
    "prompts": ["a red circle", "a blue square"],
    "predicted": {"speedup": 2.0, "latents_error": 0.0123},
    "tuned": TUNED,
    "warnings": ["slower than *dense*"],
}


def plan(**provenance: Any) -> Plan:
    spans = (Span(0.0, 0.5, {"transformer": ("..",)}), Span(0.5, 1.0, {"transformer": (".a",)}))
    methods = {".": Method(), "a": Method(select=Band(0.5)), "z": Method(select=Band(0.125))}
    return Plan(
        "wan",
        {"transformer": ModelShape(1, 2, 16)},
        methods,
        spans,
        {"kind": "speedup", "value": 2},
        {**TOLD, **provenance},
        forwards=easycache(),
    )


def shown(text: str) -> str:
    """The text of a page, without its markup: cells of a row between "|"."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += ["\n"] * (token.type == "tr_open") + [child.content for child in token.children or ()]
        found += ["|"] * (token.type in ("td_close", "th_close"))
    return "".join(found)


def kinds(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child.type for token in tokens for child in token.children or ()]
    return [token.type for token in tokens] + [
        each for each in inline if each not in ("text", "text_special", "softbreak")
    ]


def test_a_card_says_what_the_plan_tells() -> None:
    text = shown(card(plan(), "wan.json"))
    for row in (
        "model|Wan-AI/Wan2.1|",
        "call|width 832, height 480, frames 81, steps 50, guidance 5|",
        "tokens|21 x 30 x 52 tokens|",
        "searched on|AMD EPYC, 2 threads|",
        "prompts of the search|2|",
        "asked for|kind speedup, value 2|",
        "predicted|2.00x|relative squared error of the final latents 0.012|none|",
        "measured|1.92x|PSNR 33.25 dB (95 % interval of the mean 32.12 to 34.5)|16|",
        "dense|75.0%|",
        "band 0.5|25.0%|",
    ):
        assert f"\n{row}" in text, row
    assert "The goal was PSNR 32 dB: met" in text and "Step cache: easycache 0.025, last residual." in text
    assert "The search warned: slower than *dense*" in text and "Mean density of the heads" in text
    assert "patch(pipe, 'wan.json')" in card(plan(), "wan.json")
    assert "band 0.125" not in text, "a method that no head takes"


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        ({**TUNED, "met": None, "interval": None}, ("(no interval)", "the clips cannot tell")),
        ({**TUNED, "met": False}, ("not met",)),
        ({**TUNED, "goal": "LPIPS 0.1", "lpips": 0.08}, ("PSNR 33.25 dB",)),
        (
            {"goal": "1.5x", "met": True, "speedup": 1.5, "lpips": 0.08, "interval": [0.07, 0.09], "clips": 8},
            ("LPIPS 0.08 (",),
        ),
        (None, ("measured|not told|not told|none|", "Nothing was measured on clips")),
        ({"speedup": "fast", "clips": True, "goal": 3}, ("measured|not told|not told|none|",)),
        ({**TUNED, "interval": ["a", 2]}, ("(no interval)",)),
    ],
)
def test_what_was_measured(tuned: Any, says: tuple[str, ...]) -> None:
    text = shown(card(plan(tuned=tuned), "wan.json"))
    assert all(each in text for each in says), text


def test_a_plan_that_tells_nothing() -> None:
    text = shown(card(replace(plan(), provenance={}, budget={}, forwards=None), "x.json"))
    assert (
        "predicted|not told|not told|none|" in text and "model|not told|" in text and "every step is computed" in text
    )


@pytest.mark.parametrize(
    "hostile",
    [
        "# heading",
        "<script>alert(1)</script>",
        "| a | b |",
        "[x](http://a)",
        "`code`",
        "*em* _em_ {0.__em__}",
        "a\n\n# b\n```\n",
        "\x1b[31m",
    ],
)
def test_no_text_of_a_plan_is_markup(hostile: str) -> None:
    def page(text: str) -> str:
        told = {
            "search": {"model": text, "pipeline": text, "call": {"width": text, text: text}},
            "device": text,
            "torch": text,
            "tuned": {**TUNED, "goal": text},
            "warnings": [text],
            "merged": {text: text},
        }
        return card(replace(plan(**told), family=text, budget={text: text}), f"{text}.json")

    assert kinds(page(hostile)) == kinds(page("usual"))
    assert all(each.isprintable() or each == "\n" for each in page(hostile))
    assert len(page("x" * 100_000)) < 110_000, "long texts are cut, but for the name of the file"
