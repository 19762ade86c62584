"""The algorithm as pure functions of arrays: no config, no model, no I/O."""
