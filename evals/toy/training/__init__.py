"""How the small model was made and measured: part of a checkout, not of the wheel (setup.py), which loads and runs it."""
