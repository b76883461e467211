"""`python -m diffusers_accel.evals.kernel_bench`."""

from diffusers_accel.evals.kernel_bench import main

main()
