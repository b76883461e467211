"""What diffusers itself can do instead of a patch, or below one: its own caches, and dense attention in another backend.

As subjects of a comparison they have names with parameters, as methods do: ("first_block_cache", {"threshold": 0.1}),
("backend", {"name": "sage"}), alone or in a list with what `patch` takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import diffusers
import msgspec
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from diffusers_accel.attach.host_caches import caches_on
from diffusers_accel.families import find
from diffusers_accel.files import quoted
from diffusers_accel.support.suggest import did_you_mean

BACKEND = "backend"
CACHES = {
    "first_block_cache": "FirstBlockCacheConfig",
    "mag_cache": "MagCacheConfig",
    "sea_cache": "SeaCacheConfig",
    "taylorseer_cache": "TaylorSeerCacheConfig",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcastConfig",
    "faster_cache": "FasterCacheConfig",
}
HOSTS = (*CACHES, BACKEND)
OURS = ("calibrate", "current_timestep_callback")  # parameters that are not the user's to give here
CLOCK, STEPS = "current_timestep_callback", "num_inference_steps"


@dataclass(frozen=True)
class HostUse:
    """What of diffusers is on while a subject runs.

    Args:
        cache: one of `CACHES`, with `parameters` of its configuration.
        backend: of attention, as `set_attention_backend` takes it.
    """

    cache: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None

    @property
    def label(self) -> str:
        """In words; "" for nothing."""
        given = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        cache = f"{CACHES[self.cache].removesuffix('Config')}{f' ({given})' if given else ''}" if self.cache else ""
        backend = f"attention in its backend {self.backend}" if self.backend else ""
        return " and ".join(filter(None, (cache, backend)))


def named_host(name: object) -> bool:
    return isinstance(name, str) and name in HOSTS


def apart(subject: Any, parameters: Mapping[str, Any]) -> tuple[HostUse, Any, Mapping[str, Any]]:
    """What of a subject is diffusers', and what `patch` takes of it, with its parameters: "dense" where nothing is left.

    Raises:
        TypeError, ValueError: a parameter that there is not, or of another type; two caches, or two backends.
    """
    if named_host(subject):
        return _of_host([(subject, parameters)]), "dense", {}
    if isinstance(subject, Mapping):
        subject = [*subject.items()]
    if not isinstance(subject, (list, tuple)):
        return HostUse(), subject, parameters
    pairs = [item if isinstance(item, tuple) and len(item) == 2 else (item, {}) for item in subject]
    mine = [pair for pair in pairs if named_host(pair[0])]
    if not mine:
        return HostUse(), subject, parameters
    others = [item for item, pair in zip(subject, pairs) if not named_host(pair[0])]
    return _of_host(mine), (others if len(others) > 1 else others[0]) if others else "dense", parameters


def _of_host(items: list[tuple[str, Mapping[str, Any]]]) -> HostUse:
    caches = [item for item in items if item[0] != BACKEND]
    backends = [item for item in items if item[0] == BACKEND]
    if len(caches) > 1 or len(backends) > 1:
        raise ValueError(
            f"diffusers runs one cache and one backend of attention at a time, found {', '.join(name for name, _ in items)}"
        )
    for name, parameters in items:
        _check(name, parameters)
    cache, parameters = caches[0] if caches else (None, {})
    return HostUse(cache, dict(parameters), backends[0][1]["name"] if backends else None)


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters of a name that are plain data, with the types of their values."""
    if name == BACKEND:
        return {"name": str}
    config = _config(name)
    known, kinds = inspect.signature(config).parameters, get_type_hints(config)
    found = {each: _plain_kind(kinds[each]) for each in known if not each.startswith("_") and each not in OURS}
    return {each: kind for each, kind in found.items() if kind is not None}


def _plain_kind(kind: Any) -> Any:
    """A type without what JSON cannot hold; None where nothing is left."""
    if kind in (bool, int, float, str):
        return kind
    options = [each for each in get_args(kind) if each is not Ellipsis]
    if get_origin(kind) in (list, tuple):
        many = get_origin(kind) is list or Ellipsis in get_args(kind)
        plain = bool(options) and all(each in (int, float, str) for each in options)
        return (list[options[0]] if many else kind) if plain else None  # type: ignore[valid-type]
    found = [each for each in map(_plain_kind, options) if each is not None]
    return found[0] if found and NoneType in get_args(kind) else None


def _config(name: str) -> Any:
    try:
        return getattr(diffusers, CACHES[name])
    except AttributeError:
        raise ValueError(f"diffusers {diffusers.__version__} has no {CACHES[name]}: take a newer one") from None


def _check(name: str, parameters: Mapping[str, Any]) -> None:
    known = parameters_of(name)
    for each, value in parameters.items():
        if each not in known:
            raise TypeError(
                f"{name!r} has no parameter {quoted(each)}{did_you_mean(str(each), known)}; it has {', '.join(known)}"
            )
        try:
            msgspec.convert(value, known[each])
        except msgspec.ValidationError as error:
            raise TypeError(f"{each} of {name!r}: {error}, found {quoted(value)}") from None
    if name == BACKEND:
        _check_backend(parameters.get("name"))


def _check_backend(name: str | None) -> None:
    known = [each.value for each in AttentionBackendName]
    if name not in known:
        raise ValueError(
            "backend: expected the name of one of diffusers' (its AttentionBackendName), such as "
            '("backend", {"name": "sage"}), found '
            f"{quoted(name)}{did_you_mean(str(name), known)}"
        )


@contextmanager
def switched_on(pipe: Any, use: HostUse, steps: int) -> Iterator[None]:
    """Inside, all transformers of the pipeline that a patch may change run with it; afterwards they are as before.

    Args:
        steps: of the call, which MagCache has to know.

    Raises:
        TypeError: a transformer has no caches, or the pipeline does not say its timestep, which the cache asks for.
        ValueError: a cache is on already, or diffusers refuses the parameters.
        RuntimeError: the backend cannot run here.
    """
    with ExitStack() as stack:
        for name, (module, _) in find(pipe).items():
            transformer: Any = module
            if use.backend:
                stack.enter_context(_in_backend(transformer, use.backend))
            if use.cache:
                _check_free(name, transformer)
                transformer.enable_cache(_made(pipe, use.cache, use.parameters, steps))
                stack.callback(transformer.disable_cache)
                if not caches_on(transformer):
                    raise ValueError(
                        f"{name}: {use.cache} knows no module of {type(transformer).__name__}, and so would do nothing; "
                        "name some, where it takes names (cache_identifiers)"
                    )
        yield


def _check_free(name: str, transformer: Any) -> None:
    if not hasattr(transformer, "enable_cache"):
        raise TypeError(f"{name}: {type(transformer).__name__} has none of diffusers' caches (no enable_cache)")
    if transformer.is_cache_enabled:
        raise ValueError(
            f"{name}: a cache of diffusers is on already, also in the dense runs: call its disable_cache() first"
        )


def _made(pipe: Any, name: str, parameters: Mapping[str, Any], steps: int) -> Any:
    config, given = _config(name), dict(parameters)
    known = inspect.signature(config).parameters
    if CLOCK in known:
        if not hasattr(type(pipe), "current_timestep"):
            raise TypeError(f"{name} asks for the running timestep, which {type(pipe).__name__} does not say")
        given[CLOCK] = lambda: pipe.current_timestep
    if STEPS in known:
        given.setdefault(STEPS, steps)
    return config(**given)


@contextmanager
def _in_backend(transformer: Any, backend: str) -> Iterator[None]:
    """Inside, its attention runs in a backend of diffusers; afterwards in the one of before, each layer in its own."""
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    before = [(each, each._attention_backend) for each in processors if hasattr(each, "_attention_backend")]
    if not before:
        raise TypeError(f"{type(transformer).__name__}: its attention takes no backend of diffusers")
    try:
        with attention_backend(backend):  # checks it, and is for what asks the process
            try:
                for processor, _ in before:
                    processor._attention_backend = AttentionBackendName(backend)
                yield
            finally:
                for processor, own in before:
                    processor._attention_backend = own
    except ImportError as error:
        raise RuntimeError(f"the backend {backend} cannot run here: {error}") from error
