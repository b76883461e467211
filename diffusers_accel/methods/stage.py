"""What all stages of a method share: how one is made."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from diffusers_accel.methods.former import no_parameter


class Stage:
    """A frozen dataclass, whose fields are its parameters.

    Class attributes:
        given_as: how a method is made with it, for those who give it where a method is expected.

    Raises:
        TypeError: for a parameter that it does not have, with the one that was meant or that had this name before.
    """

    given_as: ClassVar[str]

    def __new__(cls, *values: Any, **parameters: Any) -> Self:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # members are dataclasses
        for name in parameters:
            if name not in known:
                raise no_parameter(cls.__name__, name, known)
        return super().__new__(cls)
