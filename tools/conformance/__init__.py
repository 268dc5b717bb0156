"""Every architecture of transformers, tiny and random: is it right with kvpack? `make conformance` runs it."""
