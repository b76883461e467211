"""Texts of users on a terminal, in Markdown and in HTML: shown, and never obeyed."""

from __future__ import annotations

import io
import re
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from diffusers_accel import cli
from diffusers_accel.cli import loading
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.files.errors import JOINERS
from diffusers_accel.methods import Band, Method
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from tests.campaign.hostile import HALF, TEXTS
from tests.campaign.tally import Campaign
from tests.campaign.tiny_runs import CALL, CANDIDATES, MODELS, every_kind, reading_wan
from tests.campaign.verdict import outcome

STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich itself writes: colours, the cursor of a progress bar


def steers(shown: str, own: bool = False) -> list[str]:
    """Characters of a terminal's output that are no text; `own`: rich's own may be there."""
    text = STEERING.sub("", shown) if own else shown
    allowed = JOINERS + ("\n\r" if own else "\n")
    return sorted(
        {
            repr(each)
            for each in text
            if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") and each not in allowed
        }
    )


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes: all of them once, and, outside of charts, one by one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.kinds: set[tuple[str, ...]] = set()
        self.outside: list[tuple[str, ...]] = []  # how many marks a chart has depends on its numbers
        self._charts = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, *sorted(name for name, _ in attrs))
        self._charts += tag == "svg"
        self.kinds.add(element)
        self.outside += [element] * (not self._charts)

    def handle_endtag(self, tag: str) -> None:
        self._charts -= tag == "svg"


def structure(text: str) -> list[str]:
    """The blocks of a Markdown page: headings, tables, rows, cells, lists; and its inline elements."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found = [token.type for token in tokens]
    return found + [
        child.type
        for token in tokens
        for child in token.children or ()
        if child.type not in ("text", "text_special", "softbreak")
    ]


def named(name: str) -> Plan:
    """A plan that says the name wherever a plan can hold text."""
    return Plan(
        "wan",
        dict(MODELS),
        every_kind().methods,
        every_kind().spans,
        {"kind": "density", "value": 0.5, "note": name},
        {"prompts": [name], name: {"model": name}},
        every_kind().tensors,
    )


def command(*arguments: str) -> tuple[object, str, str]:
    """Exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code, out.getvalue(), err.getvalue()


def test_plan_show(tmp_path: Path, campaign: Campaign) -> None:
    path = tmp_path / "plan.json"
    named("usual").save(path)
    usual = command("plan", "show", str(path))[1]
    for text in TEXTS:
        named(text).save(path)
        assert Plan.load(path).provenance["prompts"] == [text]
        code, shown, said = command("plan", "show", str(path))
        assert not code and not said, (text, said)
        assert not steers(shown), (text, steers(shown))
        assert len(shown.splitlines()) == len(usual.splitlines()), f"no text is more than a line: {text!r}"
        assert max(map(len, shown.splitlines())) < 5000
        campaign.count("hostile texts: plan show", "tried")
        campaign.count("hostile texts: plan show", "as before")


def test_plan_diff_and_card(tmp_path: Path, campaign: Campaign) -> None:
    usual, path = tmp_path / "usual.json", tmp_path / "plan.json"
    named("usual").save(usual)
    named("other").save(path)
    blocks = structure(command("plan", "card", str(path))[1])
    for text in TEXTS:
        named(text).save(path)
        code, shown, said = command("plan", "diff", str(usual), str(path))
        assert not code and not said and not steers(shown), (text, said, steers(shown))
        code, shown, said = command("plan", "card", str(path))
        assert not code and not said and not steers(shown), (text, said, steers(shown))
        assert structure(shown) == blocks, text
        campaign.count("hostile texts: plan diff, plan card", "tried")
        campaign.count("hostile texts: plan diff, plan card", "as before")


def test_arguments(folder: Path, campaign: Campaign) -> None:
    """A message quotes what it was given, and steers nothing."""
    for text in TEXTS:
        for arguments in (
            ("plan", "show", text),
            ("search", text, "--out", f"{text}.json"),
            ("report", "toy", "--plan", text),
            ("search", "toy", "--out", "plan.json", "--prompts", text),
        ):
            code, shown, said = command(*arguments)
            assert code, arguments
            assert "Traceback" not in said and not shown and not steers(said), (arguments[0], text, said[:500])
            campaign.count("hostile texts: arguments", "tried")
            campaign.count("hostile texts: arguments", "refused")


def test_half_a_character_is_refused_before_the_work(folder: Path, campaign: Campaign) -> None:
    """No UTF-8 can hold it: neither a plan nor a report could be saved after the work."""
    pipe = reading_wan()
    pipe.transformer.forward = None  # nothing may be generated
    calls = (
        lambda: named(HALF),
        lambda: plan_search.search_plan(
            pipe, [HALF, "x"], call=CALL, budget=Budget.density(0.5), candidates=CANDIDATES, progress=False
        ),
        lambda: compare(pipe, {"p": "pattern"}, [HALF], call=CALL, metrics=(), progress=False),
        lambda: compare(pipe, {HALF: "pattern"}, ["x"], call=CALL, metrics=(), progress=False),
    )
    for number, call in enumerate(calls):
        found = outcome(call)
        assert found.refused, (number, found)
        campaign.count("hostile texts: half characters", "tried")
        campaign.count("hostile texts: half characters", "refused")


def report_of(names: list[str], prompts: list[str], folder: Path) -> Path:
    """The folder of a real report, whose progress bar was on a terminal."""
    subjects = {name: Method(select=Band(0.3 + 0.3 * number)) for number, name in enumerate(names)}
    call, terminal = {**CALL, "num_inference_steps": 1}, io.StringIO()
    with redirect_stderr(terminal):
        found = compare(reading_wan(), subjects, prompts, call=call, metrics=("psnr",), show=1)
    assert "dense" in terminal.getvalue(), "the bar was shown"
    for shown in (terminal.getvalue(), str(found)):
        assert not steers(shown, own=True), (names, prompts, steers(shown, own=True))
    found.save(folder)
    rows = read_rows(folder / "report.json")
    assert {row.clip["prompt"] for row in rows if row.clip} == set(prompts)
    assert {row.subject for row in rows} == {"dense", "floor", *names}
    return folder


def test_report(folder: Path, campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page with hostile names and prompts has the elements of one with usual names, and no other."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    plain = report_of(["first", "second"], ["one prompt", "another"], folder / "usual")
    page, text = Tags((plain / "report.html").read_text()), structure((plain / "report.md").read_text())
    texts = campaign.random("hostile").sample(TEXTS, len(TEXTS))
    for start in range(campaign.many(1, len(TEXTS))):
        four = [texts[(start + place) % len(TEXTS)] for place in (0, 7, 13, 19)]
        hostile = report_of([f"{name} {place}" for place, name in enumerate(four[:2])], four[2:], folder / "hostile")
        found, said = Tags((hostile / "report.html").read_text()), (hostile / "report.md").read_text()
        assert found.kinds <= page.kinds and found.outside == page.outside, four
        assert structure(said) == text and not steers(said), (four, steers(said))
        campaign.count("hostile texts: report", "tried", 4)
        campaign.count("hostile texts: report", "as before", 4)


def test_commands(folder: Path, campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole search by the command line with hostile prompts."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *args, **kwargs: reading_wan())
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.02)
    random = campaign.random("hostile commands")
    texts = random.sample([text for text in TEXTS if "\x00" not in text], 2)
    (folder / "prompts.txt").write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
    options = [
        "--density",
        "0.6",
        "--methods",
        "pattern",
        "--height",
        "32",
        "--width",
        "32",
        "--frames",
        "5",
        "--steps",
        "2",
        "--force",  # plans for two blocks of tokens are slower than dense attention, and asked for all the same
    ]
    name = "[b]plan[/b].json"
    code, shown, said = command("search", "tiny", "--out", name, "--prompts", "prompts.txt", *options)
    assert not code, said
    assert name in shown.replace("\n", "") and not steers(shown) and not steers(said, own=True)
    assert Plan.load(folder / name).provenance["prompts"]
    campaign.count("hostile texts: commands", "tried", 2)
    campaign.count("hostile texts: commands", "as before", 2)
