"""FlashBlock for video that is made chunk by chunk: attention against a clean, growing history, as a library call."""

from diffusers_accel.block_external.attend import Counts, ExternalCache, attend
from diffusers_accel.block_external.gate import Gate

__all__ = ["Counts", "ExternalCache", "Gate", "attend"]
