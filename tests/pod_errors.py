"""Two processes add numbers up together, until the second one fails: `python tests/pod_errors.py mistake|kill`."""

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxembed.distributed import connect
from jaxembed.errors import UserError


def add_up(fails: bool) -> None:
    """Goes on for ever, but where this process fails."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    n = len(jax.devices())
    with jax.set_mesh(jax.make_mesh((n,), ("x",))):
        ones = jax.jit(lambda: jnp.ones(n, out_sharding=P("x")))()
        total = jax.jit(lambda x: jax.sharding.reshard(x.sum(), P()))
        for step in range(10**9):
            total(ones).block_until_ready()
            if fails and step == 20:
                if sys.argv[1] == "mistake":
                    raise UserError("my mistake")
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with connect() as peers:
        add_up(not peers.main)
