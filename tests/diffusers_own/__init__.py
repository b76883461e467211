"""diffusers' own tests of the supported families, run twice: as they are, and with every pipeline and model patched."""
