"""`patch` and `unpatch`: check, build the sites, attach; and take everything off again."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from diffusers_accel.arguments import checked_parameters, wrong_plan
from diffusers_accel.attach.clock import Clock, tells_steps
from diffusers_accel.attach.host_caches import caches_on
from diffusers_accel.attach.parallel import refusal, unfit
from diffusers_accel.attach.processor import attend_densely, redirect, restore, site_of
from diffusers_accel.attach.site import AttachedModel, Engine, Site, Timer, set_processor
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.forwards import Forwards
from diffusers_accel.forwards.report import ForwardsReport
from diffusers_accel.forwards.scope import Scope
from diffusers_accel.forwards.wrapper import Interceptor, wrap
from diffusers_accel.kernels.kept import forget_kept
from diffusers_accel.kernels.ranking import eight_bits_left_out
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import AUTO, NAMED, Method, Recipe
from diffusers_accel.plan import Plan
from diffusers_accel.plan.size import check_size, planned_size
from diffusers_accel.preset import PRESET, preset_by_size, preset_recipe
from diffusers_accel.report import PatchReport, strangers
from diffusers_accel.run.by_size import BySize
from diffusers_accel.run.engine import PlanEngine
from diffusers_accel.run.memory import CACHE_MEMORY_FRACTION, CacheManager
from diffusers_accel.run.partition import Partitions
from diffusers_accel.run.remarks import Remarks
from diffusers_accel.shape import ModelShape
from diffusers_accel.starter import PLANNERS
from diffusers_accel.subject import Patchable, split
from diffusers_accel.support.former import warn_former
from diffusers_accel.support.log import LOG


class Attachment:
    """Sites attached to the transformers of a pipeline; a context manager that detaches them at the end."""

    def __init__(self, models: list[AttachedModel], sites: list[Site], clock: Clock) -> None:
        self.sites = sites
        self._models = models
        self._clock = clock
        self._undo: list[Callable[[], object]] = [self._restore_processors]

    def step(self, index: int, steps: int, sigma: float | None = None) -> None:
        """For your own denoising loop: says that step `index` (from 0) of `steps` runs next. A plan whose spans are windows of
        sigma asks for its noise level too, in 0..1."""
        self._clock.set(index, steps, sigma)

    @contextmanager
    def timed(self) -> Iterator[Timer]:
        """Measures the time spent in the patched self-attention; read `attention_ms` of what it gives.

        Raises:
            ValueError: the patch leaves attention as it is.
        """
        if not self.sites:
            raise ValueError(
                'the patch leaves attention as it is, so its time is not measured: compose with "dense", as in '
                'patch(pipe, ["easycache", "dense"])'
            )
        timer = Timer()
        for site in self.sites:
            site.timer = timer
        try:
            yield timer
        finally:
            for site in self.sites:
                site.timer = None

    def watch(self, around: Callable[[AttachedModel], Interceptor]) -> None:
        """Puts `around(model)` around the forwards of every transformer, until `unpatch`."""
        for model in self._models:
            self._undo.append(wrap(model.module, model.name, around(model)))

    def unpatch(self) -> None:
        """Gives every module its own processor back, bit for bit; harmless when done already.

        A module whose processor was replaced in the meantime keeps the one that it has.
        """
        while self._undo:
            self._undo.pop()()

    def _restore_processors(self) -> None:
        for site in self.sites:
            site.take_off(restore)
        for remark in strangers(self.sites):
            LOG.warning("%s", remark)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()


class Patch(Attachment):
    """A pipeline at work under a plan. `repr` says what was done, `report()` what has run since."""

    def __init__(
        self,
        attachment: Attachment,
        plan: Plan,
        engines: list[PlanEngine],
        remarks: Remarks,
        forwards: Scope | None = None,
        by_size: BySize | None = None,
    ) -> None:
        super().__init__(attachment._models, attachment.sites, attachment._clock)
        self._undo = attachment._undo
        self._plan = plan
        self._by_size = by_size
        self._engines = engines
        self._remarks = remarks
        self._forwards = forwards

    @property
    def plan(self) -> Plan:
        """What is computed; where it depends on the size of a call, as in the last one."""
        return self._by_size.plan if self._by_size else self._plan

    @property
    def forwards(self) -> Forwards | None:
        """Which forwards are computed, and how the others are predicted; None: all are computed. It stands in `plan` too."""
        return self.plan.forwards

    @property
    def layout(self) -> TokenLayout | None:
        """How the tokens of the last call lay; None before one."""
        return next((engine.tally.layout for engine in self._engines if engine.tally.layout), None)

    def report(self) -> PatchReport:
        """What ran since patching or `clear`: per layer, methods, kernels, realised density and notes."""
        caches = [remark for model in self._models for remark in caches_on(model.module)]
        forwards = ForwardsReport.of(self._forwards) if self._forwards else None
        return PatchReport.of(self._engines, [*strangers(self.sites), *caches, *self._remarks.said], forwards)

    def clear(self) -> None:
        """Sets the counters of `report` to zero."""
        for engine in self._engines:
            engine.clear()
        self._remarks.clear()
        if self._forwards:
            self._forwards.clear()

    def __repr__(self) -> str:
        mix = ", ".join(
            f"{self.plan.methods[symbol].label} {share:.0%}" for symbol, share in self.plan.shares().items()
        )
        state = "" if self._undo else " (unpatched)"
        layers = "; ".join(
            f"{model.name}: {self._count(model)} self-attention layers patched" for model in self._models
        )
        size = planned_size(self.plan)
        made_for = f"; plan made for {size}" if size else ""
        made_for += "; the size of a call decides its density" if self._by_size else ""
        forwards = f"; forwards: {self.forwards.label}" if self.forwards else ""
        correct = f"; correct: {self.plan.correct.label}" if self.plan.correct else ""
        return (
            f"<Patch {self.plan.family}{state}: {layers}; heads over the schedule: {mix}{made_for}{forwards}{correct}>"
        )

    def _count(self, model: AttachedModel) -> str:
        return f"{sum(site.model is model for site in self.sites)}/{model.shape.layers}"


def patch(
    pipe: Any,
    plan: Patchable = None,
    /,
    *,
    cache_memory_fraction: float = CACHE_MEMORY_FRACTION,
    **parameters: Any,
) -> Patch:
    """Makes the self-attention of a diffusers video pipeline sparse, in place.

    Args:
        pipe: a loaded pipeline with all that you did to it (LoRA, offload, quantization), or its transformer. Pass the
            pipeline where you can: it knows which step runs.
        plan: a Plan, a path to a plan file, the name of a method ("dense", "pattern", "draft", "cached", "reordered"),
            "starter" (a plan for checkpoints whose heads are known), a Method for all heads, or a Recipe; or a step cache, by
            name ("easycache", "schedule") or as Forwards, which leaves attention as it is, as does a plan that holds only a
            step cache. A list of one of each composes them: ["easycache", ("draft", {"density": 0.3})].
            None takes "draft" at a density that falls with the number of tokens, with the dense steps and layers of the family,
            and stays dense where sparse attention cannot win; a line in the log and in the report says which. Parameters of
            "draft" that are given hold.
        cache_memory_fraction: share of the memory that is free at the first call which methods with a cache may fill, in [0, 1].
            Layers whose cache does not fit stay dense, and the report says so.
        **parameters: of the named method, such as density=0.3 or precision="int8".

    Returns:
        The Patch. As a context manager it unpatches at the end of the block; otherwise `unpatch(pipe)` does.

    Raises:
        TypeError: for what is no pipeline or has no transformer of a supported family, for what is no plan, and for a parameter
            that the method does not have or of another type.
        ValueError: for a plan that does not fit the model or leaves all of it dense, a method that nothing here can run,
            "starter" on a model that it has no plan for, a patched pipeline, or a modular one that does not say its step.
        FileNotFoundError: for a plan file that does not exist.
    """
    caches = CacheManager(_cache_memory_fraction(cache_memory_fraction, parameters))
    scopes = split(plan, parameters)
    found = find(pipe)
    shapes = {name: family.shape(module) for name, (module, family) in found.items()}
    family = next(iter(found.values()))[1].name
    asked = scopes.parameters if scopes.heads is not None else checked_parameters(PRESET, scopes.parameters)
    chosen = _choose(pipe, scopes.heads, asked, found)
    if isinstance(chosen, Recipe):
        _check_leaves_something(chosen, shapes)
    chosen = _with_precision(chosen, pipe, found)
    resolved = chosen if isinstance(chosen, Plan) else Plan.uniform(chosen, family=family, models=shapes)
    resolved.check(shapes, family=family)
    if scopes.forwards != resolved.forwards:
        resolved = replace(resolved, forwards=scopes.forwards)
    if scopes.heads is not None:
        _check_history(resolved, found)
        _check_kernels(pipe, resolved, found)
    by_size = None
    if scopes.heads is None and isinstance(chosen, Recipe) and not resolved.dense:
        by_size = preset_by_size(chosen, resolved, found, asked)
    partitions = Partitions(resolved.tensors)
    engines: list[PlanEngine] = []
    remarks = Remarks()

    def make_engine(site: Site) -> PlanEngine:
        engines.append(PlanEngine(site, resolved, partitions, caches, remarks, by_size))
        return engines[-1]

    attachment = attach(pipe, make_engine if scopes.attends else None)
    attachment._undo += [caches.clear, partitions.clear]
    for model in attachment._models:
        model.expects = partial(check_size, resolved, model.name)
    predicting = _predict(attachment, scopes.forwards, caches, remarks) if scopes.forwards else None
    done = Patch(attachment, resolved, engines, remarks, predicting, by_size)
    LOG.info("%r", done)
    return done


def _cache_memory_fraction(given: float, parameters: dict[str, Any]) -> float:
    """What was given under this name or, in `parameters`, from which it is taken, under the former one."""
    if "max_cache" not in parameters:
        return given
    if given != CACHE_MEMORY_FRACTION:
        raise ValueError("'max_cache' is the former name of 'cache_memory_fraction', found both: leave 'max_cache' out")
    warn_former("max_cache", "cache_memory_fraction", "patch")
    former: float = parameters.pop("max_cache")
    return former


def attach(pipe: Any, make_engine: Callable[[Site], Engine] | None) -> Attachment:
    """Puts `make_engine(site)` in charge of every self-attention module; `patch` with an engine of your own. None leaves them.

    Raises:
        ValueError: when the pipeline is patched already, or its transformer runs under ring or tensor parallelism.
    """
    found = find(pipe)
    _check_free(found)
    if not tells_steps(pipe):
        raise ValueError(
            f"this {type(pipe).__name__} is a modular pipeline with no guider, and no block of it is given the timestep t of a "
            "denoising loop, so nothing says which step runs: give it a guider, or patch(pipe.transformer, ...) and call "
            "Patch.step(i, steps) before each step"
        )
    clock = Clock(None if isinstance(pipe, nn.Module) else pipe)
    attachment = Attachment([], [], clock)
    attachment._undo.insert(0, _at_work(attachment))
    try:
        for name, (module, family) in found.items():
            model = AttachedModel(name, module, family, clock)
            attachment._models.append(model)
            if make_engine is not None:
                for layer, (path, attention) in enumerate(family.self_attention(module)):
                    _attach_site(model, layer, path, attention, make_engine, attachment)
            hook = module.register_forward_pre_hook(_Observer(model, attachment), with_kwargs=True)
            attachment._undo += [hook.remove, clock.listen(module)]
    except BaseException:
        attachment.unpatch()
        raise
    return attachment


def _predict(attachment: Attachment, forwards: Forwards, caches: CacheManager, remarks: Remarks) -> Scope:
    """Puts a step cache around the forwards of what is attached."""
    scope = Scope(forwards, attachment._clock, remarks.say, caches.carry)
    try:
        attachment._undo.append(scope.attach(attachment._models))
    except BaseException:
        attachment.unpatch()
        raise
    return scope


def unpatch(pipe: Any) -> None:
    """Takes off whatever `patch` put on; the modules, hooks and settings are then as before.

    Raises:
        ValueError: when nothing of ours is attached to it.
    """
    attachments = _attachments(find(pipe))
    if not attachments:
        raise ValueError(f"this {type(pipe).__name__} is not patched: nothing to take off")
    for attachment in attachments:
        attachment.unpatch()


_AT_WORK: set[int] = set()
_TICKETS = itertools.count()


def _at_work(attachment: Attachment) -> Callable[[], object]:
    """Counts an attachment as at work until the function that this returns is called, or nobody holds it any more.

    What is kept for the process is dropped when none is left.
    """
    ticket = next(_TICKETS)
    _AT_WORK.add(ticket)
    done = weakref.finalize(attachment, _off_work, ticket)
    done.atexit = False
    return done


def _off_work(ticket: int) -> None:
    _AT_WORK.discard(ticket)
    if not _AT_WORK:
        forget_kept()


class _Observer:
    """The forward pre-hook, by which a patch is found; in a copy or pickle of the model it does nothing."""

    def __init__(self, model: AttachedModel | None = None, attachment: Attachment | None = None) -> None:
        self.model = model
        self.attachment = attachment

    # Inside a larger compiled function its effects would come after the graph, a call too late.
    @torch.compiler.disable(reason="notes how the tokens of this call lie")
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.model is not None:
            self.model.observe(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Observer, ()


def _attach_site(
    model: AttachedModel,
    layer: int,
    path: str,
    attention: Any,
    make_engine: Callable[[Site], Engine],
    attachment: Attachment,
) -> None:
    stock = attention.processor

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_densely(processor, model.family.attention_call, q, k, v)

    site = Site(model, layer, path, attention, dense)
    site.engine = make_engine(site)
    site.attachment = attachment
    site.processor = processor = redirect(site, stock)
    set_processor(attention, processor)
    attachment.sites.append(site)


def _choose(pipe: Any, plan: Any, parameters: dict[str, Any], found: dict[str, Any]) -> Plan | Recipe | Method:
    """What to run, or of what `patch(pipe)` makes that for each size."""
    if plan is None:
        reason = next((reason for _, reason in _refusals(pipe, NAMED[PRESET]().heads, found)), None)
        if reason is None:
            return preset_recipe(found, parameters)
        LOG.warning("staying dense: no sparse kernel can run here (%s)", reason)
        return NAMED["dense"]()
    if isinstance(plan, str) and plan in NAMED:
        return NAMED[plan](**checked_parameters(plan, parameters))
    if isinstance(plan, str) and plan in PLANNERS:
        return PLANNERS[plan](**checked_parameters(plan, parameters)).plan(found)
    if not isinstance(plan, (Plan, Recipe, Method)):
        raise wrong_plan(plan)
    return plan


def _check_leaves_something(recipe: Recipe, shapes: dict[str, ModelShape]) -> None:
    """Refuses dense steps and layers that leave the methods of a recipe nothing to do."""
    if all(method.dense for method in recipe.heads):
        return
    if recipe.dense_steps == 1:
        raise ValueError('dense_steps=1 leaves all steps dense: give a share below 1, or take the method "dense"')
    for name, shape in shapes.items():
        if recipe.dense_layers >= shape.layers:
            raise ValueError(
                f"dense_layers={recipe.dense_layers} leaves nothing of {name}, which has {shape.layers} self-attention layers: "
                f'give at most {shape.layers - 1}, or take the method "dense"'
            )


def _with_precision(chosen: Plan | Recipe | Method, pipe: Any, found: dict[str, Any]) -> Plan | Recipe | Method:
    """Settles the precision of a recipe that leaves it to the device: int8 where a GPU's kernel has it and it is not left out."""
    if not isinstance(chosen, Recipe) or all(method.precision != AUTO for method in chosen.heads):
        return chosen
    quantized = replace(
        chosen, heads=tuple(replace(m, precision="int8") if m.precision == AUTO else m for m in chosen.heads)
    )
    reason = next((reason for _, reason in _refusals(pipe, quantized.heads, found)), None)
    devices = [_device(pipe, module) for module, _ in found.values()]
    if reason is None and any(device.type == "cpu" for device in devices):
        reason = "int8 would only be simulated on a CPU"
    reason = reason or next((why for device in devices if (why := eight_bits_left_out(device))), None)
    if reason is None:
        return quantized
    LOG.info("products stay in the model's own precision: %s", reason)
    heads = tuple(replace(method, precision="input") for method in quantized.heads)
    return replace(chosen, heads=heads)


def _check_history(plan: Plan, found: dict[str, Any]) -> None:
    """Refuses methods for chunks and their history where a model makes all of a video at once."""
    other = next((family.name for _, family in found.values() if not family.history), None)
    needy = next((method for method in plan.methods.values() if method.select.needs_history), None)
    if needy is not None and other is not None:
        known = ", ".join(family.name for family in FAMILIES.values() if family.history)
        raise ValueError(
            f'"{needy.label}" ("history") is for models that make a video chunk by chunk, each with a history ({known}), '
            f'found {other}, whose frames are made together: take "cached", which keeps what a selection leaves out'
        )


def _device(pipe: Any, module: nn.Module) -> torch.device:
    """Where it runs. The weights of a transformer that accelerate offloads lie elsewhere until then."""
    offloaded = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in module.modules())
    places = itertools.chain([getattr(pipe, "_execution_device", None)], offloaded, [next(module.parameters()).device])
    return torch.device(next(place for place in places if place is not None))


def _check_kernels(pipe: Any, plan: Plan, found: dict[str, Any]) -> None:
    for method, reason in _refusals(pipe, tuple(plan.methods.values()), found):
        raise ValueError(f'"{method.label}" cannot run here: {reason}. Use "dense", or patch(pipe) to let it choose.')


def _refusals(pipe: Any, methods: tuple[Method, ...], found: dict[str, Any]) -> Iterator[tuple[Method, str]]:
    for module, family in found.values():
        for method in methods:
            if reason := method.refuses(family.shape(module).head_dim, _device(pipe, module), module.dtype):
                yield method, reason


def _attachments(found: dict[str, Any]) -> list[Attachment]:
    """Whatever of ours is on these transformers, also where the user has replaced every processor since."""
    attached: dict[int, Attachment] = {}
    for module, family in found.values():
        ours = [hook.attachment for hook in module._forward_pre_hooks.values() if isinstance(hook, _Observer)]
        processors = [attention.processor for _, attention in family.self_attention(module)]
        ours += [site.attachment for site in map(site_of, processors) if site is not None]
        attached |= {id(each): each for each in ours if each is not None}
    return list(attached.values())


def _check_free(found: dict[str, Any]) -> None:
    if _attachments(found):
        raise ValueError("it is patched already: call diffusers_accel.unpatch on it first")
    for name, (module, family) in found.items():
        for _, attention in family.self_attention(module):
            if reason := refusal(getattr(attention.processor, "_parallel_config", None)):
                raise ValueError(f"{name}: {reason}")
        parallel = getattr(module, "_parallel_config", None)
        if reason := refusal(parallel) or (unfit(family, module) if parallel is not None else None):
            raise ValueError(f"{name}: {reason}")
