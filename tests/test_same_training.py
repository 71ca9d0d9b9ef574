"""The same training here and in sentence-transformers: same losses step by step, same weights after."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_run import train_on

from jaxembed import config as config_lib

STEPS, BATCH, TEMPERATURE, RATE, DECAY, CLIP, WARMUP = 6, 16, 0.05, 2e-5, 0.01, 1.0, 3


@pytest.fixture(scope="module")
def pairs(data_dir, tmp_path_factory):
    """Caption pairs of distinct photographs, without their group: the peer knows no groups and no equal texts."""
    by_group = {}
    with gzip.open(data_dir / "pairs" / "captions_train.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            by_group.setdefault(row.pop("group"), row)
            if len(by_group) == STEPS * BATCH:
                break
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in by_group.values()))
    return path, list(by_group.values())


@pytest.fixture(scope="module")
def run(pairs, minilm_dir, tmp_path_factory):
    c = config_lib.default_config()
    c.steps, c.batch_size = STEPS, BATCH
    c.model.init = f"hf:{minilm_dir}"
    c.data.train[0].path = str(pairs[0])
    c.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    c.loss.temperature = TEMPERATURE
    c.optimizer.learning_rate, c.optimizer.weight_decay, c.optimizer.clip_norm = RATE, DECAY, CLIP
    c.optimizer.warmup_steps = WARMUP
    workdir = tmp_path_factory.mktemp("run")
    train_on(2, config_lib.load(c), workdir)
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return workdir, losses


def order_of_records(workdir) -> np.ndarray:
    """The records of each step, from the plan that the run had."""
    import jax

    from jaxembed import model_source, sharding
    from jaxembed.run_folder import read_config
    from jaxembed.training_data import open_data

    c = read_config(workdir)
    blueprint = model_source.Blueprint.load(workdir / "model")
    data = open_data(c, blueprint, sharding.make_mesh(c.mesh, jax.devices()), {})
    return np.stack([data.plan.step(n).record_B for n in range(STEPS)])


def test_losses_and_weights_equal_those_of_sentence_transformers(run, pairs, minilm_dir):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    workdir, losses = run
    model = SentenceTransformer(str(minilm_dir), device="cpu")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    objective = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    named = list(model.named_parameters())
    undecayed = lambda name: name.endswith("bias") or "LayerNorm" in name  # noqa: E731
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if not undecayed(n)], "weight_decay": DECAY},
            {"params": [p for n, p in named if undecayed(n)], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    for step, records in enumerate(order_of_records(workdir)):
        rate = step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        rows = [pairs[1][r] for r in records]
        features = [model.preprocess([row[side] for row in rows]) for side in ("query", "positive")]
        loss = objective(features, None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        assert math.isclose(loss.item(), losses[step], rel_tol=1e-4), step

    exported = load_file(workdir / "export" / "model.safetensors")
    trained = {name.split("auto_model.")[-1].split("model.")[-1]: p.detach().numpy() for name, p in named}
    compared = 0
    for name, tensor in exported.items():
        if name.startswith("pooler") or name not in trained:
            continue
        # A key's bias shifts all scores of a query alike, which softmax does not see: its true gradient is 0, and Adam
        # scales rounding noise up to steps. So this one array is compared in absolute terms.
        bound = 1.0 if name.endswith("key.bias") else np.abs(trained[name]).max()
        assert np.abs(tensor - trained[name]).max() <= 1e-4 * bound, name
        compared += 1
    assert compared == 5 + 16 * 6
