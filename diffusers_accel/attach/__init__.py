"""Where we touch the host: the clock, one attention module at run time, the drop-in processor, diffusers' own caches."""
