"""From the config to an optax optimizer: schedule, decay mask, clipping, rates by regex."""

import functools
import inspect
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxembed.config import OptimizerConfig, nearest
from jaxembed.errors import UserError
from jaxembed.models.text_encoder import Params, flatten

# These want more than gradients and a schedule: the loss, its curvature, gradients per example, a fixed rate.
UNSERVED = ("lbfgs", "momo", "momo_adam", "sophia", "dpsgd", "optimistic_adam", "rprop", "sm3")
MASKS = ("mask", "weight_decay_mask")  # what optax's functions call the choice of what is decayed
# Norms, biases, the temperature; of state-space layers also the decays, step sizes and what goes by the states.
NOT_DECAYED = re.compile(r"(^|/)(bias|scale|log_temperature|a_log|step_bias|skip)$")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns step (from 0) → learning rate: a linear warm-up, then constant, or falling to 0 at `steps`."""
    warmup = config.warmup_steps

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip((steps - step) / max(1, steps - warmup), 0, 1)
        if config.schedule == "linear":
            factor = left
        elif config.schedule == "cosine":
            factor = 0.5 * (1 - jnp.cos(jnp.pi * left))
        else:
            factor = jnp.ones(())
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return rate


def rate_factors(config: OptimizerConfig, params: Params) -> Params:
    """Returns each parameter's learning-rate factor: that of the last regex found in its path, else 1.

    Raises:
      UserError: a regex that no path matches.
    """
    paths = flatten(params)
    for pattern, _ in config.by_regex:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"config.optimizer.by_regex: {pattern!r} matches no parameter; paths look like {next(iter(paths))!r}"
            )

    def factor(path: tuple, _: Any) -> float:
        matching = [factor for pattern, factor in config.by_regex if re.search(pattern, _name(path))]
        return matching[-1] if matching else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def make_optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """Builds the optimizer.

    Args:
      config: names any optax (or optax.contrib) optimizer that takes a learning rate; `options` are its further
        arguments.
      steps: of the whole run, where a schedule ends.
      params: the parameters' structure.

    Raises:
      UserError: an unknown name or option.
    """
    factors = rate_factors(config, params)
    rate = schedule(config, steps)
    by_factor = {_label(f): _by_name(config, rate, f) for f in set(jax.tree.leaves(factors))}
    if len(by_factor) == 1:
        (inner,) = by_factor.values()
    else:
        inner = optax.partition(by_factor, jax.tree.map(_label, factors))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), inner) if config.clip_norm else inner


def _label(factor: float) -> str:
    return f"rate x {factor:g}"


def freeze(params: Params, factors: Params) -> Params:
    """Cuts the gradient of parameters whose factor is 0, so that its computation falls away."""
    return jax.tree.map(lambda p, factor: jax.lax.stop_gradient(p) if factor == 0 else p, params, factors)


def _by_name(config: OptimizerConfig, rate: optax.Schedule, factor: float) -> optax.GradientTransformation:
    known = {name: f for module in (optax.contrib, optax) for name, f in vars(module).items() if _is_optimizer(name, f)}
    if config.name not in known:
        raise UserError(
            f"config.optimizer.name: {config.name!r} is no optimizer of optax that works on gradients and a schedule"
            f"{nearest(config.name, known)}"
        )
    arguments = inspect.signature(known[config.name]).parameters
    for option in config.options:
        if option in ("learning_rate", "weight_decay"):
            raise UserError(f"config.optimizer.options: {option!r} has a field of its own, config.optimizer.{option}")
        if option not in arguments or option in MASKS:
            raise UserError(f"config.optimizer.options: {config.name} takes no {option!r}{nearest(option, arguments)}")
    if factor == 0:
        return optax.set_to_zero()
    make = functools.partial(known[config.name], lambda step: factor * rate(step), **config.options)
    mask = next((name for name in MASKS if name in arguments), None)
    if "weight_decay" in arguments and mask:
        return make(**{"weight_decay": config.weight_decay, mask: _decayed})
    # Optimizers without a decay of their own get it coupled with the gradient, as torch's do.
    decay = [optax.add_decayed_weights(config.weight_decay, mask=_decayed)] if config.weight_decay else []
    return optax.chain(*decay, make())


def _is_optimizer(name: str, make: Any) -> bool:
    if not isinstance(make, types.FunctionType | functools.partial) or name.startswith(("_", "scale_by_")):
        return False
    return name not in UNSERVED and next(iter(inspect.signature(make).parameters), "") == "learning_rate"


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not NOT_DECAYED.search(_name(path)), params)


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)
