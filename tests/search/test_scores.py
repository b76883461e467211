"""The scores and cost files: exact round trips, strict reading, and a failed save leaves the old file."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from diffusers_accel.files import (
    FileError,
    checksum,
    documents,
    load_tensor_document,
    read_tensor_file,
    save_tensor_document,
)
from diffusers_accel.search import scores_file
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.scores import CalibrationRun, Scores
from tests.search.test_assign import cost_of, make_scores, random_scores


def equal(a: Scores, b: Scores) -> bool:
    same = all(np.array_equal(a.sums[name], b.sums[name]) for name in a.sums)
    return same and {**vars(a), "sums": None} == {**vars(b), "sums": None}


def test_round_trip_is_exact(tmp_path):
    scores = random_scores()
    scores.save(tmp_path / "s.safetensors")
    assert equal(Scores.load(tmp_path / "s.safetensors"), scores)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_means_and_deviations_over_samples():
    scores = make_scores(np.zeros((2, 1, 1, 3)), samples=1)
    first, second = ({name: array.copy() for name, array in scores.sums.items()} for _ in range(2))
    for sums, value in ((first, 1.0), (second, 3.0)):
        sums["error/transformer"][:] = value
        sums["error_square/transformer"][:] = value**2
    done = CalibrationRun("a blue square", 20.0, 8.0, {"transformer": (4, 6)}, {"transformer": (2, 6)})
    both = Scores(**{**vars(scores), "sums": first}).plus(done, second)
    assert both.error("transformer") == pytest.approx(2.0)
    assert both.error_std("transformer") == pytest.approx(1.0)
    assert (both.samples("transformer") == 2).all() and both.steps("transformer").tolist() == [2, 6]
    assert both.calls("transformer").tolist() == [3, 6]
    assert both.attention_share == pytest.approx((0.5 + 0.4) / 2)
    assert len(both.runs) == 2 and len(scores.runs) == 1


def test_no_sample_is_nan_and_not_zero():
    scores = make_scores(np.zeros((2, 1, 1, 3)))
    scores.sums["samples/transformer"][0] = 0
    assert np.isnan(scores.error("transformer")[0]).all() and not np.isnan(scores.error("transformer")[1]).any()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "s.safetensors"
    old = random_scores(0)
    old.save(path)

    def dies(*paths):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="disk full"):
            random_scores(1).save(path)
    assert equal(Scores.load(path), old)
    assert [each.name for each in path.parent.iterdir()] == ["s.safetensors"]


def written(path, scores, change=lambda header, tensors: None, **texts) -> None:
    """Scores whose header (JSON data) and tensors were changed before they were saved, checksum and all."""
    scores.save(path)
    file = read_tensor_file(path)
    header, tensors = json.loads(file.texts["content"]), dict(file.tensors)
    change(header, tensors)
    text = json.dumps(header)
    texts = {**file.texts, "content": text, "sha256": documents._checksum_of_tensors(text, tensors), **texts}
    path.write_bytes(safetensors.torch.save(tensors, texts))


def at(*keys, value):
    """A change of one value of the header; of a key that is not there where `value` is `GONE`."""

    def apply(header, tensors):
        *way, last = keys
        for key in way:
            header = header[key]
        if value is GONE:
            del header[last]
        else:
            header[last] = value

    return apply


def tensor(name, change):
    def apply(header, tensors):
        change(tensors[name])

    return apply


GONE = object()
CALLS = ("passes", 0, "calls")
ROW = [1.0, 0.0, 2.5]  # impacts of the layers of one span
WRONG = [
    (
        lambda header, tensors: tensors.pop("error/transformer"),
        "sums: expected the array 'error/transformer', found none",
    ),
    (lambda header, tensors: tensors.update(more=torch.zeros(1)), "sums: expected no array 'more', found one"),
    (
        lambda header, tensors: tensors.update({"mse/transformer": torch.zeros(3)}),
        r"sums.mse/transformer: expected float64 \(2, 3, 4, 5\), found float32 \(3,\)",
    ),
    (tensor("error/transformer", lambda t: t.fill_(torch.nan)), "sums.error/transformer: expected finite numbers"),
    (tensor("mass/transformer", lambda t: t.fill_(-1)), "sums.mass/transformer: expected sums of 0 or more, found -1"),
    (
        tensor("samples/transformer", lambda t: t.fill_(-3)),
        "sums.samples/transformer: expected sums of 0 or more, found -3",
    ),
    (tensor("density/transformer", lambda t: t.fill_(9)), "sums.density/transformer: expected at most 1 a sample"),
    (tensor("density/transformer", lambda t: t.fill_(0)), "sums.density/transformer: expected 1 a sample of dense"),
    (at("extra", value=1), "found the unknown key extra"),
    (at("family", value=GONE), "expected the key family"),
    (at("family", value=""), "family: expected the name"),
    (at("models", value=[]), "models: expected object, found array"),
    (at("models", value={}), "models: expected at least one transformer"),
    (at("models", "transformer", "heads", value=4.0), "heads: expected int, found float"),
    (at("models", "transformer", "heads", value=-4), "models.transformer.heads: expected 1 or more, found -4"),
    (
        at("models", "transformer", "layers", value=2**62),
        "expected int64 .4611686018427387904, 4, 5|expected int64 .2, 46",
    ),
    (at("models", "transformer", "colour", value=1), "found the unknown key colour"),
    (at("layout", "frames", value=0), "a layout needs at least one frame"),
    (at("layout", "frames", value=2**62), "layout: expected at most 2,147,483,647 tokens, found 4,611,686"),
    (at("layout", "text_at", value="middle"), "layout.text_at: Invalid enum value|layout.text_at: "),
    (at("layout", "text_valid", value=True), "layout.text_valid: expected int"),
    (at("candidates", value=[]), r"candidates\[0\]: expected dense attention, found none"),
    (at("candidates", 0, value={"select": {"kind": "skip"}}), r"candidates\[0\]: expected dense attention, found skip"),
    (at("candidates", 2, value={"select": {"kind": "skip"}}), "candidates: expected each method once"),
    (at("candidates", 4, value=GONE), "sums.samples/transformer: expected int64"),
    (at("candidates", 1, "select", "kind", value="magic"), r"candidates\[1\]: select.kind: .*magic"),
    (at("candidates", 1, value=None), r"candidates\[1\]: expected object, found null"),
    (at("spans", 0, value=[0.0, "1"]), r"spans\[0\]\[1\]: expected float, found str"),
    (at("spans", 1, value=[0.3, 1.0]), r"spans\[1\]: expected one that begins at 0.25 .* found 0.3 to 1"),
    (at("spans", 1, value=[0.25, 0.25]), r"spans\[1\]: .* ends later"),
    (at("spans", 1, value=[0.25, 0.9]), "spans: expected an end at 1, found 0.9"),
    (at("spans", 1, value=GONE), "spans: expected an end at 1"),
    (at("parts", value=-1), "parts: expected 0 to"),
    (at("parts", value=2**62), "parts: expected 0 to"),
    (at("config", value=None), "config: expected object, found null"),
    (at("passes", 0, "seconds", value=GONE), r"passes\[0\]: expected the key seconds"),
    (at("passes", 0, "seconds", value=0), r"passes\[0\].seconds: expected a finite time, above 0, found 0"),
    (at("passes", 0, "seconds", value=True), r"passes\[0\].seconds: expected float, found bool"),
    (at("passes", 0, "attention_seconds", value=-1.0), r"passes\[0\].attention_seconds: expected a finite time"),
    (
        at("passes", 0, "attention_seconds", value=0.0),
        r"passes\[0\].attention_seconds: expected a finite time, above 0",
    ),
    (
        at(*CALLS, value={"transformer": [0, 0]}),
        r"passes\[0\].calls: expected calls of self-attention in one of the spans",
    ),
    (
        at(*CALLS, value={"other": [1, 2]}),
        r"passes\[0\].calls: expected the transformers .'transformer'., found .'other'",
    ),
    (at(*CALLS, "transformer", value=[1]), r"passes\[0\].calls.transformer: expected 2 counts, one per span, found 1"),
    (
        at(*CALLS, "transformer", value=[1, -2]),
        r"passes\[0\].calls.transformer: expected counts of 0 to .* found \(1, -2\)",
    ),
    (at(*CALLS, "transformer", value=[1, 2.5]), r"passes\[0\].calls\[...\]\[1\]: expected int, found float"),
    (at("passes", 0, "steps", "transformer", value=[1, 2**62]), "steps.transformer: expected counts of 0 to 100,000"),
    (at("impacts", value=[{"transformer": ROW}] * 3), "impacts: expected at most 2, one per span, found 3"),
    (
        at("impacts", value=[{"transformer": [-1.0, *ROW[1:]]}]),
        r"impacts\[0\].transformer: expected 3 finite numbers of 0",
    ),
    (at("impacts", value=[{"transformer": ROW[1:]}]), r"impacts\[0\].transformer: expected 3 finite numbers"),
    (at("impacts", value=[{"other": ROW}]), r"impacts\[0\]: expected the transformers .'transformer'., found .'other'"),
    (at("impacts", value=[1.0]), r"impacts\[0\]: expected object, found float"),
    (at("impacts", value=[{"transformer": [1e999] * 3}]), "expected a finite number"),
    (at("provenance", value={"a": "x" * 100, "b": 2**64}), "provenance.b: expected a whole number of at most 64 bits"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "s.safetensors"
    written(path, random_scores(), change)
    with pytest.raises(ValueError, match=message) as caught:
        Scores.load(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("name another one, and probe again")
    assert len(str(caught.value)) < 600


def test_what_was_not_changed_loads(tmp_path):
    written(tmp_path / "s.safetensors", random_scores())
    assert equal(Scores.load(tmp_path / "s.safetensors"), random_scores())


def test_another_version_and_other_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    for texts, message in (
        ({"version": "2"}, "expected version 6 of diffusers_accel.scores, found '2'; delete the file, or name another"),
        ({"format": "other"}, "expected the format diffusers_accel.scores, found 'other'"),
        ({"sha256": "0" * 64}, "the file is damaged; delete the file"),
        ({"content": "[" * 100_000}, "the file is damaged"),
    ):
        written(path, random_scores(), **texts)
        with pytest.raises(ValueError, match=message):
            Scores.load(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="expected a safetensors file"):
        Scores.load(path)
    with pytest.raises(ValueError, match="found a folder"):
        Scores.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "none")


def loads_equal_or_is_refused(load, same, path) -> bool:
    """Whether it loads; no other exception, and no other content, comes out of a changed file."""
    try:
        assert same(load(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 600, str(error)
        return False
    return True


def mutants(whole: bytes, seed: int = 0):
    """A flipped bit at a few hundred places, the file cut at others, bytes put in, taken out and exchanged."""
    random = np.random.default_rng(seed)
    for place in random.choice(len(whole), min(len(whole), 300), replace=False):
        yield whole[:place] + bytes([whole[place] ^ 1 << random.integers(8)]) + whole[place + 1 :]
    for place in random.integers(0, len(whole), 60):
        yield whole[:place]
        yield whole[:place] + random.bytes(3) + whole[place:]
        yield whole[: max(0, place - 5)] + whole[place:]
        yield whole[place:] + whole[:place]


def test_no_changed_byte_goes_unnoticed_and_nothing_raises_as_python_does(tmp_path):
    path, scores = tmp_path / "s.safetensors", random_scores(layers=2, heads=2)
    scores.save(path)
    loaded = 0
    for data in mutants(path.read_bytes()):
        path.write_bytes(data)
        loaded += loads_equal_or_is_refused(Scores.load, lambda found: equal(found, scores), path)
    assert loaded < 10, "what is left is padding and the order of keys"


JUNK = [None, True, -1, 0, 2**62, 1.5, -0.5, 1e308, "x", "٣", "x" * 10_000, [], [[]], {}, {"a": {}}, [1, 2, 3, 4]]


def places(data, way=()):
    """The way to every value in JSON data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*way, key)
        yield from places(value, (*way, key))


def test_whatever_a_header_says_it_is_scores_or_refused(tmp_path):
    """With a checksum that fits: what the checks of values let through can be saved, and assigned."""
    path, scores = tmp_path / "s.safetensors", random_scores(layers=2, heads=2)
    scores.save(path)
    header = json.loads(read_tensor_file(path).texts["content"])
    random = np.random.default_rng(0)
    found = [(way, value) for way in places(header) for value in [GONE, *JUNK]]
    for index in random.choice(len(found), min(len(found), 400), replace=False):
        way, value = found[index]
        written(path, scores, at(*way, value=value))
        try:
            other = Scores.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 600, str(error)
            continue
        other.save(path)
        assert equal(Scores.load(path), other)
        if other.runs:
            try:
                assign(other, cost_of(scores), Budget.density(0.5))
            except ValueError as error:
                assert len(str(error)) < 600


COST = Cost({"transformer": (10.0, 0.0, 2.5)}, {"transformer": (10.0, 0.0, 12.5)}, "cpu, 2 threads", 4352, 1, 5)


def test_cost_round_trip(tmp_path):
    path = tmp_path / "cost.json"
    COST.save(path)
    assert Cost.load(path) == COST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 3 of diffusers_accel.cost, found 2"),
        ({"surprise": 1}, "found the unknown key surprise"),
        ({"ms": {"transformer": [1.0, -1.0, 1.0]}}, "ms.transformer: expected finite times of 0 ms or more, found"),
        (
            {"ms": {"transformer": [0.0, 1.0, 1.0]}},
            r"ms.transformer\[0\]: expected a time above 0 ms of dense attention",
        ),
        ({"ms": {"transformer": [1.0, None, 1.0]}}, "expected float, found null"),
        ({"ms": None}, "ms: expected object, found null"),
        ({"ms": {"transformer": 3}}, "expected array, found int"),
        ({"ms": {"transformer": [2**64, 0, 1]}}, "at most 64 bits"),
        ({"ms": {"transformer": [1.0, 1.0]}}, "refresh_ms.transformer: expected 2 times, one per candidate, found 3"),
        ({"ms": {}, "refresh_ms": {}}, "expected times of the same transformers"),
        ({"refresh_ms": {"other": [1, 1, 1]}}, r"same transformers, found \['transformer'\] and \['other'\]"),
        ({"refresh_ms": {"transformer": []}}, "refresh_ms.transformer: expected 3 times, one per candidate, found 0"),
        ({"tokens": "4352"}, "tokens: expected int, found str"),
        ({"rounds": 0}, "rounds: expected 1 or more, found 0"),
        ({"batch": True}, "batch: expected int, found bool"),
        ({"device": None}, "device: expected str, found null"),
    ],
)
def test_a_wrong_cost_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "cost.json"
    COST.save(path)
    data = {**json.loads(path.read_text()), **change}
    del data["sha256"]
    path.write_text(json.dumps({**data, "sha256": checksum(data)}))
    with pytest.raises(ValueError, match=message) as caught:
        Cost.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("delete the file and measure the cost again")


def test_no_changed_byte_of_a_cost_goes_unnoticed(tmp_path):
    path = tmp_path / "cost.json"
    COST.save(path)
    for data in mutants(path.read_bytes(), seed=1):
        path.write_bytes(data)
        loads_equal_or_is_refused(Cost.load, lambda found: found == COST, path)


def test_costs_that_do_not_fit_each_other_cannot_be_made():
    with pytest.raises(ValueError, match="expected 2 times, one per candidate, found 3"):
        Cost({"a": (1.0, 2.0), "b": (1.0, 2.0, 3.0)}, {"a": (1.0, 2.0), "b": (1.0, 2.0)}, "cpu", 1, 1, 1)
    with pytest.raises(ValueError, match="expected finite times"):
        Cost({"a": (1.0, float("nan"))}, {"a": (1.0, 2.0)}, "cpu", 1, 1, 1)


def test_numbers_of_a_type_that_numpy_has_not_are_refused(tmp_path):
    """Also where the checksum fits."""
    path = tmp_path / "scores.safetensors"
    random_scores().save(path)
    header, tensors = load_tensor_document(path, scores_file.KIND, scores_file.Header)
    name = next(name for name in tensors if name.startswith("error/"))
    save_tensor_document(path, scores_file.KIND, header, {**tensors, name: tensors[name].to(torch.bfloat16)})
    with pytest.raises(FileError, match="expected numbers of another type, found bfloat16"):
        Scores.load(path)
