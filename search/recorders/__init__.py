"""What a search records for the selections that need it: one file each, imported and named here."""

from collections.abc import Iterable

from diffusers_accel.methods import Method
from diffusers_accel.search.recorders.column_mass import ColumnMass
from diffusers_accel.search.recorders.recorder import Recorder
from diffusers_accel.search.recorders.stored_masks import StoredMasks

RECORDERS: dict[str, type[Recorder]] = {"column mass": ColumnMass, "stored masks": StoredMasks}


def recorders(candidates: Iterable[Method]) -> tuple[type[Recorder], ...]:
    """Those that some candidates need."""
    needed = dict.fromkeys(method.select.records for method in candidates if method.select.records)
    return tuple(RECORDERS[name] for name in needed if name is not None)
