"""The scope `forwards` of a patch at work: decides once a step, keeps what was computed, predicts the rest, and counts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.attach.clock import Clock
from diffusers_accel.attach.parallel import all_agree_to_compute
from diffusers_accel.attach.site import AttachedModel
from diffusers_accel.files import printable
from diffusers_accel.forwards.calls import ForwardReader, Given, opened
from diffusers_accel.forwards.forwards import Forwards
from diffusers_accel.forwards.indicator import check_indicator, indicator
from diffusers_accel.forwards.rule import GUIDE, NOISE, SINCE_COMPUTED, VIDEO, Computed, Now
from diffusers_accel.forwards.state import Branch, ForwardsTally, Generation, Glimpse, Stream
from diffusers_accel.forwards.video import video_view
from diffusers_accel.forwards.wrapper import wrap, wrapped_forward

Listener = Callable[[str, str, tuple[int, int]], None]

FIRST, LAST, UNNAMED = "first step of a generation", "last step", "a branch that is never predicted"
UNKNOWN, RULE, ALONE = "nothing earlier to predict from", "the rule", "first branch of a step"
UNGUIDED = (
    "no step of this call has a second forward like its first: there is no guidance, or both of its branches are one batch, of "
    "which half cannot be left out"
)


class Scope:
    """The forwards of all transformers of one pipeline.

    Args:
        forwards: rule and predictor.
        clock: of the pipeline.
        say: told, once a generation begins, where nothing of it can be predicted.
        predicted: called as (transformer, branch, (step, steps)) wherever a forward is predicted, so that what lives below
            knows that the step has passed.
    """

    def __init__(
        self, forwards: Forwards, clock: Clock, say: Callable[[str], None], predicted: Listener | None = None
    ) -> None:
        self.forwards = forwards
        self._clock = clock
        self._say = say
        self._predicted = predicted
        self._generation: Generation | None = None
        self.tallies: dict[str, ForwardsTally] = {}

    def attach(self, models: Sequence[AttachedModel]) -> Callable[[], None]:
        """Wraps their forwards; returns the function that takes everything off. Each model must be told of its forwards
        (`AttachedModel.observe`) before they run.

        Raises:
            ValueError: the rule belongs to another model, or looks at what a model does not have.
        """
        for model in models:
            self._check(model)
        undo: list[Callable[[], None]] = [self.forget]
        try:
            for model in models:
                self.tallies[model.name] = ForwardsTally()
                undo.append(wrap(model.module, model.name, _Interceptor(self, model)))
        except BaseException:
            _all(undo)
            raise
        return lambda: _all(undo)

    def _check(self, model: AttachedModel) -> None:
        forwards = self.forwards
        if forwards.rule.made_for not in (None, model.label):
            raise ValueError(
                f"{forwards.rule.label}: expected the model that its numbers were made for "
                f"({printable(forwards.rule.made_for)}), found {model.label}: give numbers of this model, or take a "
                "rule that needs none, such as seacache"
            )
        if forwards.indicator is not None:
            check_indicator(forwards.indicator, model.family)

    def clear(self) -> None:
        """Sets the counters to zero."""
        self.tallies = {name: ForwardsTally() for name in self.tallies}

    def forget(self) -> None:
        """Drops what is kept for later steps: the next forward begins anew."""
        self._generation = None

    def begin(self, model: AttachedModel, now: tuple[int, int]) -> Generation:
        """The generation that a forward of `model` belongs to, which begins."""
        branch, timesteps = model.branch, self._clock.timesteps
        generation = self._generation
        if generation is None or not generation.continues(branch, now, timesteps):
            self.forwards.rule.check(now[1])
            if remark := self.forwards.idle(now[1]):
                self._say(remark)
            reference = None if timesteps is None else weakref.ref(timesteps)
            generation = self._generation = Generation(model.name, now[1], reference)
            for tally in self.tallies.values():
                tally.steps = []
        second = generation.run == 0 and now[0] > generation.step
        if GUIDE in self.forwards.wants and second and not generation.guided:
            self._say(f"{self.forwards.label}: predicts nothing; {UNGUIDED}")
        generation.enter(model.name, branch, now[0])
        return generation

    def noise(self) -> float:
        """The share of noise in what the running forward is given."""
        noise = self._clock.noise()
        if noise is None:
            raise RuntimeError(
                f"{self.forwards.rule.label} looks at the noise level of each step, which neither the pipeline nor its scheduler "
                "says: pass it with Patch.step(i, steps, sigma) in a loop of your own; where each frame has its own level, as "
                "with diffusion forcing, take a rule that looks at none, such as easycache"
            )
        return noise

    def now(self) -> tuple[int, int]:
        now = self._clock.now()
        if now is None:
            raise RuntimeError(
                "forwards are predicted step by step, but neither the pipeline nor the model says which step runs: call "
                "Patch.step(i, steps) before each step of your own loop, or patch the pipeline instead of the transformer"
            )
        return now

    def predicts(self, branch: str) -> bool:
        """Whether forwards of this branch may be predicted at all."""
        return self.forwards.branches is None or branch in self.forwards.branches

    def skipped(self, transformer: str, branch: str, now: tuple[int, int]) -> None:
        """A forward is predicted: tells those below."""
        if self._predicted is not None:
            self._predicted(transformer, branch, now)


@dataclass
class _Call:
    """A forward that runs."""

    given: Given
    branch: str
    step: int
    generation: Generation
    seen: Glimpse


class _Interceptor:
    """Stands around the forward of one transformer."""

    def __init__(self, scope: Scope, model: AttachedModel) -> None:
        self._scope = scope
        self._model = model
        self._reader = ForwardReader(model.module, model.family)
        self._forward = wrapped_forward(model.module)

    @torch.compiler.disable(reason="decides whether the model runs")
    @torch.no_grad()
    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Call | None, Any]:
        prepares = self._model.family.prepares
        if prepares is not None and prepares(args, kwargs):
            return None, None
        now = self._scope.now()
        given = self._reader.read(args, kwargs)
        generation = self._scope.begin(self._model, now)
        seen = self._look(args, kwargs, generation)
        call = _Call(given, self._model.branch, now[0], generation, seen)
        state = generation.branches.get(call.branch, Branch())
        views = self._views(call, state, now)
        reason = self._must_compute(call, bool(views), now) or self._decision(generation, views)
        tally = self._scope.tallies[self._model.name]
        tally.branches.add(call.branch)
        if reason is not None:
            tally.why[reason] += 1
            return call, None
        predictor = self._scope.forwards.predictor
        outputs = [predictor.predict(view).to(view.last.v.dtype) for view in views]
        for stream, view in zip(state.streams, views, strict=True):
            stream.before = view.x.clone()
        since = SINCE_COMPUTED in self._scope.forwards.wants
        state.seen = Glimpse(seen.noise, state.seen.indicator if since else seen.indicator)
        self._lead(generation, outputs)
        tally.predicted += 1
        tally.cache_bytes = max(tally.cache_bytes, generation.bytes)
        self._scope.skipped(self._model.name, call.branch, now)
        return call, state.forms[given.return_dict].of(outputs)

    @torch.compiler.disable(reason="keeps what the model has computed")
    @torch.no_grad()
    def after(self, call: _Call | None, output: Any) -> None:
        if call is None:
            return
        scope, generation = self._scope, call.generation
        tally = scope.tallies[self._model.name]
        tally.computed += 1
        if call.step not in tally.steps[-1:]:
            tally.steps.append(call.step)
        if call.step == generation.steps - 1:
            generation.branches.pop(call.branch, None)
            return
        guided = GUIDE in scope.forwards.wants
        if not guided and not scope.predicts(call.branch):
            return
        # Clones: CUDA graphs write into their outputs again, and the latents are the caller's.
        outputs, form = opened(output, len(call.given.latents) if self._model.family.hands_back else None)
        vs = [v.detach().clone() for v in outputs]
        guides = generation.guide
        self._lead(generation, vs)
        if not scope.predicts(call.branch) or (guided and not _alike(vs, guides)):
            return
        generation.guided = guided
        xs = [x.clone() for x in self._reader.inputs_of(call.given.latents, vs)]
        state = generation.branches.setdefault(call.branch, Branch())
        if not state.fits(xs):
            state = generation.branches[call.branch] = Branch(tuple(Stream() for _ in xs))
        state.forms[call.given.return_dict], state.seen = form, call.seen
        each_guide: Sequence[Tensor | None] = guides or [None] * len(vs)
        for stream, x, v, guide in zip(state.streams, xs, vs, each_guide, strict=True):
            latest = Computed(call.step, call.given.timestep.clone(), x, v, guide)
            stream.computed = (*stream.computed, latest)[-scope.forwards.looks_back :]
            stream.before = x
        tally.cache_bytes = max(tally.cache_bytes, generation.bytes)

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], generation: Generation) -> Glimpse:
        """What is looked at of a forward beside its latents; an indicator only where a decision may be made on it."""
        forwards, model = self._scope.forwards, self._model
        noise = self._scope.noise() if NOISE in forwards.wants else None
        decided = generation.compute is not None or generation.step == generation.steps - 1
        if forwards.indicator is None or decided or not self._scope.predicts(model.branch):
            return Glimpse(noise)
        with model.looking_ahead():
            found = indicator(forwards.indicator, model.module, model.family, self._forward, args, kwargs)
        return Glimpse(noise, found)

    def _lead(self, generation: Generation, outputs: Sequence[Tensor]) -> None:
        """Keeps what the first branch of a step has given, where the others are predicted from it."""
        if GUIDE in self._scope.forwards.wants and generation.guide is None:
            generation.guide = tuple(outputs)

    def _views(self, call: _Call, state: Branch, now: tuple[int, int]) -> list[Now]:
        """What rule and predictor are shown of each output; nothing where nothing is known that fits."""
        given = call.given
        befores = [stream.before for stream in state.streams if stream.before is not None]
        if len(befores) != len(given.latents) or given.return_dict not in state.forms:
            return []
        xs = [self._reader.denoised(x, before) for x, before in zip(given.latents, befores, strict=True)]
        if not state.fits(xs):
            return []
        guides: Sequence[Tensor | None] = call.generation.guide or [None] * len(xs)
        video = None
        if VIDEO in self._scope.forwards.wants:
            video = video_view(xs[0], self._model.family.channels, self._model.layout)
        return [
            Now(
                step=now[0],
                steps=now[1],
                run=call.generation.run,
                branch=call.branch,
                timestep=given.timestep,
                x=x,
                before=before,
                computed=stream.computed,
                noise=call.seen.noise,
                noise_before=state.seen.noise,
                video=video if number == 0 else None,
                indicator=call.seen.indicator,
                indicator_before=state.seen.indicator,
                guide=guide,
            )
            for number, (x, before, stream, guide) in enumerate(zip(xs, befores, state.streams, guides, strict=True))
        ]

    def _must_compute(self, call: _Call, known: bool, now: tuple[int, int]) -> str | None:
        """Why the model has to run whatever the rule says, or None."""
        if not self._scope.predicts(call.branch):
            return UNNAMED
        if call.generation.run == 0:
            return FIRST
        if now[0] == now[1] - 1:
            return LAST
        if GUIDE in self._scope.forwards.wants and call.generation.guide is None:
            return ALONE
        if not known:
            if call.generation.compute is None:  # so does the rest of the step
                call.generation.compute, call.generation.carry = True, None
            return UNKNOWN
        return None

    def _decision(self, generation: Generation, views: list[Now]) -> str | None:
        """The decision of the step, made on its first branch: why the model runs, or None where it need not."""
        if generation.compute is None:
            rule = self._scope.forwards.rule  # it looks at the first output, which is the video
            wanted, generation.carry = rule.decide(views[0], generation.carry)
            generation.compute = all_agree_to_compute(wanted, self._model.module, views[0].x.device)
            generation.carry = None if generation.compute and not wanted else generation.carry
        return RULE if generation.compute else None


def _alike(outputs: Sequence[Tensor], others: Sequence[Tensor] | None) -> bool:
    """Whether one can be told by the others: a branch may have another batch than the first of its step."""
    return others is not None and [each.shape for each in outputs] == [each.shape for each in others]


def _all(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()
