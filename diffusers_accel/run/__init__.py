"""A plan at work: the heads of a layer dealt out to launches, what runs them, and what is kept from step to step."""
