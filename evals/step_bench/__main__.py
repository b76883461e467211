"""`python -m diffusers_accel.evals.step_bench`."""

import typer

from diffusers_accel.evals.step_bench import main

typer.run(main)
