"""The report's files: what they say, that they need nothing else, and that a failure leaves none of them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from diffusers_accel.evals.measurement import Measurement, Spread, read_rows
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report import Subject, charts, check_report_folder, pair_table, render, words
from diffusers_accel.evals.report.colours import method_colours
from diffusers_accel.evals.report.video import GAIN, difference_pixels, encode, pixels
from diffusers_accel.files import WriteError, printable
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import (
    AxisOrder,
    Band,
    Draft,
    Drop,
    Kept,
    Method,
    Patches,
    Pooled,
    Radial,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from diffusers_accel.plan import Plan
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.markdown import as_markdown_text
from tests.evals import synthetic

# What would be a tag, math, a cell's end, a heading, a style, code, a link, another direction, or a command of a terminal.
NAME = """<script>alert('$x$')</script> | $\\frac plan\n\n# [b]b[/b] `c` *d* [e](f) \u202e \x1b[31m" onload="g"""
PROMPT = NAME.replace("plan", "a sign says [/b]") + "\n| <img src=x onerror=alert(1)>\n---\n- h ~~i~~ &lt; _j_"


class Page(HTMLParser):
    """Tags, ids and addresses of a page; complains about what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "link", "input", "br"}:
            self.open.append(tag)
        for name, value in attributes:
            self.attributes[name] = self.attributes.get(name, "") + (value or "")
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "action", "poster", "srcset", "data"}:
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag in self.open:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report() -> Any:
    ratios = {NAME: [1.4, 1.5, 1.45], "second": [0.8, 0.9, 0.85]}
    return synthetic.report(ratios, lpips="not measured: no weights", prompt=PROMPT)


@pytest.fixture(scope="module")
def folder(report: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert report.save(folder / "new") == folder / "new" / "report.html"
    return folder / "new"


def test_saves_three_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]


def test_json_has_every_row(report: Any, folder: Path) -> None:
    assert read_rows(folder / "report.json") == report.rows
    assert json.loads((folder / "report.json").read_text())["headline"] == report.headline


def test_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert not re.search(r"https?://|//\w+\.\w|@import|url\((?!#)", text)


def test_hostile_texts_are_shown_as_they_are_on_the_page(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags and page.tags.count("h1") == 1
    known = {"data-mp4", "data-fps", "data-action"}
    assert all(name in known or not name.startswith(("on", "data-")) for name in page.attributes)
    assert {"aria-label"} == {name for name, value in page.attributes.items() if "alert" in value}
    shown = "".join(page.text)
    assert printable(NAME) in shown and printable(PROMPT) in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e]", text)


def test_hostile_texts_are_shown_as_they_are_in_markdown(report: Any, folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "<script" not in text and "\x1b" not in text
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2", "h2", "h2"]
    inline = [each for token in tokens for each in token.children or []]
    assert {each.type for each in inline} <= {"text", "text_special"}
    shown = ["".join(each.content for each in token.children or []) for token in tokens if token.type == "inline"]
    assert shown.count(printable(NAME)) == 1 + 3  # in the table, and once for each clip
    assert shown.count(printable(PROMPT)) == 3 * 2
    assert any(cell.startswith(f"{printable(NAME)} ran 1.45x") for cell in shown)
    assert not any(token.type in ("hr", "fence", "code_block", "html_block") for token in tokens)


def test_hostile_texts_are_shown_as_they_are_on_a_terminal(report: Any) -> None:
    console = Console(width=400, file=io.StringIO(), force_terminal=True)
    console.print(report.table())
    assert printable(NAME) in re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert len(report.headline.splitlines()) == 2 and report.headline.startswith(f"{printable(NAME)} ran")
    assert "\x1b" not in report.headline + str(report) and "[b]b[/b]" in report.headline


@pytest.mark.parametrize(
    "name", ["_hidden", "$\\frac", '#000001 id="x" xmlns="y"', "\u6f22\u5b57", "<metadata>a</metadata>"]
)
def test_charts_show_any_name(name: str) -> None:
    report = synthetic.report({name: [1.4, 1.5]})
    drawn = [*charts.quality_speed(report), *charts.density_per_layer(report)]
    assert len(drawn) == 4
    for svg in drawn:
        page = Page(svg)
        assert page.open == [] and name in [text.removeprefix("\u200b") for text in page.text]


@pytest.mark.filterwarnings("error")
def test_a_long_name_leaves_room_for_the_chart() -> None:
    report = synthetic.report({"a long name " * 8: [1.4, 1.5], "m" * 90: [1.2, 1.3], "\u6f22" * 90: [1.1, 1.2]})
    for svg in [*charts.quality_speed(report), *charts.density_per_layer(report)]:
        assert "a long name a long name a l…" in Page(svg).text


def test_page_refers_only_to_ids_it_has(folder: Path) -> None:
    page = Page(text := (folder / "report.html").read_text())
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-labelledby="([^"]+)"', text))
    names = {name for groups in used for name in groups if name}
    assert names and names <= set(page.ids)


def test_page_shows_plan_and_clips(report: Any, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    # Two clips with media, each dense and two subjects with their differences.
    assert text.count("data-mp4=") == 2 * 5
    # Two subjects x two spans x 3 layers x 6 heads.
    assert len(re.findall(r"<title>layer \d+, head \d+: ", text)) == 2 * 2 * 3 * 6
    assert "<title>layer 2, head 4: band hwf 0.25</title>" in text


def test_markdown_tables_are_whole(folder: Path) -> None:
    lines = (folder / "report.md").read_text().splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
    # Headings, rule, dense and two subjects; those of the one pair by speed and by PSNR; those of each clip.
    parts = cells[:5], cells[5:9], cells[9:]
    assert all(len({len(row) for row in part}) == 1 for part in parts)
    assert len(parts[2]) == 2 + 3 * 2


def test_missing_metric_says_why(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "LPIPS not measured" in text
    assert ", second: LPIPS: not measured: no weights." in text


@pytest.mark.parametrize(
    ("ratios", "prompts", "drift", "expected", "says"),
    [
        (
            [1.4, 1.5, 1.45] * 3,
            9,
            0.01,
            True,
            "ran 1.45x as fast as dense, end to end (geometric mean of 9 clips, 95 % interval 1.42 to 1.48 by t over 9 prompts;",
        ),
        ([0.8, 0.9, 0.85] * 3, 9, 0.01, False, "was NOT faster than dense: 0.85x, end to end ("),
        ([0.9, 1.2, 1.1] * 3, 9, 0.01, None, "not measurably faster or slower than dense: 1.06x, end to end, within"),
        ([1.03, 1.04, 1.05] * 3, 9, 0.06, None, "not measurably faster or slower"),
        (
            [1.4, 1.5, 1.45] * 3,
            3,
            0.01,
            None,
            "ran 1.45x as fast as dense, end to end on these 9 clips (geometric mean of 9 clips ± 0.04, too few clips to tell;",
        ),
        ([0.8, 0.9], 1, 0.01, None, "was NOT faster than dense: 0.85x, end to end on these 2 clips"),
        ([1.4], 1, 0.01, None, "ran 1.40x as fast as dense, end to end on this clip (one clip, too few clips to tell;"),
        ([1.4, 1.6], 1, 0.2, None, "too few clips to tell, while dense itself drifted by 20%, so times are rough"),
        ([0.9, 1.4], 1, 0.01, None, "not measurably faster or slower than dense: 1.12x, end to end on these 2 clips"),
    ],
    ids=[
        "faster",
        "slower",
        "interval includes 1",
        "within the drift of dense",
        "many clips of three prompts",
        "two clips slower",
        "one clip",
        "unsteady",
        "two clips disagree",
    ],
)
def test_headline_is_honest(ratios: list[float], prompts: int, drift: float, expected: bool | None, says: str) -> None:
    report = synthetic.report({"plan": ratios}, drift=drift, prompts=prompts)
    assert words.faster(report, "plan") is expected
    assert says in report.headline
    assert "PSNR 27.50 ± 1.25 dB" in report.headline
    text = render.markdown(report)
    assert ("[" in text) == ("95 % interval of the mean" in text) == (prompts >= 8)
    assert (words.TOO_FEW in text) == (words.TOO_FEW in str(report)) == (prompts < 8)


def test_the_worst_clip_is_named_and_comes_first() -> None:
    """In these reports the PSNR of a clip is 27 dB and its seed: seed 0 is the worst."""
    report = synthetic.report({"plan": [1.4, 1.5], "second": [1.1, 1.3]}, prompt="a ball")
    assert "; worst Frame-mean PSNR 27.00 in “a ball” seed 0." in report.headline
    upside_down = replace(report, clips=report.clips[::-1])
    table = render.markdown(upside_down).split("The worst clip comes first.")[1]
    assert re.findall(r"\| a ball \| (\d) \|", table) == ["0", "0", "1", "1"]
    assert "worst" not in synthetic.report({"plan": [1.4]}).headline


def test_subjects_stand_against_each_other() -> None:
    few = synthetic.report({"one": [1.4, 1.5], "two": [1.0, 1.0], "three": [1.0, 1.5]}, prompt="a ball")
    found = {line[:2]: line[2:] for line in pair_table.lines(few)}
    assert len(found) == 3 * 2 and all(line[3] == words.TOO_FEW for line in found.values())
    assert found["one against two", "speed"] == ("1.45x", "1.45x", "0.07", words.TOO_FEW, "1.40x in “a ball” seed 0")
    assert found["one against three", "speed"][4] == "1.00x in “a ball” seed 1"
    assert found["one against two", "Frame-mean PSNR"][:3] == ("+0.00 dB", "+0.00 dB", "0.00")
    many = synthetic.report({"one": [1.4, 1.5] * 4, "two": [1.0] * 8}, prompts=8)
    interval = pair_table.lines(many)[0][5]
    assert re.fullmatch(r"1\.4\d to 1\.[45]\d \(t over 8 prompts\)", interval)
    assert all("Subjects against each other" in text for text in (render.markdown(many), render.html(many)))
    assert "Subjects against each other" not in render.markdown(synthetic.report({"one": [1.4, 1.5]}))


SIMULATED = "quantized products are simulated on a CPU: their numbers, not their speed"


@pytest.fixture(scope="module")
def all_named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each file of a report on every named method, as the demo makes it."""
    names = ["searched plan", *(name for name in FOR_EVERY_MODEL if name != "dense")]
    report = synthetic.report({name: [1.3, 1.4] for name in names}, notes={"reordered": SIMULATED})
    folder = tmp_path_factory.mktemp("named") / "report"
    report.save(folder)
    return {path.suffix: path.read_text() for path in folder.iterdir()} | {"headline": report.headline}


def test_what_a_patch_noted_is_said_of_its_subject(all_named: dict[str, str]) -> None:
    for text in (all_named[".html"], all_named[".md"], json.loads(all_named[".json"])["headline"]):
        assert len(re.findall(f"Note: {SIMULATED}\\.", text)) == 1
        assert re.search(f"reordered ran 1.35x as fast as dense[^\n]*Note: {SIMULATED}", text)
    assert len(all_named["headline"].splitlines()) == 5


def test_page_of_all_named_methods(all_named: dict[str, str]) -> None:
    page = Page(text := all_named[".html"])
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert text.count('<div class="films stacked">') == 2 and text.count('<div class="stack">') == 2 * 6
    assert text.count("data-mp4=") == 2 * (1 + 2 * 5)
    assert "draft 8x16 0.25, cached 3" in text and "mean density asked for 0.50" in text
    ran = "Attention ran in cpu (75% of the calls), dense (25% of the calls); 50% of heads x calls merged a kept part"
    assert text.count(ran) == 5


def test_methods_have_one_colour_on_the_whole_page(all_named: dict[str, str]) -> None:
    found: dict[str, set[str]] = {}
    for fill, label in re.findall(r'fill="([^"]+)"><title>layer \d+, head \d+: ([^<]+)</title>', all_named[".html"]):
        found.setdefault(label, set()).add(fill)
    assert all(len(fills) == 1 for fills in found.values())
    assert len({fill for fills in found.values() for fill in fills}) == len(found) >= 8


def test_failure_leaves_nothing(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(render, "html", fail)
    with pytest.raises(RuntimeError, match="no page"):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_replaces_an_older_report_as_a_whole(report: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.html").write_text("old")
    report.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    assert (folder / "report.html").read_text() != "old" and list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_written_is_refused_before_and_at_saving(report: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    for path, says in (
        (tmp_path, r"holds other files \(mine.txt\); name a folder of its own"),
        (tmp_path / "mine.txt", "there is a file of that name"),
        (tmp_path / "mine.txt" / "report", "there is a file of that name"),
    ):
        for refuse in (check_report_folder, report.save):
            with pytest.raises(WriteError, match=says):
                refuse(path)
    check_report_folder(tmp_path / "new" / "report")
    assert (tmp_path / "mine.txt").read_text() == "kept" and not (tmp_path / "new" / "report").exists()


def test_terminal_table_has_a_column_per_subject(report: Any) -> None:
    table = report.table()
    assert (len(table.columns), table.row_count) == (1 + 3, len(words.headings(report)) - 1)
    assert "1.45x ± 0.05" in str(report)
    assert "300 ms (40%)" in str(report)


def decode(film: bytes, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    path.write_bytes(film)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]) / 255, meta


def test_film_shows_the_frames(tmp_path: Path) -> None:
    frames = synthetic.frames(0, count=5, side=32)
    frames[:, :, :, :] = frames.mean(axis=(1, 2), keepdims=True) * 0.5 + 0.25  # flat colours survive H.264
    film, meta = decode(encode(pixels(frames), 8), tmp_path / "a.mp4")
    assert meta["fps"] == 8 and meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]
    assert film.shape == (5, 256, 256, 3)  # enlarged 8 times
    # 8-bit limited-range YUV rounds to about 1/219 a channel; twice that for two conversions.
    assert np.abs(film - frames.repeat(8, 1).repeat(8, 2)).max() < 0.04


def test_odd_sizes_and_nan_are_encoded(tmp_path: Path) -> None:
    frames = np.full((2, 301, 299, 3), np.nan, np.float32)
    film, _ = decode(encode(pixels(frames), 8), tmp_path / "a.mp4")
    assert film.shape == (2, 300, 298, 3) and film.max() < 0.04


def test_difference_is_amplified(tmp_path: Path) -> None:
    a = np.full((2, 256, 256, 3), 0.5, np.float32)
    film, _ = decode(encode(difference_pixels(a, a - 0.1), 8), tmp_path / "a.mp4")
    assert np.abs(film - 0.1 * GAIN).max() < 0.04


def many_methods() -> list[Method]:
    """More kinds than there are hues, most at two densities."""
    methods = [Method(), Method(precision="int8"), Method(select=Skip()), Method(select=Draft(density=None, top_p=0.9))]
    for density in (0.25, 0.5):
        selects = (Band(density), Stripe(density), Stripe(density, calibrated=True), Draft(density), Stored(density))
        methods += [Method(select=select) for select in selects]
        methods += [Method(order=AxisOrder("hwf"), select=select) for select in (Band(density), Stored(density))]
        methods += [
            Method(Patches(), Draft(density), precision, rest)
            for precision in ("input", "int8")
            for rest in (Drop(), Kept(), Pooled())
        ]
    return methods


def test_colours_tell_methods_apart() -> None:
    methods = many_methods()
    colours = method_colours(methods)
    assert len({colour.fill for colour in colours.values()}) == len(set(methods)) == len(methods)

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in colours.values():
        dark, light = sorted((luminance(colour.fill), luminance(colour.ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA for small text
    # Deeper for the higher density, within one kind.
    for kind in (Band, Stripe, Draft):
        assert luminance(colours[Method(select=kind(0.5))].fill) < luminance(colours[Method(select=kind(0.25))].fill)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(), 1.0),
        (Method(precision="int8"), 1.0),
        (Method(select=Skip()), 0.0),
        (Method(select=Draft(0.25)), 0.25),
        (Method(select=Draft(density=None, top_p=0.9)), None),
        (Method(select=Draft(0.25), rest=Kept(3)), 0.5),  # a third of the steps dense
        (Method(select=Draft(0.25), rest=Kept(gated=True)), None),
        (Method(select=Draft(0.25), rest=Pooled()), 0.25),
    ],
)
def test_density_that_a_method_asks_for(method: Method, expected: float | None) -> None:
    assert method.expected_density() == method.expected_density(TokenLayout(3, 16, 16)) == expected


def test_a_report_knows_the_density_that_follows_from_the_size() -> None:
    method = Method(select=Radial(0.2))
    plan = Plan.uniform(method, "wan", {"transformer": ModelShape(1, 2, 64)})
    report = synthetic.report({"radial": [1.2, 1.3]})
    sized = {**report.provenance, "tokens": {"frames": 33, "height": 8, "width": 16, "text": 0}}
    density = method.expected_density(TokenLayout(33, 8, 16))
    assert density is not None
    for provenance, shown in ((sized, True), ({**sized, "tokens": "many"}, False)):
        page = render.html(replace(report, subjects=(Subject("radial", plan, ()),), provenance=provenance))
        assert (f"density {density:.2f}, " in page) == (f"asked for {density:.2f}" in page) == shown


def drawn(monkeypatch: pytest.MonkeyPatch, report: Any) -> dict[str, Any]:
    """The axes of its charts by their names, as they are when they are saved."""
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}

    def svg(name: str, description: str, draw: Any, inches: Any) -> str:
        axes = Figure().add_subplot()
        draw(axes)
        found[name] = axes
        return ""

    with monkeypatch.context() as patched:
        patched.setattr(charts, "_svg", svg)
        charts.quality_speed(report)
        charts.density_per_layer(report)
    return found


@pytest.mark.parametrize("floor", [None, 29.5, 128.0])
def test_axes_stay_within_what_can_be(floor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSIM ends at 1, which is also where its floor is drawn; what lies at the end of a range is drawn whole."""
    report = synthetic.report({"a": [0.05, 3.5]}, floor=floor)
    high = {"ssim": 1.0, "lpips": 0.0005, "psnr": 0.2}
    rows = [
        replace(row, value=high[row.metric]) if row.subject == "a" and row.metric in high else row
        for row in report.rows
    ]
    rows = [replace(row, value=0.9999) if (row.metric, row.subject) == ("ssim", "floor") else row for row in rows]
    axes = drawn(monkeypatch, replace(report, rows=tuple(rows)))
    assert len(axes) == 4
    for name in high:
        least, most = METRICS[name].limits
        low, top = axes[f"quality-{name}"].get_ylim()
        assert least <= low < top <= most and low <= high[name] <= top, name
        assert axes[f"quality-{name}"].get_xlim()[0] >= 0
        marks = [line for line in axes[f"quality-{name}"].lines if line.get_marker() == "o"]
        assert marks and not any(line.get_clip_on() for line in marks)
    assert axes["quality-ssim"].get_ylim()[1] == 1
    assert axes["density-transformer"].get_ylim() == (0, 1)
    if floor:
        (said,) = [text for text in axes["quality-ssim"].texts if text.get_text().startswith("floor")]
        assert said.get_va() == "top", "there is no room above it"


def test_the_distance_from_the_floor_has_its_interval_where_there_is_one() -> None:
    report = synthetic.report({"a": [1.4] * 9}, prompts=9, floor=29.5)

    def said(value: float, spread: Spread) -> str:
        row = Measurement("psnr_from_floor", value, "dB", "lower", "a", "floor", report.provenance, spread)
        found = replace(report, rows=(*report.rows, row))
        text = words.quality(found, METRICS["psnr"], "a")
        assert (
            text in found.headline and text in render.html(found) and as_markdown_text(text) in render.markdown(found)
        )
        return text

    assert said(2.0, Spread(9, 0.5, 1.5, 2.5, 2.0, 9)).endswith("(2.00 worse than the floor [1.50 to 2.50])")
    assert said(-2.0, Spread(9, 0.5, -2.75, -1.25, 2.0, 9)).endswith("(2.00 better than the floor [1.25 to 2.75])")
    unclear = said(0.3, Spread(9, 0.5, -0.2, 0.8, 0.3, 9))
    assert unclear.endswith("(0.30 worse than the floor [-0.20 to 0.80], not told apart from it)")
    assert said(2.0, Spread(3, 0.5)).endswith("(2.00 worse than the floor)")
