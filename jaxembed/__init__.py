"""Train text-embedding models in JAX, open them in sentence-transformers."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Embedder"]


def __getattr__(name: str) -> Any:
    if name == "Embedder":  # imported when used: `import jaxembed` stays light
        from jaxembed.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'jaxembed' has no attribute {name!r}")
