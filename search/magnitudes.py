"""Tables for MagCache, of the user's own pipeline: by how much what the model adds to its input changes from step to step.

MagCache (arXiv 2506.09045) finds that the ratio of the residual's magnitudes at two steps in turn is nearly the same for all
prompts. A dense run for each prompt tells it. The authors' tables are of the tokens inside of the model; these are of its whole
output, as that is what is predicted here: with v the output and x the denoised channels of the input, norms over channels and
means over positions,

    ratio_t = mean(|v_t - x_t| / |v_(t-1) - x_(t-1)|)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.attach.site import AttachedModel, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.forwards.calls import ForwardReader, opened
from diffusers_accel.forwards.magnitudes import Magnitudes
from diffusers_accel.forwards.wrapper import wrap
from diffusers_accel.search.arguments import check_call, check_pipeline, check_prompts
from diffusers_accel.search.checks import whole_number
from diffusers_accel.search.running import Prompt, prompt_label, run_pipeline
from diffusers_accel.search.screen import Screen
from diffusers_accel.support.identity import model_name, plain
from diffusers_accel.support.interrupted import Interrupted

SMALLEST = 1e-12  # magnitude by which is divided


def calibrate_magnitudes(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Magnitudes:
    """Runs each prompt once, densely, and returns the table of this model, schedule and number of steps.

    The pipeline is used as it is (LoRA, offload, quantisation, attention backend) and left as it was, also after Ctrl-C. Beside
    the weights it takes one residual for each branch.

    Args:
        pipe: a loaded diffusers video pipeline.
        prompts: calibration prompts, one generation each; a mapping gives other arguments, such as prompt_embeds.
        call: all further arguments of `pipe(...)`: size, frames, steps, guidance; None: the pipeline's own.
        seed: of the noise of prompt i (seed + i).
        progress: show progress on stderr.

    Returns:
        The means over prompts and their spread. Where the pipeline does not name its branches, of the first one of each step.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what to do.
        Interrupted: a KeyboardInterrupt; nothing is kept.
    """
    found = check_pipeline(pipe)
    prompts = check_prompts(pipe, prompts)
    arguments = check_call(pipe, {} if call is None else call)
    seed = whole_number("seed", seed, 0)
    record = _Record()
    try:
        with Screen(progress).bar("magnitudes", len(prompts)) as advance:
            for number, prompt in enumerate(prompts):
                _run(pipe, record, prompt, arguments, seed + number)
                advance(number + 1)
    except KeyboardInterrupt as error:
        kept = "nothing is kept, as a calibration takes all prompts in one go"
        raise Interrupted(kept, "Call calibrate_magnitudes again with the same arguments; it begins anew") from error
    provenance = {
        "model": model_name(pipe),
        "transformers": {name: family.name for name, (_, family) in found.items()},
        "prompts": [prompt_label(prompt) for prompt in prompts],
        "call": plain(arguments),
        "seed": seed,
    }
    return record.table(provenance)


def summary(table: Magnitudes) -> str:
    """How far from 1 the ratios go, and how much prompts differ."""
    parts = []
    for branch, ratios in table.ratios.items():
        named = f" of {branch}" if branch else ""
        widest = max(table.spread[branch])
        parts.append(f"ratios{named} {min(ratios):.3f} to {max(ratios):.3f}, spread over prompts up to {widest:.4f}")
    return f"{table.steps} steps: {'; '.join(parts)}"


def _run(pipe: Any, record: _Record, prompt: Prompt, arguments: Mapping[str, Any], seed: int) -> None:
    """One generation, densely, of which all forwards are recorded."""
    undo: dict[str, Callable[[], None]] = {}

    def watched(site: Site) -> _Dense:
        model = site.model
        if model.name not in undo:
            undo[model.name] = wrap(model.module, model.name, _Recorder(record, model))
        return _Dense()

    record.begin()
    try:
        run_pipeline(pipe, watched, prompt, arguments, seed)
    finally:
        for each in undo.values():
            each()


class _Dense:
    """Attends as the model would."""

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None
        return call.dense(q, k, v)


class _Record:
    """Ratios of all runs so far."""

    def __init__(self) -> None:
        self.steps = 0  # of the schedule; 0 before the first call
        self.labels: set[str] = set()  # of the models
        self.noise: dict[int, float | None] = {}
        self.ratios: dict[str, dict[int, list[float]]] = {}
        self._last: dict[str, tuple[int, Tensor]] = {}  # branch -> step, magnitudes of its residual

    def begin(self) -> None:
        """Called before each generation."""
        self._last.clear()

    def add(self, branch: str, now: tuple[int, int], noise: float | None, magnitudes: Tensor) -> None:
        """The magnitudes of a residual, of any shape, at step now[0] of now[1]."""
        step, steps = now
        if steps != (self.steps or steps):
            raise RuntimeError(f"expected {self.steps} steps as in the first call of the pipeline, found {steps}")
        self.steps, self.noise[step] = steps, noise
        samples, last = self.ratios.setdefault(branch, {}), self._last.get(branch)
        if last is not None and last[0] == step - 1 and last[1].shape == magnitudes.shape:
            samples.setdefault(step, []).append(mean_ratio(last[1], magnitudes))
        self._last[branch] = step, magnitudes

    def table(self, provenance: dict[str, Any]) -> Magnitudes:
        if not any(self.ratios.values()):
            raise ValueError(
                f"a call of {self.steps} steps has no two steps in turn of one size: calibrate with more steps"
            )
        noise = [self.noise.get(step) for step in range(self.steps)]
        return Magnitudes(
            ratios={name: self._each(samples, fmean) for name, samples in self.ratios.items()},
            spread={name: self._each(samples, pstdev, 0.0) for name, samples in self.ratios.items()},
            made_for=next(iter(self.labels)) if len(self.labels) == 1 else None,
            noise=None if None in noise else tuple(float(level or 0) for level in noise),
            provenance=provenance,
        )

    def _each(
        self, samples: Mapping[int, list[float]], of: Callable[[list[float]], float], usual: float = 1.0
    ) -> tuple[float, ...]:
        return tuple(of(samples[step]) if step in samples else usual for step in range(self.steps))


class _Recorder:
    """Stands around the forwards of one transformer."""

    def __init__(self, record: _Record, model: AttachedModel) -> None:
        self._record = record
        self._model = model
        self._reader = ForwardReader(model.module, model.family)
        self._first: tuple[int, str] | None = None  # the step that runs, and the branch that ran first in it
        record.labels.add(model.label)

    @torch.compiler.disable(reason="watches the model")
    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, None]:
        prepares = self._model.family.prepares
        if prepares is not None and prepares(args, kwargs):
            return None, None
        return self._reader.read(args, kwargs).latents[0], None

    @torch.compiler.disable(reason="watches the model")
    @torch.no_grad()
    def after(self, latents: Tensor | None, output: Any) -> None:
        now = self._model.clock.now()
        if latents is None:
            return
        if now is None:
            raise RuntimeError("a calibration needs to know which step runs, but neither pipeline nor model says so")
        branch = self._named(now[0])
        if branch is None:
            return
        v = opened(output, 1)[0][0].detach()
        x = self._reader.denoised(latents, v)
        residual = v.float() - x.float()
        magnitudes = residual.norm(dim=self._model.family.channels)
        self._record.add(branch, now, self._model.clock.noise(), magnitudes)

    def _named(self, step: int) -> str | None:
        """The pipeline's name of the branch; "" for the first one of a step where it has none, None for the others."""
        named = self._model.clock.branch
        if named:
            return named
        branch = self._model.branch
        if self._first is None or self._first[0] != step:
            self._first = step, branch
        return "" if self._first[1] == branch else None


def mean_ratio(earlier: Tensor, later: Tensor) -> float:
    """The mean over positions of later / earlier, magnitudes of one shape."""
    return float((later / earlier.clamp_min(SMALLEST)).mean())
