"""A result of VBench as a table for a terminal."""

from __future__ import annotations

from diffusers_accel.evals.vbench.dimensions import DIMENSIONS, weights_of
from diffusers_accel.evals.vbench.environment import SETUP, Environment
from diffusers_accel.evals.vbench.results import SAMPLES, Result
from diffusers_accel.evals.vbench.run import lacking
from diffusers_accel.evals.vbench.weights import WEIGHTS, faults_of
from diffusers_accel.files import printable

WIDTH = max(map(len, DIMENSIONS))
CUSTOM = "no quality, semantic or total score: those are of VBench's own prompts, {samples} clips each (--standard)"


def table(result: Result) -> str:
    """Scores as VBench gives them, and normalised ones, in percent; summary scores where they exist."""
    summary = result.summary()
    clips, prompts = len(result.clips), len(set(result.clips.values()))
    kind = "VBench's own prompts" if result.standard else "custom input"
    lines = [f"VBench on {_counted(clips, 'clip')} of {_counted(prompts, 'prompt')} ({kind})", ""]
    lines.append(f"{'dimension':{WIDTH}}  {'group':8}  {'score':>7}  {'normalised':>10}  {'clips':>6}")
    for name, dimension in DIMENSIONS.items():
        if each := result.dimensions.get(name):
            score, share = f"{each.score:.2%}", f"{summary.normalised[name]:.2%}"
            lines.append(f"{name:{WIDTH}}  {dimension.group:8}  {score:>7}  {share:>10}  {len(each.clips):>6,}")
    lines += ["", *_summary_lines(result)]
    lines += [f"not measured: {name}: {printable(why)}" for name, why in result.left_out.items()]
    return "\n".join(lines).rstrip()


def readiness(environment: Environment) -> str:
    """What each dimension lacks, on clips of a folder and on VBench's own, and where what is missing must lie."""
    made, every = environment.made, tuple(DIMENSIONS)
    own, custom = (lacking(every, environment, standard=standard) for standard in (True, False))
    lines = [f"VBench's {made.packages} environment, PyTorch for {made.build}: {printable(environment.folder)}", ""]
    for name, dimension in DIMENSIONS.items():
        lacks = "; ".join(own.get(name, ())) or "ready"
        if name in own and name not in custom:
            lacks = f"ready for clips of a folder; of VBench's own prompts it lacks {lacks}"
        lines.append(f"{name:{WIDTH}}  {lacks}{' (own prompts only)' if dimension.labelled else ''}")
    if faults := faults_of(every, standard=True):
        lines += ["", "missing:", *faults.values()]
    return "\n".join(lines)


def without_environment(reason: str) -> str:
    """What each dimension will need, where there is no environment yet; `reason` says so, and what makes one."""
    every = tuple(DIMENSIONS)
    faults = faults_of(every, standard=True)
    lines = [reason, "", "What each dimension needs then:"]
    for name, dimension in DIMENSIONS.items():
        lost = [WEIGHTS[each].title for each in weights_of(name, standard=False) if each in faults]
        setup = f"{SETUP} --full" if dimension.packages == "full" else SETUP
        own = " (own prompts only)" if dimension.labelled else ""
        lines.append(f"{name:{WIDTH}}  {', '.join([setup, *lost])}{own}")
    return "\n".join([*lines, *(["", "missing:", *faults.values()] if faults else [])])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _summary_lines(result: Result) -> list[str]:
    if not result.complete:
        return [CUSTOM.format(samples=SAMPLES)]
    summary, lines = result.summary(), []
    for name in ("quality", "semantic", "total"):
        value = getattr(summary, name)
        lines.append(f"{name:{WIDTH}}  {f'{value:.2%}' if value is not None else _lost(name, result)}")
    return lines


def _lost(name: str, result: Result) -> str:
    of_it = [each.name for each in DIMENSIONS.values() if name in ("total", each.group)]
    lost = [each for each in of_it if each not in result.dimensions]
    return f"- (needs {len(lost)} more: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''})"
