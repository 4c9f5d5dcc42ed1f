"""``python -m mentalglm_jax`` is the ``mentalglm`` command."""

from mentalglm_jax.cli import main

main()
