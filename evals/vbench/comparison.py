"""The lossless films that a comparison keeps for metrics of sets, as sets of clips by subject."""

from __future__ import annotations

from pathlib import Path

from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.kept import CLIPS, FILMS, KIND, RUN, Identity
from diffusers_accel.evals.report.findings import FLOOR
from diffusers_accel.evals.set_films import SetFilms
from diffusers_accel.evals.tally import BASELINE
from diffusers_accel.evals.vbench.clips import Clips, Film
from diffusers_accel.files import FileError, load_document, printable


def is_comparison(folder: Path) -> bool:
    """Whether `compare` keeps its clips there."""
    return (folder / RUN).is_file()


def read_comparison(folder: Path) -> dict[str, Clips]:
    """The clips that are finished, by subject, dense first.

    Raises:
        FileError: a file is damaged, or there are no lossless films, because no metric of sets was asked for.
    """
    identity = load_document(folder / RUN, KIND, Identity)
    kept = SetFilms(folder / FILMS, identity.fps)
    records = [ClipRecord.load(path).numbers for path in sorted(folder.glob(CLIPS))]
    if not records:
        raise FileError(f"{printable(folder)}: no clip of this comparison is finished yet; run it on, then this again")
    for number, record in enumerate(records):
        kept.check(number, record.films, "make the comparison again")
    found = {}
    for subject in (BASELINE, *([FLOOR] if identity.floor else []), *identity.subjects):
        films = kept.of(subject, records).clips
        found[subject] = Clips({each.path.name: Film(each.path, each.prompt) for each in films})
    if not all(each.clips for each in found.values()):
        raise FileError(
            f"{printable(folder)}: expected the lossless films of a comparison, found none: they are kept where a metric of sets "
            "is asked for, such as vbench_temporal_flickering"
        )
    return found
