"""GLM-4 in JAX for interpretable mental-health analysis: load, fine-tune with LoRA, generate, export.

    import mentalglm_jax as mg
    model = mg.load("path/to/glm-4-9b-chat-hf", adapter="path/to/adapter")

Names are imported on first use (they stand in ``__init__.pyi``), so that importing the package costs nothing and
touches no device.
"""

from mentalglm_jax import interpreter

interpreter.guard("mentalglm_jax", "mentalglm")

# Only now: files of these names may lie where `python -m mentalglm_jax` was called.
import lazy_loader  # noqa: E402

from mentalglm_jax.devices.hardware import quiet_off_tpu  # noqa: E402

quiet_off_tpu()
del quiet_off_tpu

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
