"""mmmem_jax: pyramidal multimodal memory (MM-Mem) and SIB-GRPO in JAX.

Importing the package imports nothing else; take what you need from its modules.
"""

__version__ = "0.1.0"
