"""Who `auto` takes, as the table of `kernels/ranking.py` says, and what has to be asked for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_accel.kernels import attention as attention_package
from diffusers_accel.kernels import choice as choice_module
from diffusers_accel.kernels import dense as dense_package
from diffusers_accel.kernels import hardware, ranking
from diffusers_accel.kernels.attention import PRECISIONS, attention, choices, chosen, none_skips
from diffusers_accel.kernels.choice import Choice
from diffusers_accel.kernels.ranking import ANY_DIM, IMPLEMENTATIONS, RANKING, UNMEASURED, Row
from diffusers_accel.methods import Band, Method

CUDA, CPU, BF16, F32 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
PACKAGES = {"attention": attention_package, "dense": dense_package}
KERNELS = Path(ranking.__file__).parent
OPERATORS = sorted(path.parent.name for path in KERNELS.glob("*/__init__.py"))
# Files of an operator's folder that are no implementation: what some of them share.
SHARED = {
    "attention": {"epilogue", "gluon_kernel", "launch_order", "products", "softmax"},
    "dense": {"gpu"},
    "quantize": {"quantized"},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU as torch would describe it, Hopper's capability if no other is set; nothing can be run on it."""
    machine = SimpleNamespace(capability=90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "capability", lambda device: machine.capability if device.type == "cuda" else 80)
    forget()
    yield machine
    forget()


def forget() -> None:
    choice_module._reason.cache_clear()
    choice_module._chosen.cache_clear()


def test_operators_are_those_with_a_folder() -> None:
    assert {"attention", "dense", *SHARED} <= set(OPERATORS) and set(IMPLEMENTATIONS) == set(PACKAGES)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_file_of_an_operator_is_one_of_its_implementations(operator: str) -> None:
    package = importlib.import_module(f"diffusers_accel.kernels.{operator}")
    files = {path.stem for path in (KERNELS / operator).glob("*.py")} - {"__init__"}
    shared = SHARED.get(operator, set())
    assert shared < files, "a helper that is no more"
    assert set(package._operator.names) == files - shared
    assert len(package._operator.names) == len(files - shared), "named twice"


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
def test_the_table_is_whole(operator: str) -> None:
    """Every implementation is listed, every name of a row is, and nobody is left out who need not be asked for."""
    assert set(IMPLEMENTATIONS[operator]) == set(PACKAGES[operator].IMPLEMENTATIONS)
    always = {name for name, note in IMPLEMENTATIONS[operator].items() if note is None}
    rows = [row for row in RANKING if row.operator == operator]
    for row in rows:
        assert always <= set(row.order) <= set(IMPLEMENTATIONS[operator])
        assert len(set(row.order)) == len(row.order) and row.order[-1] == "reference"
        assert row.capability[0] <= row.capability[1] and row.head_dim[0] <= row.head_dim[1]
        assert row.precision in (None, *PRECISIONS)
    assert (rows[-1].capability[0], rows[-1].head_dim) == (0, ANY_DIM), "the last row holds whatever no other does"


def test_the_table_is_plain_data() -> None:
    rows = json.loads(json.dumps(RANKING))
    assert [Row(*(tuple(x) if isinstance(x, list) else x for x in row)) for row in rows] == list(RANKING)


def test_the_first_row_that_holds_the_inputs_counts(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = (
        Row("attention", (90, 90), "int8", (64, 128), ("hopper", "portable", "cpu", "reference")),
        Row("dense", (90, 90), None, ANY_DIM, ("flash", "reference")),
        Row("attention", (80, 80), None, ANY_DIM, ("reference",)),
    )
    monkeypatch.setattr(ranking, "RANKING", (*measured, *RANKING))
    expected = {
        (90, "int8", 64): "hopper", (90, "int8", 128): "hopper", (90, "int8", 136): "cpu", (90, "int8", 56): "cpu",
        (90, "input", 64): "cpu", (89, "int8", 64): "cpu", (100, "int8", 64): "cpu",
    }  # fmt: skip
    for (gpu.capability, precision, head_dim), first in expected.items():
        assert ranking.order("attention", CUDA, precision, head_dim)[0] == first
    gpu.capability = 90
    assert ranking.order("dense", CUDA, "input", 64) == ("flash", "reference")
    for device in (CPU, torch.device("meta")):
        assert ranking.order("attention", device, "int8", 64)[0] == "cpu", "what is no GPU has capability 0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranking.order("attention", CUDA, "int8", 64)[0] == "cpu", "torch sees none"


def test_a_measured_row_makes_automatic_what_had_to_be_asked_for(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("cuda", BF16, 128) == "portable"
    before = {option.name: option for option in choices("cuda", BF16, 128)}
    assert before["hopper"] == Choice("hopper", None, UNMEASURED) and not before["hopper"].automatic
    assert before["hopper"].verdict == "usable; must be asked for until measured on a GPU"
    row = Row("attention", (90, 90), "input", (64, 128), ("hopper", "portable", "cpu", "reference"))
    monkeypatch.setattr(ranking, "RANKING", (row, *RANKING))
    forget()
    assert chosen("cuda", BF16, 128) == "hopper"
    assert choices("cuda", BF16, 128)[0] == Choice("hopper", None) and choices("cuda", BF16, 128)[0].automatic
    assert chosen("cuda", BF16, 56) == "portable"
    assert choices("cuda", F32, 128)[0].verdict == "takes float16 and bfloat16, found torch.float32"
    assert chosen("cuda", F32, 128) == "portable"


def test_eight_bits_have_to_be_asked_for_on_hopper(gpu: SimpleNamespace) -> None:
    """Nobody takes them unasked there, and who asks gets them."""
    left_out = {}
    for gpu.capability in (80, 86, 89, 90, 100, 120):
        left_out[gpu.capability] = ranking.eight_bits_left_out(CUDA)
    assert [at for at, why in left_out.items() if why is not None] == [90]
    assert "must be asked for on Hopper until measured" in str(left_out[90])
    assert ranking.eight_bits_left_out(CPU) is None
    gpu.capability = 90
    assert chosen("cuda", BF16, 128, precision="int8") == chosen("cuda", BF16, 128, precision="int8_fp8") == "portable"


def test_auto_never_takes_what_has_to_be_asked_for(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where nothing else but the reference can run."""
    monkeypatch.setattr("diffusers_accel.kernels.attention.portable.refuses", lambda *inputs: "is broken")
    assert chosen("cuda", BF16, 128) == "reference"
    reasons = none_skips("cuda", BF16, 128)
    assert reasons is not None and "portable: is broken; hopper: usable; must be asked for until" in reasons
    assert Method(select=Band(0.3)).refuses(128, CUDA, BF16) == reasons
    monkeypatch.setenv(attention_package.VARIABLE, "hopper")
    assert chosen("cuda", BF16, 128) == "hopper" and none_skips("cuda", BF16, 128) is None
    found = {option.name: option for option in choices("cuda", BF16, 128)}
    assert found["hopper"].automatic and "asks for another" in str(found["reference"].reason)


def test_what_nothing_else_runs_is_not_what_a_method_runs(gpu: SimpleNamespace) -> None:
    """On the reference a method would wait for ever; a refusal names what was found."""
    assert none_skips("cuda", BF16, 128) is None and none_skips("cpu", BF16, 256) is None
    reasons = str(Method(select=Band(0.3)).refuses(264, CUDA, BF16))
    assert "reference" not in reasons
    assert "portable: takes head dims up to" in reasons and "hopper: takes head dims from 40 to 128" in reasons
    assert reasons.count(", found 264") >= 2
    reasons = str(none_skips("cuda", torch.float64, 128))
    assert "reference" not in reasons and "found torch.float64" in reasons


def test_a_refusal_lists_every_implementation_and_how_it_stands(gpu: SimpleNamespace) -> None:
    q = torch.zeros(1, 16, 1, 12, device="meta")
    with pytest.raises(ValueError, match=r"(?s)portable: .*\n  reference: usable\n  hopper: .*found meta"):
        attention(q, q, q, impl="portable")


def test_an_implementation_that_no_row_has_and_that_has_no_note_must_be_asked_for(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "RANKING", (Row("attention", (90, 90), None, ANY_DIM, ("reference",)), *RANKING))
    found = {option.name: option for option in choices("cuda", BF16, 64)}
    assert found["portable"].opt_in == ranking.UNRANKED and found["cpu"].opt_in is None
    assert found["cpu"].reason is not None
