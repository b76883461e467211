"""`python -m diffusers_accel.evals.first_hour`."""

import sys

from diffusers_accel.evals.first_hour import main
from diffusers_accel.support.terminal import run_command

run_command("python -m diffusers_accel.evals.first_hour", sys.argv[1:], main)
