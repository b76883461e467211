"""`python -m diffusers_accel`, where `diffusers-accel` is not on the path."""

from diffusers_accel.cli import main

main()
