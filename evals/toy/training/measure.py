"""Measure the toy model on held-out prompts: `python -m diffusers_accel.evals.toy.training.measure --prompts 64`.

Rendered clips and their reconstructions by the autoencoder go through the same judge as the generated clips, so that a
failure of the judge or of the autoencoder is not taken for one of the denoiser.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from diffusers_accel.evals.toy import CALL, held_out_prompts, load_pipeline
from diffusers_accel.evals.toy.render import held_out_scene, render
from diffusers_accel.evals.toy.training.autoencoder import encode_mean, to_video
from diffusers_accel.evals.toy.training.pixels import judge
from diffusers_accel.evals.toy.weights_folder import WEIGHTS, verify_weights, weights_digest
from diffusers_accel.files import FileError, prepare_file, printable, quoted, read_json, write_json

ATTRIBUTES = ("background", "color", "motion", "shape")


def row(source: str, video: NDArray[np.float32], caption: str, seed: int) -> dict[str, Any]:
    """The judgement of one clip as a row of the result file."""
    verdict = judge(video, caption)
    return {"source": source, "caption": caption, "seed": seed, **asdict(verdict), "passed": verdict.passed}


def reference_rows(vae: Any, clips: int, seed: int) -> list[dict[str, Any]]:
    """Rows of rendered held-out clips and of their reconstructions, the latter with PSNR in dB."""
    rows = []
    for i in range(clips):
        scene = held_out_scene(np.random.default_rng([seed, 3, i]))
        frames = render(scene)
        video = to_video(frames)[None].to(vae.dtype)
        with torch.no_grad():
            again = vae.decode(encode_mean(vae, video), return_dict=False)[0][0].float()
        again = again.add(1).div(2).permute(1, 2, 3, 0).numpy()
        psnr = -10 * float(np.log10(np.square(again - frames).mean()))
        rows.append(row("rendered", frames, scene.caption, i))
        rows.append({**row("reconstructed", again, scene.caption, i), "psnr": psnr})
    return rows


def generate(pipe: Any, prompt: str, seed: int) -> NDArray[np.float32]:
    """One clip `[F, H, W, 3]` in 0..1 of the call that the model was trained for."""
    video: NDArray[np.float32] = pipe(prompt, **CALL, generator=torch.Generator().manual_seed(seed)).frames[0]
    return video


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Clips, share of clips per attribute, and mean PSNR in dB where it was measured, per source."""
    found: dict[str, dict[str, float]] = {}
    for source in dict.fromkeys(r["source"] for r in rows):
        group = [r for r in rows if r["source"] == source]
        found[source] = {"clips": len(group)}
        found[source] |= {a: round(float(np.mean([r[a] for r in group])), 4) for a in (*ATTRIBUTES, "passed")}
        if "psnr" in group[0]:
            found[source]["psnr"] = round(float(np.mean([r["psnr"] for r in group])), 2)
    return found


def part_of(text: str) -> tuple[int, int]:
    """(first, step) of "i/n"; raises ValueError for anything else."""
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ValueError(f"--part: expected i/n with i from 0 to n - 1, such as 0/2, found {quoted(text)}")
    return int(first), int(step)


def held_rows(out: Path, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an unfinished measurement of the same things; none where there is no file.

    Raises:
        FileError: the file holds something else, which is not replaced.
    """
    try:
        held = read_json(out)
    except FileNotFoundError:
        return []
    if not isinstance(held, dict) or not isinstance(held.get("rows"), list) or not isinstance(held.get("what"), dict):
        raise FileError(f"{printable(out)}: expected an unfinished measurement, found another file; name another --out")
    if differing := sorted(key for key in {*what, *held["what"]} if held["what"].get(key) != what.get(key)):
        raise FileError(
            f"{printable(out)}: holds a measurement with other {printable(', '.join(differing))[:200]}; name another --out, "
            "or move it away"
        )
    return list(held["rows"])


def print_table(found: dict[str, dict[str, float]]) -> None:
    table = Table("clips", "number", *ATTRIBUTES, "passed", "PSNR (dB)", title="asked and found, share of clips")
    for source, values in found.items():
        shares = [f"{100 * values[a]:.1f} %" for a in (*ATTRIBUTES, "passed")]
        table.add_row(source, str(values["clips"]), *shares, str(values.get("psnr", "")))
    Console().print(table)


def main(
    prompts: Annotated[int, typer.Option(help="Held-out prompts to generate.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the prompts; clip i starts from noise seed + i.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    part: Annotated[str, typer.Option(help="i/n: only every n-th prompt from the i-th, to share the work.")] = "0/1",
    weights: Annotated[Path, typer.Option(help="Folder of weights.")] = WEIGHTS,
    out: Annotated[Path, typer.Option(help="Result file; an unfinished one of the same weights is continued.")] = Path(
        "toy-measured.json"
    ),
) -> None:
    """Generate held-out prompts and print how often the pixels show what was asked for."""
    first, step = part_of(part)
    prepare_file(out)
    what = {
        "weights": weights_digest(verify_weights(weights)),
        "prompts": prompts,
        "seed": seed,
        "part": part,
        "call": CALL,
    }
    rows = held_rows(out, what)
    torch.set_num_threads(threads)
    pipe = load_pipeline(folder=weights)
    pipe.set_progress_bar_config(disable=True)
    rows = rows or reference_rows(pipe.vae, 16, seed)
    done = {r["caption"] for r in rows if r["source"] == "generated"}
    for i, prompt in list(enumerate(held_out_prompts(prompts, seed)))[first::step]:
        if prompt in done:
            continue
        rows.append(row("generated", generate(pipe, prompt, seed + i), prompt, seed + i))
        write_json(out, {"what": what, "summary": summary(rows), "rows": rows})
        print(f"{i + 1}/{prompts} {'found' if rows[-1]['passed'] else 'missed'}: {prompt}", flush=True)
    print_table(summary(rows))


if __name__ == "__main__":
    typer.run(main)
