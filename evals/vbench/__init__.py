"""VBench (Huang et al. 2023, arXiv 2311.17982) by its own program, in an environment of its own.

VBench 0.1.5 pins numpy, timm and transformers where diffusers cannot live, so it is never imported here: `environment` makes a
venv from files of pinned hashes, `child` is the one file that runs in it, `process` starts that and reads its answer.
`dimensions` says what each of the sixteen needs, `weights` whether it is there, `scores` what VBench makes of them all.
`clips` are films that somebody has, `standard` those that VBench asks for; `run` measures a set of them, a dimension at a time,
into `results`, and `show` is the table of it. VBench-2.0 is another benchmark with other dimensions; it is not here.
"""
