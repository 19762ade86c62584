"""The device side: model, engine, optimisation, checkpoints."""
