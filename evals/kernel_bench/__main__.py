"""`python -m diffusers_accel.evals.kernel_bench` is `diffusers-accel bench`."""

import sys

from diffusers_accel.cli import main

main(["bench", *sys.argv[1:]])
