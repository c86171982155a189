"""Which identifier serves an experiment best: a program, `python -m retex_jax.identify`."""
