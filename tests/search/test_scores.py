"""The scores and cost files: exact round trips, strict reading, and a failed save leaves the old file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusers_accel.search import scores as scores_module
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.scores import Pass, Scores
from tests.search.test_assign import make_scores, random_scores


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
    done = Pass("a blue square", 20.0, 8.0, {"transformer": (4, 6)}, {"transformer": (2, 6)})
    both = Scores(**{**vars(scores), "sums": first}).plus(done, second)
    assert both.error("transformer") == pytest.approx(2.0)
    assert both.error_std("transformer") == pytest.approx(1.0)
    assert (both.samples("transformer") == 2).all() and both.steps("transformer").tolist() == [2, 6]
    assert both.calls("transformer").tolist() == [3, 6]
    assert both.attention_share == pytest.approx((0.5 + 0.4) / 2)
    assert len(both.passes) == 2 and len(scores.passes) == 1


def test_no_sample_is_nan_and_not_zero():
    scores = make_scores(np.zeros((2, 1, 1, 3)))
    scores.sums["samples/transformer"][0] = 0
    assert np.isnan(scores.error("transformer")[0]).all() and not np.isnan(scores.error("transformer")[1]).any()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    old = random_scores(0)
    old.save(path)

    def dies(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(scores_module, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        random_scores(1).save(path)
    assert equal(Scores.load(path), old)
    assert [each.name for each in tmp_path.iterdir()] == ["s.safetensors"]


def rewrite(path, change) -> None:
    """Applies `change(metadata, tensors)` to a scores file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def header(change):
    def apply(metadata, tensors):
        data = json.loads(metadata["header"])
        change(data)
        metadata["header"] = json.dumps(data)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda metadata, tensors: metadata.update(version="1"),
            "expected .* version 2, found .* version 1; delete the file",
        ),
        (lambda metadata, tensors: metadata.update(format="other"), "found other"),
        (lambda metadata, tensors: tensors.pop("error/transformer"), "expected the arrays"),
        (lambda metadata, tensors: tensors.update({"mse/transformer": np.zeros(3)}), "mse/transformer must be"),
        (lambda metadata, tensors: tensors["error/transformer"].fill(np.nan), "must be finite"),
        (header(lambda data: data.update(extra=1)), "expected the keys"),
        (header(lambda data: data["candidates"].pop()), "samples/transformer must be"),
        (header(lambda data: data["candidates"][1]["select"].update(kind="magic")), "magic"),
        (header(lambda data: data["passes"][0].pop("seconds")), "seconds"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "s.safetensors"
    random_scores().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        Scores.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    random_scores().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a safetensors file"):
        Scores.load(path)


def test_cost_round_trip_and_refusals(tmp_path):
    cost = Cost({"transformer": (10.0, 0.0, 2.5)}, {"transformer": (10.0, 0.0, 12.5)}, "cpu, 2 threads", 4352, 1, 5)
    path = tmp_path / "cost.json"
    cost.save(path)
    assert Cost.load(path) == cost
    data = json.loads(path.read_text())
    for change in ({"version": 1}, {"surprise": 1}, {"ms": {"transformer": [1.0, -1.0]}}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match="measure the cost again"):
            Cost.load(path)
