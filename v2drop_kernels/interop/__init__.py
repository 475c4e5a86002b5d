"""The ops for other array libraries: NumPy, DLPack and CuPy (``array``), and JAX (``jax``)."""
