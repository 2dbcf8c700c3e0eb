"""Pre-train late-interaction (ColBERT) retrieval models in JAX."""

import os

__version__ = "0.1.0"

# Transformers otherwise warns at each import that PyTorch is missing, which it is meant to be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
