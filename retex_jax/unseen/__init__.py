"""Tasks without an expert: what can be made of the experts of others; a program, `python -m retex_jax.unseen`."""
