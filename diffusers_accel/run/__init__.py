"""A plan at work: the heads of a layer, partitioned into launches, what runs them, and what is kept from step to step."""
