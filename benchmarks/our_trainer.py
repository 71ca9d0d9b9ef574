"""One step of jaxembed's trainer at a time, as its loop makes it, for benchmarks that take turns with a peer."""

import pathlib

import jax

from jaxembed import model_source, sharding
from jaxembed.config import Config
from jaxembed.data.batch import PairShape
from jaxembed.data.loader import StepInfo, prefetch
from jaxembed.models.text_encoder import split
from jaxembed.optimizer import make_optimizer
from jaxembed.step import init_state, make_step
from jaxembed.training_data import open_data


class OurTrainer:
    """A run on the first device, without evaluations and checkpoints.

    Attributes:
      blueprint: the model's. factory: its maker.
      data: the training data.
      real, padded: tokens so far.
    """

    def __init__(self, config: Config, scratch: pathlib.Path) -> None:
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self.blueprint, load = model_source.open_source(config, scratch)
        self.data = open_data(config, self.blueprint, self.mesh, {})
        lora = self.blueprint.lora(config.model.lora)
        self.factory = self.blueprint.factory(model_source.options(config.model), config.seed, lora)
        with jax.set_mesh(self.mesh):
            trained, base = split(load(self.factory))
            self.given = {"base": base}
            optimizer = make_optimizer(config.optimizer, config.steps, {"model": trained, "loss": {}})
            width = self.factory.width
            self.state = jax.jit(lambda model: init_state(config, optimizer, model, width, 0))(trained)
            plan = self.data.plan
            pair = PairShape(plan.positives, plan.negatives)
            step = make_step(config, self.factory, optimizer, pair, config.steps)
            self.step_function = jax.jit(step, donate_argnums=0)
        self.batches = prefetch(self.data.builder, 0, config.steps, config.data.prefetch)
        self.real = self.padded = 0

    def compile(self, steps: int = 64) -> None:
        """Compiles the step for the rungs that ordinary steps need, so that no timed step does."""
        seen = set()
        for n in range(steps):
            batch, info = self.data.builder.build(n)
            if info.rows_per_bin not in seen:
                seen.add(info.rows_per_bin)
                with jax.set_mesh(self.mesh):
                    on_device = self.data.to_device(batch, self.mesh)
                    self.state, _ = self.step_function(self.state, on_device, self.given)

    def step(self) -> StepInfo:
        """Makes a step, waits for it, and reads its metrics."""
        batch, info = next(self.batches)
        with jax.set_mesh(self.mesh):
            on_device = self.data.to_device(batch, self.mesh)
            self.state, metrics = self.step_function(self.state, on_device, self.given)
            jax.block_until_ready(self.state)
            jax.device_get(metrics)
        self.real, self.padded = self.real + info.real_tokens, self.padded + info.padded_tokens
        return info
