"""``python -m mentalglm_jax`` is the ``mentalglm`` command."""

from mentalglm_jax.cli.main import main

main()
