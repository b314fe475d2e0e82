"""jaxsft: supervised fine-tuning of language models in JAX, exactly."""

__version__ = "0.1.0"
