"""What must not come out of jax's compile cache."""

import contextlib
from collections.abc import Iterator

import jax

_WRITTEN_FROM = "jax_persistent_cache_min_compile_time_secs"


@contextlib.contextmanager
def not_kept(when: bool) -> Iterator[None]:
    """Keeps programs that are compiled meanwhile out of the cache, if `when`.

    Of a program read from the cache, XLA's CPU runtime (as of jax 0.10) no longer knows in which order its collectives
    were meant. Several devices then may meet one outside of a loop and one inside it in different orders, and wait for
    each other for ever. So CPU steps that have both are compiled anew by each process.
    """
    before = jax.config.values[_WRITTEN_FROM]
    if when:
        jax.config.update(_WRITTEN_FROM, float("inf"))
    try:
        yield
    finally:
        jax.config.update(_WRITTEN_FROM, before)
