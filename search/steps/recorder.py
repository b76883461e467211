"""Records a dense generation: an interceptor around each transformer's forward that never skips."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.attach.site import AttachedModel
from diffusers_accel.forwards.calls import ForwardReader, Given, opened
from diffusers_accel.search.arguments import check_call, check_pipeline, check_prompts
from diffusers_accel.search.running import Enough, Prompt, prompt_label, run_pipeline
from diffusers_accel.search.steps.trajectory import Trajectory, TrajectoryStep
from diffusers_accel.support.identity import components, fingerprint, model_name, plain


def record(pipe: Any, prompt: Prompt, call: Mapping[str, Any], seed: int) -> Trajectory:
    """One dense generation, recorded; the decoder is left out where the pipeline allows it.

    Args:
        pipe: a loaded diffusers pipeline, which is not patched.
        prompt: a text, or a mapping of arguments such as prompt_embeds.
        call: all further arguments of `pipe(...)`.
        seed: of the noise.

    Raises:
        TypeError, ValueError: an argument is wrong; before anything runs.
        RuntimeError: the pipeline's forwards are not those of one denoising loop.
    """
    check_pipeline(pipe)
    (prompt,) = check_prompts(pipe, [prompt])
    call = check_call(pipe, call)
    recorder = TrajectoryRecorder(prompt_label(prompt), trajectory_identity(pipe, call))
    last = recorder.at_step_end if shows_latents(pipe) else None
    run_pipeline(pipe, None, prompt, call, seed, last, recorder.around)
    return recorder.trajectory(recorder.final)


def shows_latents(pipe: Any) -> bool:
    """Whether the pipeline shows its latents at the end of each step."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def trajectory_identity(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data that is equal where trajectories belong to the same model and call, whatever the prompt and seed."""
    found = check_pipeline(pipe)
    return {
        "pipeline": type(pipe).__name__,
        "model": model_name(pipe),
        "weights": fingerprint(found),
        "components": components(pipe, found),
        "call": plain(call),
    }


@dataclass
class _Recorded:
    """A step so far."""

    transformer: str
    timestep: Tensor
    x: Tensor  # on the device, to compare the next branch with
    v: dict[str, Tensor] = field(default_factory=dict)


class TrajectoryRecorder:
    """Give `around` to `run_pipeline`, then ask for the `trajectory`. Costs a copy of each forward's output and of each step's
    latents to the host.

    Args:
        prompt: its label.
        identity: what `trajectory_identity` says of the run.
    """

    def __init__(self, prompt: str, identity: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self._identity = dict(identity)
        self.final: Tensor | None = None  # latents of the last step that ended, where the pipeline shows them
        self._count: int | None = None  # of steps
        self._channels = 1
        self._rows = 0  # of latents, of which a batch of guidance has several copies
        self._done: list[TrajectoryStep] = []
        self._step: _Recorded | None = None

    def around(self, model: AttachedModel) -> _Watch:
        """What stands around the forward of a transformer.

        Raises:
            ValueError: it makes a video chunk by chunk.
        """
        if model.family.history:
            raise ValueError(
                f"{model.name} ({model.family.name}) makes a video chunk by chunk, each in a schedule of its own: expected a "
                "model that makes all frames together. Take a step cache that decides while it runs, such as "
                'patch(pipe, "easycache")'
            )
        self._channels = model.family.channels
        return _Watch(self, model)

    def add(self, model: str, branch: str, now: tuple[int, int], timestep: Tensor, x: Tensor, v: Tensor) -> None:
        """A forward has run. x and v: [batch, ...], of one shape."""
        step, steps = now
        known = len(self._done) + (self._step is not None)
        if step == known and self._count in (None, steps):
            self._close()
            self._count = steps
            x = self._once(x)
            self._step = _Recorded(model, timestep.clone(), x.clone())
        elif self._step is None or step != known - 1 or steps != self._count or branch in self._step.v:
            raise RuntimeError(
                f"expected the forwards of one generation, step by step, found step {step} of {steps} on the branch {branch!r} "
                f"after {known} steps of {self._count}: schedules are derived for models that denoise a whole video in one loop"
            )
        elif not torch.equal(self._once(x), self._step.x):
            raise RuntimeError(
                f"expected all branches of guidance to be given the same latents, found others at step {step} on {branch!r}: no "
                "schedule can be derived for this call"
            )
        self._step.v[branch] = _on_host(v)

    def at_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A `callback_on_step_end`, which ends the run after the last step."""
        self.final = tensors["latents"].detach().clone()
        if step + 1 == self._count:
            raise Enough
        return {}

    def trajectory(self, final: Tensor | None) -> Trajectory:
        """What was recorded; call it after the run.

        Args:
            final: latents after the last step, if they are known.

        Raises:
            RuntimeError: the generation did not run to its end.
        """
        self._close()
        if len(self._done) != self._count:
            raise RuntimeError(
                f"expected a whole generation, found {len(self._done)} of {self._count or 'its'} steps: nothing can be derived "
                "from a part of it"
            )
        last = None if final is None else final.detach().to("cpu", torch.float32)
        channels = self._channels % self._done[0].x.dim()
        return Trajectory(self._prompt, tuple(self._done), last, channels, self._identity)

    def _close(self) -> None:
        """The step that ran is finished."""
        if self._step is not None:
            each, self._step = self._step, None
            self._done.append(TrajectoryStep(each.transformer, float(each.timestep), _on_host(each.x), each.v))

    def _once(self, x: Tensor) -> Tensor:
        """The latents of a batch that may repeat them."""
        if not self._rows:  # of the first forward: as few as say all
            batch = len(x)
            self._rows = next(rows for rows in range(1, batch + 1) if batch % rows == 0 and _repeats(x, rows))
        if len(x) % self._rows or not _repeats(x, self._rows):
            raise RuntimeError(
                f"expected a batch that repeats {self._rows} rows of latents, found {len(x)} rows that differ: no schedule can "
                "be derived for this call"
            )
        return x[: self._rows]


@dataclass(frozen=True)
class _Watch:
    """Stands around the forward of one transformer, and lets everything run."""

    recorder: TrajectoryRecorder
    model: AttachedModel
    reader: ForwardReader = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reader", ForwardReader(self.model.module, self.model.family))

    @torch.compiler.disable(reason="looks on")
    @torch.no_grad()
    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Given | None, None]:
        prepares = self.model.family.prepares
        if prepares is not None and prepares(args, kwargs):
            return None, None
        return self.reader.read(args, kwargs), None

    @torch.compiler.disable(reason="copies what the model has computed")
    @torch.no_grad()
    def after(self, given: Given | None, output: Any) -> None:
        if given is None:
            return
        now = self.model.clock.now()
        if now is None:
            raise RuntimeError(
                "neither the pipeline nor its transformer says which step runs: record the whole diffusers pipeline"
            )
        outputs, _ = opened(output, len(given.latents) if self.model.family.hands_back else None)
        x, v = self.reader.inputs_of(given.latents, outputs)[0], outputs[0]
        self.recorder.add(self.model.name, self.model.branch, now, given.timestep, x, v)


def _repeats(x: Tensor, rows: int) -> bool:
    """Whether a batch is its first rows over and over."""
    parts = x.unflatten(0, (-1, rows))
    return bool((parts == parts[:1]).all())


def _on_host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).contiguous()
