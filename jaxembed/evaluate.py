"""Score a model on similarity, retrieval and classification sets, on texts to predict, or on tasks of MTEB.

    python -m jaxembed.evaluate --model=FOLDER --sts=stsb-dev.jsonl.gz --retrieval=scifact --bm25
    python -m jaxembed.evaluate --model=FOLDER --mteb=STS12,NFCorpus

--model takes a run's folder (RUN, RUN@STEP, RUN@best), a sentence-transformers or transformers folder, or the name of a
model on the hub. Several sets or tasks are given by commas. Prints a table for each kind, and one JSON line last.

  --sts             files of sentence1, sentence2, score
  --retrieval       BEIR folders: corpus.jsonl, queries.jsonl, qrels.tsv
  --pairs           training records that were held out, whose queries are to find their positives: files, folders,
                    globs, tfds:NAME:SPLIT, hf:NAME:SPLIT
  --classification  TRAIN_FILE:TEST_FILE of text, label; or folders of train.jsonl and test.jsonl
  --texts           texts to predict, by a run with a loss over tokens or a language model's folder: files of a text
                    per line (.txt), or as --pairs, queries and positives. --draws: masks of each, if it is not causal
  --template        put every text into it, as language models that were not trained to embed want it: prompt_eol, echo,
                    meta_eol (the mean over several), or a text with {text} in it
  --moee            of a mixture of experts, compare routing weights: alone, concat (beside the states' vectors), or sum
                    (both similarities, the routing weights' times --moee_weight); no training needed
  --expert          of a model whose sources have an expert each (config.model.experts.routing = 'source'): which one
  --bm25            score BM25 too, on the retrieval and pairs sets
  --hybrid          on these sets, score the model's and BM25's rankings fused into one (by reciprocal rank), too
  --mteb            names of tasks, or FILE.py:ClassName for one of your own; results go to --mteb_out
"""

import json
import pathlib

from absl import flags

from jaxembed import cli
from jaxembed.config import EvalConfig
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.evaluation.mteb_tasks import MtebScore, model_name, open_tasks, require_mteb, run_tasks
from jaxembed.evaluation.sets import require_sets

SETS = ("sts", "retrieval", "pairs", "classification", "texts")  # flags that are fields of EvalConfig


def main() -> None:
    """Runs the command."""
    flag = flags.FLAGS
    lists = {kind: tuple(flag[kind].value) for kind in SETS}
    sets = EvalConfig(**lists, draws=flag.draws, bm25=flag.bm25, hybrid=flag.hybrid)
    _require_flags(sets)
    with connect() as peers:
        _evaluate(sets, peers)


def _evaluate(sets: EvalConfig, peers: Peers) -> None:
    """Scores the model, on the devices of all processes; process 0 says how."""
    flag = flags.FLAGS
    if flag.mteb and peers.count > 1:
        raise UserError("--mteb: mteb writes its results by itself, so it runs in one process: start it without others")
    from rich.console import Console

    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.report import flat_scores, mteb_table, scores_tables
    from jaxembed.evaluation.tasks import Tasks

    tasks, mteb_tasks = Tasks.read(sets, "--"), open_tasks(flag.mteb) if flag.mteb else []
    embedder = Embedder.load(
        flag.model,
        template=flag.template,
        dtype=flag.dtype,
        moee=flag.moee,
        moee_weight=flag.moee_weight,
        expert=flag.expert,
        words=bool(sets.texts),
    )
    results, baselines = tasks.evaluate(embedder, show_progress_bar=peers.main), tasks.baselines()
    scores, failures = [], []
    if mteb_tasks:
        for outcome in run_tasks(embedder, model_name(flag.model), mteb_tasks, pathlib.Path(flag.mteb_out)):
            (scores if isinstance(outcome, MtebScore) else failures).append(outcome)
    if peers.main:
        Console().print(*scores_tables(results, baselines), *([mteb_table(scores)] if scores else []))
        mteb_scores = {f"eval/mteb/{score.task}": score.score for score in scores}
        print(json.dumps({"model": flag.model, **flat_scores(results | baselines), **mteb_scores}))
    if failures:
        raise UserError("; ".join(map(str, failures)))


def _require_flags(sets: EvalConfig) -> None:
    """Refuses at once what needs no look into the files."""
    flag = flags.FLAGS
    if not flag.model:
        raise UserError("--model is missing: name a run's folder or an exported one")
    if not flag.mteb and not any(getattr(sets, kind) for kind in SETS):
        raise UserError(f"nothing to evaluate on: give --{', --'.join(SETS)} or --mteb")
    for name in ("bm25", "hybrid"):
        if flag[name].value and not sets.retrieval + sets.pairs:
            raise UserError(f"--{name} searches the sets of --retrieval and --pairs: give one")
    if flag["draws"].present and not sets.texts:
        raise UserError("--draws are masks of the texts of --texts: give one")
    if flag["moee_weight"].present and flag.moee != "sum":
        raise UserError("--moee_weight weighs the similarities that --moee=sum adds up: give that too")
    require_sets(sets, "--")
    if flag.mteb:
        require_mteb(flag.mteb)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_list("sts", [], "Similarity sets.")
    flags.DEFINE_list("retrieval", [], "Retrieval sets.")
    flags.DEFINE_list("pairs", [], "Sets of records.")
    flags.DEFINE_list("classification", [], "Classification sets.")
    flags.DEFINE_list("texts", [], "Sets of texts to predict.")
    flags.DEFINE_integer("draws", EvalConfig.draws, "Masks of each of these texts.", lower_bound=1)
    flags.DEFINE_string("template", "", "Put every text into it: prompt_eol, echo, meta_eol, or a text with {text}.")
    flags.DEFINE_enum("moee", "", ["", "alone", "concat", "sum"], "Compare a mixture of experts' routing weights.")
    flags.DEFINE_float("moee_weight", 1.0, "Of the routing weights' similarity in --moee=sum.")
    flags.DEFINE_integer("expert", None, "The source whose expert texts are given, of a model trained so.")
    flags.DEFINE_bool("bm25", False, "Score BM25 too.")
    flags.DEFINE_bool("hybrid", False, "Score the model and BM25 together, too.")
    flags.DEFINE_list("mteb", [], "Tasks of MTEB.")
    flags.DEFINE_string("mteb_out", "mteb_results", "Folder for MTEB's results, in its own layout.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
