"""The project's logger: its own handler, and diffusers' verbosity unless DIFFUSERS_ACCEL_VERBOSITY says otherwise."""

from __future__ import annotations

import logging
import os

LOG = logging.getLogger("diffusers_accel")


def _set_up() -> None:
    level = os.environ.get("DIFFUSERS_ACCEL_VERBOSITY", os.environ.get("DIFFUSERS_VERBOSITY", "warning"))
    names = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    LOG.setLevel(names.get(level.lower(), logging.WARNING))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    LOG.addHandler(handler)
    LOG.propagate = False


_set_up()
