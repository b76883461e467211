"""`python -m diffusers_accel.evals.kernel_bench`."""

import sys

from diffusers_accel.evals.kernel_bench import main
from diffusers_accel.support.terminal import run_command


def work(arguments: list[str]) -> int:
    main(arguments)
    return 0


run_command("python -m diffusers_accel.evals.kernel_bench", sys.argv[1:], work)
