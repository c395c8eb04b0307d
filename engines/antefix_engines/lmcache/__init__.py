"""Antefix as an L2 adapter of LMCache, by its plug-in configuration: docs/ENGINES.md. `l2_adapter` has the class."""
