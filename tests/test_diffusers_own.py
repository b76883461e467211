"""The script that runs diffusers' own tests under a patch: what it compares, what it writes, and where it patches."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_accel import unpatch
from diffusers_accel.families.ltx import LTX
from diffusers_accel.families.wan import WAN
from tests.diffusers_own import diffusers_own_plugin as plugin
from tests.diffusers_own import page, runs
from tests.tiny import tiny_wan, tiny_wan_transformer


def lines(**outcomes: str) -> dict[str, dict[str, str]]:
    return {
        f"tests/test_a.py::{test}": {"outcome": outcome, "why": f"{test}\nand more", "attention": "2"}
        for test, outcome in outcomes.items()
    }


def test_a_test_counts_where_it_ran_in_both_and_against_us_where_it_passed_before() -> None:
    done = runs.Comparison("wan", "lora", ["tests/test_a.py"])
    stock = lines(good="passed", ours="passed", theirs="failed", both="failed", left="skipped", late="passed")
    dense = lines(good="passed", ours="failed", theirs="passed", both="failed", left="skipped")
    runs._compare(done, stock, dense)
    assert (done.tests, done.passed, done.failed_unpatched, done.attention) == (4, 1, 2, 8)
    assert done.failed_patched == {"tests/test_a.py::ours": "ours\nand more"}
    text = page.written([done], "1.2.3")
    assert "| wan | lora | 4 | 1 | 2 | 1 | 8 |" in text and "wan: `ours`" in text and "1.2.3" in text
    assert "- 1 x `both and more`" in text and "- 1 x `theirs and more`" in text and "stopped" not in text
    done.finished = False
    assert "| wan | lora \\* | 4 |" in page.written([done], "1.2.3")


def test_a_skip_under_the_patch_alone_is_no_pass() -> None:
    done = runs.Comparison("wan", "lora", ["tests/test_a.py"])
    runs._compare(done, lines(a="passed"), lines(a="skipped"))
    assert done.failed_patched and done.passed == 0


def test_files_are_found_by_the_class_that_they_name(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "pipelines" / "wan"
    folder.mkdir(parents=True)
    (folder / "test_wan.py").write_text("from diffusers import WanTransformer3DModel\n", encoding="utf-8")
    (folder / "test_other.py").write_text("from diffusers import MyWanTransformer3DModels\n", encoding="utf-8")
    (folder / "helper.py").write_text("WanTransformer3DModel\n", encoding="utf-8")
    (tmp_path / "setup.py").write_text('setup(\n    version="9.8.7",  # as theirs\n)\n', encoding="utf-8")
    assert runs.files_about(tmp_path, WAN, "pipelines") == ["tests/pipelines/wan/test_wan.py"]
    assert runs.files_about(tmp_path, LTX, "pipelines") == [] and runs.version_of(tmp_path) == "9.8.7"
    with pytest.raises(SystemExit, match="found none_such"):
        runs.chosen(["wan", "none_such"])
    done = runs.compared(tmp_path, tmp_path / "results", tmp_path, LTX, "pipelines", 1.0)
    text = page.written([done], "9.8.7")
    assert "- pipelines (`tests/pipelines`): `ltx`\n" in text and "- not run, lora: allegro, anyflow," in text
    assert "no tests of diffusers name" in page.line(done) and runs.kept(tmp_path / "results") == [done]
    assert json.loads((tmp_path / "results" / "ltx.pipelines.json").read_text(encoding="utf-8"))["files"] == []


@pytest.mark.parametrize("make", [tiny_wan, tiny_wan_transformer])
def test_what_a_test_builds_is_patched(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines where they take their components, models where they are made; no class is changed here."""
    seams: list[tuple[type, str, Callable[[Any], object]]] = []
    monkeypatch.setattr(plugin, "_after", lambda *seam: seams.append(seam))
    (plugin._patch_pipelines if make is tiny_wan else plugin._patch_models)()
    made = make()
    for owner, method, do in seams:
        assert callable(vars(owner)[method])
        if isinstance(made, owner):
            do(made)
            do(made)  # as where two pipelines share a transformer
    unpatch(made)


def test_what_follows_a_method_leaves_its_signature() -> None:
    class Model:
        def __init__(self, layers: int = 3) -> None:
            self.layers = layers

    before, seen = inspect.signature(Model.__init__), []
    plugin._after(Model, "__init__", lambda model: seen.append(model.layers))
    assert Model(layers=5).layers == 5 and seen == [5] and inspect.signature(Model.__init__) == before


def test_each_file_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SECONDS, "10")
    monkeypatch.setattr(plugin, "_SHARE", {})
    clock = iter([0.0, 4.0, 6.0, 6.0, 10.0])  # twice where a file begins
    monkeypatch.setattr(plugin, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    first, second = (SimpleNamespace(path=Path(name)) for name in ("a", "b"))
    plugin.pytest_collection_finish(SimpleNamespace(items=[first, first, second]))
    plugin.pytest_runtest_setup(first)
    with pytest.raises(pytest.skip.Exception, match=plugin.OVER):
        plugin.pytest_runtest_setup(first)
    plugin.pytest_runtest_setup(second)
    said: list[str] = []
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=said.append))
    assert said == [plugin.OVER]


def test_a_mask_of_padding_is_resized_without_torchvision() -> None:
    module = SimpleNamespace()
    plugin._without_torchvision(module)
    resize, nearest = module.transforms.functional.resize, module.transforms.InterpolationMode.NEAREST
    mask = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert torch.equal(resize(mask, [4, 2], interpolation=nearest)[0, 0, :, 0], torch.tensor([0.0, 0.0, 2.0, 2.0]))
    there = SimpleNamespace(transforms="torchvision's")
    plugin._without_torchvision(there)
    assert there.transforms == "torchvision's"
