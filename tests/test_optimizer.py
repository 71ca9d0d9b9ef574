"""The optimizer: schedules against transformers', every name makes a step, masks, rates by regex."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed.config import OptimizerConfig
from jaxembed.errors import UserError
from jaxembed.models.text_encoder import flatten
from jaxembed.optimizer import freeze, make_optimizer, rate_factors, schedule

NAMES = ("adamw", "adam", "sgd", "lion", "adafactor", "lamb", "rmsprop", "nadamw", "muon", "schedule_free_adamw")


def params():
    """A little of everything: a kernel, a table, norms, biases, the temperature."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "model": {
            "embeddings": {"token": {"embedding": array(6, 4)}, "norm": {"scale": array(4), "bias": array(4)}},
            "layers": {"up": {"kernel": array(2, 4, 8), "bias": array(2, 8)}},
        },
        "loss": {"log_temperature": jnp.float32(-3.0)},
    }


def gradients():
    return jax.tree.map(lambda x: 0.1 * jnp.cos(x), params())


def first_update(**fields):
    """The first update that the config's optimizer makes, by path."""
    optimizer = make_optimizer(OptimizerConfig(**fields), 10, params())
    updates, _ = optimizer.update(gradients(), optimizer.init(params()), params())
    return {path: np.asarray(x) for path, x in flatten(updates).items()}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(kind, warmup):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    make = {
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, 30),
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, 30),
    }[kind]
    peer = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)).lr_lambdas[0]
    rate = schedule(OptimizerConfig(learning_rate=0.5, schedule=kind, warmup_steps=warmup), 30)
    for step in (0, 1, 2, 6, 7, 8, 15, 29, 30):
        np.testing.assert_allclose(rate(step), 0.5 * peer(step), rtol=1e-6, atol=1e-7)


def test_a_warm_up_as_long_as_the_run_does_not_divide_by_zero():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=5), 5)
    np.testing.assert_allclose([rate(n) for n in range(6)], [0, 0.2, 0.4, 0.6, 0.8, 0])


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_quadratic(name):
    rate = 0.5 if name == "sgd" else 0.05
    config = OptimizerConfig(name=name, learning_rate=rate, schedule="constant", weight_decay=1e-3)
    optimizer = make_optimizer(config, 20, params())
    loss = lambda p: sum(jnp.square(x - 1).sum() for x in jax.tree.leaves(p))  # noqa: E731

    @jax.jit
    def step(p, state):
        value, gradient = jax.value_and_grad(loss)(p)
        updates, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state, values = params(), optimizer.init(params()), []
    for _ in range(20):
        p, state, value = step(p, state)
        values.append(float(value))
    assert np.isfinite(values).all() and values[-1] < 0.95 * values[0]
    assert jax.tree.all(jax.tree.map(lambda x: bool(x.any()), jax.tree.map(jnp.subtract, p, params())))


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_decay_spares_norms_biases_and_the_temperature(name):
    common = {"name": name, "learning_rate": 0.1, "schedule": "constant", "clip_norm": 0.0}
    plain, decayed = first_update(**common, weight_decay=0.0), first_update(**common, weight_decay=0.5)
    pulled = {path for path in plain if not np.array_equal(plain[path], decayed[path])}
    assert pulled == {"model/embeddings/token/embedding", "model/layers/up/kernel"}
    for path in pulled:
        want = plain[path] - 0.1 * 0.5 * np.asarray(flatten(params())[path])
        np.testing.assert_allclose(decayed[path], want, rtol=1e-5, atol=1e-7)


def test_options_reach_the_optimizer():
    config = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
    got = first_update(name="sgd", options={"momentum": 0.9, "nesterov": True}, **config)
    for path, gradient in flatten(gradients()).items():
        np.testing.assert_allclose(got[path], -0.1 * (1 + 0.9) * np.asarray(gradient), rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    config = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "weight_decay": 0.0}
    norm = float(optax.global_norm(gradients()))
    plain, clipped = (first_update(**config, clip_norm=clip) for clip in (0.0, norm / 4))
    for path in plain:
        np.testing.assert_allclose(clipped[path], plain[path] / 4, rtol=1e-5)


def test_rates_by_regex_multiply_the_rate_and_the_last_match_wins():
    config = OptimizerConfig(by_regex=(("embeddings/", 0.0), ("norm/", 0.5), ("up/kernel$", 3.0)))
    assert flatten(rate_factors(config, params())) == {
        "model/embeddings/token/embedding": 0.0,
        "model/embeddings/norm/scale": 0.5,
        "model/embeddings/norm/bias": 0.5,
        "model/layers/up/kernel": 3.0,
        "model/layers/up/bias": 1.0,
        "loss/log_temperature": 1.0,
    }
    # Adam's first update is the rate times the gradient's sign, and the decay goes with the rate.
    plain = {"name": "adamw", "learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.5}
    one, many = first_update(**plain), first_update(**plain, by_regex=config.by_regex)
    for path, factor in flatten(rate_factors(config, params())).items():
        np.testing.assert_allclose(many[path], factor * one[path], rtol=1e-5, atol=1e-7)


def test_frozen_parameters_have_no_gradient_and_no_state():
    config = OptimizerConfig(by_regex=(("embeddings/", 0.0),))
    factors = rate_factors(config, params())
    gradient = jax.grad(lambda p: optax.global_norm(freeze(p, factors)))(params())
    for path, x in flatten(gradient).items():
        assert bool(x.any()) != ("embeddings" in path)
    leaves = jax.tree_util.tree_leaves_with_path(make_optimizer(config, 10, params()).init(params()))
    assert not any("embeddings" in jax.tree_util.keystr(path) for path, _ in leaves)
    assert any("'up'" in jax.tree_util.keystr(path) for path, _ in leaves)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamww"}, "'adamww' is no optimizer of optax that works on gradients and a schedule, did you mean"),
        *(({"name": name}, f"{name!r} is no optimizer") for name in ("clip", "scale_by_adam", "lbfgs", "sophia")),
        ({"options": {"beta1": 0.9}}, "config.optimizer.options: adamw takes no 'beta1'"),
        ({"options": {"weigth_decay": 0.9}}, "did you mean 'weight_decay'?"),
        ({"options": {"learning_rate": 0.9}}, "'learning_rate' has a field of its own, config.optimizer.learning_rate"),
        ({"options": {"weight_decay": 0.9}}, "'weight_decay' has a field of its own, config.optimizer.weight_decay"),
        ({"options": {"mask": "x"}}, "config.optimizer.options: adamw takes no 'mask'"),
        ({"by_regex": (("embbedings", 0.0),)}, "'embbedings' matches no parameter; paths look like 'model/embeddings"),
        ({"name": "nosuch", "by_regex": (("", 0.0),)}, "'nosuch' is no optimizer"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError) as caught:
        make_optimizer(OptimizerConfig(**fields), 10, params())
    assert message in str(caught.value)


def test_a_run_from_step_zero_uses_the_schedule_from_its_start():
    config = OptimizerConfig(name="sgd", learning_rate=1.0, warmup_steps=2, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 4, params())
    state, got = optimizer.init(params()), []
    for _ in range(4):
        updates, state = optimizer.update(gradients(), state, params())
        ratio = jax.tree.map(lambda u, g: u / g, updates, gradients())
        got.append(-float(ratio["loss"]["log_temperature"]))
    np.testing.assert_allclose(got, [schedule(dataclasses.replace(config), 4)(n) for n in range(4)], rtol=1e-6)
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.5], rtol=1e-6)
