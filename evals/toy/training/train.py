"""Train the toy model from nothing: `python -m diffusers_accel.evals.toy.training.train --help`.

Meant to run in the background (`nice -n 10 ...`); each command resumes where it was killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from diffusers_accel.evals.toy.weights_folder import WEIGHTS

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train the toy text-to-video model.")

Minutes = Annotated[float, typer.Option(help="Training time in all, counted over restarts.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, clips and noise.")]
Out = Annotated[Path, typer.Option(help="Working folder with checkpoints and logs.")]


@app.callback()
def main() -> None:
    """Train the toy text-to-video model."""


@app.command()
def start(
    weights: Annotated[Path, typer.Option(help="Folder of exported weights; the package's own by default.")] = WEIGHTS,
    seed: Seed = 0,
    out: Out = Path("toy-training"),
) -> None:
    """Begin with exported weights: go on with `latents`, `text`, then `transformer`."""
    from diffusers_accel.evals.toy.training.start import start_training

    print(start_training(out, weights, seed))


@app.command()
def autoencoder(minutes: Minutes = 25, threads: Threads = 1, seed: Seed = 0, out: Out = Path("toy-training")) -> None:
    """Train the autoencoder on rendered clips."""
    from diffusers_accel.evals.toy.training.autoencoder import train_autoencoder

    torch.set_num_threads(threads)
    print(train_autoencoder(out, minutes, seed))


@app.command()
def latents(
    clips: Annotated[int, typer.Option(help="Clips to encode in all.")] = 4000,
    threads: Threads = 1,
    seed: Seed = 0,
    out: Out = Path("toy-training"),
) -> None:
    """Encode training clips ahead (may still run while the transformer trains)."""
    from diffusers_accel.evals.toy.training.latents import encode_latents

    torch.set_num_threads(threads)
    print(encode_latents(out, clips, seed))


@app.command()
def transformer(
    minutes: Minutes = 240,
    threads: Threads = 2,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, or a GPU's torch name (cuda): not tried by the authors.")] = "cpu",
    out: Out = Path("toy-training"),
) -> None:
    """Train the transformer and the text encoder on the encoded clips."""
    from diffusers_accel.evals.toy.training.transformer import train_transformer

    torch.set_num_threads(threads)
    print(train_transformer(out, minutes, seed, device))


@app.command()
def text(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1200,
    threads: Threads = 2,
    seed: Seed = 0,
    out: Out = Path("toy-training"),
) -> None:
    """Train the text encoder alone to tell two objects apart, where the transformer's training has not taught it that."""
    from diffusers_accel.evals.toy.training.text import train_text

    torch.set_num_threads(threads)
    print(train_text(out, steps, seed))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Working folder with checkpoints and logs.")] = Path("toy-training"),
    weights: Annotated[Path, typer.Option(help="Folder to write; the package's own by default.")] = WEIGHTS,
    measured: Annotated[Path | None, typer.Option(help="Result of the measure command, put into the record.")] = None,
) -> None:
    """Write the averaged weights in the host's format, with their training record."""
    from diffusers_accel.evals.toy.training.export import export_weights

    print(export_weights(out, weights, measured))


if __name__ == "__main__":
    app()
