"""What an error at each layer does to the output of the model: the forward of a measured step is run again for each layer.

Layers differ more than spans do, as what follows them makes something else of their errors. At a measured step, before the
pipeline's own forward, the model runs on the same input once densely and once for each layer with that layer alone sparse. What
that changes in the layer's own output (after the output projection) and in the model's output is seen exactly, on whole calls:

    gain(layer) = |v_layer - v|^2 / |v|^2  over  |W (O - O_dense)|^2 / |W O_dense|^2

With guidance v is what reaches the latents (`search.joining`). A gain is measured with the candidates themselves, at
`sensitivity.DENSITY`, without what they keep of earlier steps. It takes layers + 1 forwards for each branch of a measured step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_accel.attach.host_caches import caches_on
from diffusers_accel.attach.site import AttachedModel, Engine, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.forwards.calls import opened
from diffusers_accel.methods import Drop, Method
from diffusers_accel.run.launch import run
from diffusers_accel.run.partition import Partitions
from diffusers_accel.search.joining import branches_of, joined_by, told_of_steps
from diffusers_accel.search.plan_making import plan_tensors
from diffusers_accel.search.running import known
from diffusers_accel.search.schedule import chosen_steps, span_index
from diffusers_accel.search.scores import Array, Scores

UNSEEN = (
    "how this pipeline joins the branches of guidance could not be seen in what its scheduler is given: each branch counts as "
    "much as the others in the weights of the layers"
)
CACHED = "a cache of diffusers is on, which takes a forward that is run again for the next step: all layers have equal weights"
_ALL_DENSE = -1


@dataclass
class _Forward:
    """One forward of a measured step, on the CPU.

    Args:
        output: of the model, dense.
        given: what the generation's own run of it gave, by which is seen how branches are joined; None: it did not end.
        changes: per layer, what the model's output changes by where that layer is sparse.
        felt: per layer, the energy of its error and of its dense output.
    """

    output: Tensor
    given: Tensor | None = None
    changes: list[Tensor] = field(default_factory=list)
    felt: list[tuple[float, float]] = field(default_factory=list)


class LayerGains:
    """Measures the gains of one span during a generation, whose own course it does not change.

    Args:
        scores: of the candidates.
        span: the gains of which are measured.
        choice: int [spans, layers, heads] per transformer: what a layer does where it alone is sparse, in that span.
        normal: makes what attends in the generation itself.
        probe_steps: measured steps of the span.
        say: told what cannot be measured as it should be.
    """

    def __init__(
        self,
        scores: Scores,
        span: int,
        choice: Mapping[str, Array],
        normal: Callable[[Site], Engine],
        probe_steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._scores = scores
        self._span = span
        self._choice = choice
        self._normal = normal
        self._probe_steps = probe_steps
        self._say = say
        self._partitions = Partitions(plan_tensors(scores, choice))
        self._hooks: dict[str, tuple[Any, Any]] = {}
        self._layer: int | None = (
            None  # that is sparse in the forward that is run again; None: the generation's own runs
        )
        self._energies = [0.0, 0.0]  # of this layer
        self._forwards: list[_Forward] = []  # of the running step
        self._transformer = ""  # that has run them
        # Per transformer [2, layers]: sums over measured steps of relative errors, of the model's output and of the layer's own
        self._sums = {name: np.zeros((2, model.layers)) for name, model in scores.models.items()}

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Around the generation that `engine` attends in."""
        try:
            with told_of_steps(pipe, self._join):
                yield
        finally:
            while self._hooks:
                for hook in self._hooks.popitem()[1]:
                    hook.remove()

    def engine(self, site: Site) -> Engine:
        model = site.model
        if model.name not in self._hooks:
            before = model.module.register_forward_pre_hook(partial(self._before, model), with_kwargs=True)
            self._hooks[model.name] = before, model.module.register_forward_hook(self._after)
        return _SiteEngine(self, site, self._normal(site))

    def found(self) -> dict[str, Array]:
        """Per transformer [layers]: the gains, 0 or more; call it after the run. A layer whose error was 0 has the mean of the
        others; 0 where the transformer was not measured."""
        self._join(None, None)
        return {name: _gains(*sums) for name, sums in self._sums.items()}

    def attend(self, site: Site, normal: Engine, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._layer is None:
            return normal.attend(call, q, k, v)
        assert call.dense is not None
        dense = call.dense(q, k, v)
        if self._layer != call.layer:
            return dense
        candidates = self._scores.candidates
        chosen = self._choice[call.transformer][self._span, call.layer]
        mix = self._partitions.mix(_alone(candidates[index]) for index in chosen)
        out = run(self._partitions.find(mix, call, q.device), call, q, k, v).out
        self._feel(site, call, out, dense)
        return out

    @torch.compiler.disable(reason="runs the forward again, for each layer")
    @torch.no_grad()
    def _before(self, model: AttachedModel, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The forward pre-hook. Before, not after: what CUDA graphs give is overwritten by the next forward."""
        prepares = model.family.prepares
        if self._layer is not None or (prepares is not None and prepares(args, kwargs)):
            return
        model.observe(args, kwargs)  # so that the clock knows the step; the patch's own hook comes later
        if not self._measures(model):
            return
        self._transformer = model.name
        try:
            forward = _Forward(self._run(_ALL_DENSE, module, args, kwargs))
            for layer in range(model.shape.layers):
                changed = self._run(layer, module, args, kwargs)
                forward.changes.append((changed.float() - forward.output.float()).to(changed.dtype))
                forward.felt.append((self._energies[0], self._energies[1]))
        finally:
            self._layer = None
        self._forwards.append(forward)

    @torch.compiler.disable(reason="copies what the model has computed")
    @torch.no_grad()
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._layer is None and self._forwards and self._forwards[-1].given is None:
            (given, *_), _ = opened(output)
            self._forwards[-1].given = given.detach().to("cpu", copy=True)

    def _measures(self, model: AttachedModel) -> bool:
        step, steps = known(model.clock.now())
        spans = self._scores.spans
        if span_index(spans, step, steps) != self._span or step not in chosen_steps(spans, steps, self._probe_steps):
            self._join(None, None)
            return False
        if caches_on(model.module):
            self._say(CACHED)
            return False
        return True

    def _run(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Tensor:
        """The model's output, of several the first, on the CPU."""
        self._layer, self._energies = layer, [0.0, 0.0]
        (output, *_), _ = opened(module(*args, **kwargs))
        return output.detach().to("cpu", copy=True)

    def _feel(self, site: Site, call: AttentionCall, out: Tensor, dense: Tensor) -> None:
        """Adds the energies of a layer's error and of its output, after its projection, for the tokens that exist."""
        linear = site.model.family.output_projection(site.model.module, site.name)

        def energy(heads: Tensor) -> float:
            rows = heads[:, : call.layout.existing_queries].flatten(2).flatten(0, 1)
            projected = linear(rows) - linear(torch.zeros_like(rows[:1]))
            return float(torch.linalg.vector_norm(projected, dtype=torch.float32)) ** 2

        # The difference is taken before it is rounded and projected: after it, rounding would be most of it.
        self._energies[0] += energy((out.float() - dense.float()).to(dense.dtype))
        self._energies[1] += energy(dense)

    def _join(self, joined: Tensor | None, latents: Tensor | None) -> None:
        """The step's forwards are done: what reaches the latents is `joined`, or nobody says."""
        forwards, self._forwards = self._forwards, []
        if not forwards:
            return
        outputs = [forward.output for forward in forwards]
        given = [forward.given for forward in forwards if forward.given is not None]
        branches: list[Tensor] = []
        weights: list[float] | None = None
        if joined is not None and len(given) == len(forwards):
            branches = branches_of(outputs, joined)
            weights = joined_by(branches_of(given, joined), joined, latents)
        if weights is None:
            self._say(UNSEEN)
        sums = self._sums[self._transformer]
        for layer in range(sums.shape[1]):
            changes = [forward.changes[layer] for forward in forwards]
            off, whole = np.sum([forward.felt[layer] for forward in forwards], axis=0)
            if weights is None or joined is None:
                effect = float(np.mean([_share(c, v) for c, v in zip(changes, outputs, strict=True)]))
            else:
                effect = _share(_sum(weights, branches_of(changes, joined)), _sum(weights, branches))
            sums[:, layer] += effect, off / whole if whole else 0.0


@dataclass(frozen=True)
class _SiteEngine:
    gains: LayerGains
    site: Site
    normal: Engine

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.gains.attend(self.site, self.normal, call, q, k, v)


def _alone(method: Method) -> Method:
    """A method in one forward, which knows of no earlier step and would only begin to keep something."""
    return replace(method, rest=Drop()) if method.rest.remembers else method


def _gains(effect: Array, error: Array) -> Array:
    felt = error > 0
    gains = np.divide(effect, error, out=np.zeros_like(effect), where=felt)
    return np.where(felt, gains, gains[felt].mean() if felt.any() else 0.0)


def _sum(weights: list[float], branches: list[Tensor]) -> Tensor:
    return torch.stack([weight * branch.float() for weight, branch in zip(weights, branches, strict=True)]).sum(0)


def _share(change: Tensor, whole: Tensor) -> float:
    """The energy of a change, relative to that of the whole; 0 of nothing."""
    energies = [float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2 for x in (change, whole)]
    return energies[0] / energies[1] if energies[1] else 0.0
