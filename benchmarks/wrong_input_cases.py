"""The mistakes that `benchmarks.wrong_inputs` makes, each beside the same command corrected."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
      what: it is, in a few words.
      wrong, right: arguments added to the command; a flag given twice counts as it is given last.
      command: 'train', on a tiny model and pairs, 'evaluate', 'export' …
      bare: the arguments are all there are.
    """

    what: str
    wrong: tuple[str, ...]
    right: tuple[str, ...] = ()
    command: str = "train"
    bare: bool = False


DENSE_BERT = ("--config.model.init=hf:{}/model", "--config.tokenizer=auto", "--config.model.arch=auto")
SCRATCH = ("--config={}/scratch.py", "--workdir={}/run", "--data={}/pairs.jsonl")
MAMBA, BAMBA = (("--config={}/mamba.py", *SCRATCH[1:]), ("--config={}/bamba.py", *SCRATCH[1:]))
TEXTS = ("--config.data.max_length.query=16", "--config.data.max_length.document=16")
MASKED = "--text=red [MASK] blue"
PLANNED = (MAMBA[0], "--config.mesh.data=1", *TEXTS)
CASES = (
    Case("unknown flag", ("--wrokdir=x",)),
    Case("no config", ("--workdir={}/run",), right=SCRATCH, bare=True),
    Case("no workdir", (SCRATCH[0], SCRATCH[2]), right=SCRATCH, bare=True),
    Case("stray argument", ("now",)),
    Case("unknown config key", ("--config.bach_size=8",), ("--config.batch_size=8",)),
    Case("unknown nested key", ("--config.loss.temprature=0.1",), ("--config.loss.temperature=0.1",)),
    Case("text for a number", ("--config.batch_size=many",)),
    Case("fraction for a whole number", ("--config.batch_size=1.5",)),
    Case("neither true nor false", ("--config.export=perhaps",), ("--config.export=false",)),
    Case("index out of range", ("--config.data.train[7].path=x",)),
    Case("unknown choice", ("--config.model.pooling=maen",), ("--config.model.pooling=mean",)),
    Case("config file missing", ("--config=configs/nowhere.py",)),
    Case("config file with a syntax error", ("--config={}/syntax.py",)),
    Case("config file that raises", ("--config={}/raises.py",)),
    Case("unknown argument of a config", ("--config=configs/finetune_pairs.py:huge",)),
    Case("steps and epochs", ("--config.epochs=1.0",)),
    Case("temperature 0", ("--config.loss.temperature=0.0",)),
    Case("temperature of scores without bounds", ("--config.model.normalize=false",)),
    Case("unknown loss", ("--config.loss.name=infonse",), ("--config.loss.name=infonce",)),
    Case(
        "field that a loss does not take",
        ("--config.loss.name=cosent", "--config.loss.margin=0.1", "--data={}/sts.jsonl"),
        ("--config.loss.name=cosent", "--data={}/sts.jsonl"),
    ),
    Case("loss of scores, pairs without", ("--config.loss.name=cosent",), ("--config.loss.name=infonce",)),
    Case(
        "scores that are no cosines",
        ("--config.loss.name=cosine", "--data={}/sts.jsonl"),
        ("--config.loss.name=angle", "--data={}/sts.jsonl"),
    ),
    Case("triplets without a margin", ("--config.loss.name=triplet",)),
    Case(
        "loss of a teacher, without one",
        ("--config.loss.name=match",),
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/model"),
    ),
    Case(
        "teacher that is nowhere",
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/nowhere"),
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/model"),
    ),
    Case("teacher that no loss uses", ("--config.teacher.init=hf:{}/model",)),
    Case("vectors cut to more than they have", ("--config.matryoshka.dims=(64,)",), ("--config.matryoshka.dims=(8,)",)),
    Case("part of a step above 1", ("--config.data.one_source=2.0",), ("--config.data.one_source=1.0",)),
    Case("batch of one pair", ("--config.batch_size=1",)),
    Case("micro-batches that do not divide the batch", ("--config.grad_cache=3",), ("--config.grad_cache=2",)),
    Case("more devices than there are", ("--config.mesh.fsdp=2",)),
    Case(
        "last-token pooling without an end token",
        ("--config.model.pooling=last", "--config.tokenizer=file:{}/no_end.json"),
    ),
    Case("an encoder made causal", ("--config.model.attention=causal",), ("--config.model.attention=bidirectional",)),
    Case(
        "attention that no folder can say",
        ("--config.model.arch=llama", "--config.model.attention=prefix"),
        ("--config.model.arch=llama", "--config.model.attention=prefix", "--config.export=false"),
    ),
    Case(
        "modes for more layers than there are",
        ("--config.model.arch=llama", "--config.model.attention_layers=('causal','bidirectional')"),
        ("--config.model.arch=llama", "--config.model.attention_layers=('bidirectional',)"),
    ),
    Case(
        "adapters to a model from scratch",
        ("--config.model.lora.rank=2",),
        ("--config.model.lora.rank=2", "--config.model.init=hf:{}/model", "--config.tokenizer=auto"),
    ),
    Case(
        "adapters to layers that are not there",
        (
            "--config.model.lora.rank=2",
            "--config.model.init=hf:{}/model",
            "--config.tokenizer=auto",
            "--config.model.lora.targets=q_proj",
        ),
        (
            "--config.model.lora.rank=2",
            "--config.model.init=hf:{}/model",
            "--config.tokenizer=auto",
            "--config.model.lora.targets=query",
        ),
    ),
    Case(
        "template without the text",
        ("--config.model.template=in one word",),
        ("--config.model.template=in one word: {text}",),
    ),
    Case(
        "heads that do not divide the width",
        ("--config.model.pooling=latent", "--config.model.latent_heads=5"),
        ("--config.model.pooling=latent", "--config.model.latent_heads=4", "--config.model.latents=8"),
    ),
    Case("layers that are not there", ("--config.model.pool_layers=9",), ("--config.model.pool_layers=0",)),
    Case(
        "tokenizer that transformers would not use",
        ("--config.model.arch=qwen2",),
        ("--config.model.arch=qwen3",),
    ),
    Case(
        "texts longer than the model takes",
        ("--config.data.max_length.query=600",),
        ("--config.data.max_length.query=30",),
    ),
    Case("rows shorter than a text", ("--config.data.row_length=4",), ("--config.data.row_length=64",)),
    Case("best checkpoint of nothing", ("--config.checkpoint.best=eval/sts/dev",)),
    Case("unknown optimizer", ("--config.optimizer.name=adamm",), ("--config.optimizer.name=lion",)),
    Case(
        "regex that matches nothing",
        ("--config.optimizer.by_regex=(('laier',0.0),)",),
        ("--config.optimizer.by_regex=(('layers',0.0),)",),
    ),
    Case("unknown architecture", ("--config.model.arch=bort",)),
    Case(
        "a token takes more experts than there are",
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.top_k=3"),
        (*DENSE_BERT, "--config.model.experts.upcycle=2"),
    ),
    Case(
        "experts that the mesh does not divide",
        (*DENSE_BERT, "--config.model.experts.upcycle=6", "--config.mesh.data=1", "--config.mesh.expert=4"),
        (*DENSE_BERT, "--config.model.experts.upcycle=6", "--config.mesh.expert=1"),
    ),
    Case(
        "unknown routing of experts",
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.routing=nearest"),
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.routing=expert_choice"),
    ),
    Case("copies of a model from scratch", ("--config.model.experts.upcycle=2",)),
    Case("settings of experts without any", ("--config.model.experts.top_k=1",)),
    Case("routing weights of a dense model", ("--config.model.moee=sum", "--config.export=false")),
    Case(
        "chunks of no tokens",
        (*MAMBA, "--config.model.ssm.chunk=-1"),
        (*MAMBA, "--config.model.ssm.chunk=16"),
        bare=True,
    ),
    Case(
        "unknown form of a scan",
        (*MAMBA, "--config.model.ssm.kernel=fast"),
        (*MAMBA, "--config.model.ssm.kernel=associative"),
        bare=True,
    ),
    Case(
        "backward mixers of a model that reads forwards",
        (*MAMBA, "--config.model.ssm.directions=shared"),
        (*MAMBA, "--config.model.ssm.directions=shared", "--config.model.attention=bidirectional"),
        bare=True,
    ),
    Case(
        "backward mixers of a hybrid",
        (*BAMBA, "--config.model.ssm.directions=shared", "--config.model.attention=bidirectional"),
        (*BAMBA, "--config.model.attention=bidirectional"),
        bare=True,
    ),
    Case("settings of state-space layers without any", ("--config.model.ssm.kernel=steps",)),
    Case(
        "modes of attention for layers without",
        (*MAMBA, "--config.model.attention_layers=('bidirectional',)"),
        (*MAMBA, "--config.model.attention=bidirectional"),
        bare=True,
    ),
    Case(
        "channels that the mesh does not divide",
        (*PLANNED, "--config.mesh.tensor=8", "--topology=cpu:8"),
        (*PLANNED, "--config.mesh.tensor=2", "--topology=cpu:2"),
        "plan",
        bare=True,
    ),
    Case(
        "shards of rows shorter than a convolution",
        (*PLANNED, "--config.mesh.sequence=8", "--topology=cpu:8"),
        (*PLANNED, "--config.mesh.sequence=2", "--topology=cpu:2"),
        "plan",
        bare=True,
    ),
    Case("stage that changes the mesh", ("--config={}/stages.py:mesh",), ("--config={}/stages.py",)),
    Case("unknown key in a stage", ("--config={}/stages.py:typo",), ("--config={}/stages.py",)),
    Case("data file missing", ("--data={}/nowhere.jsonl",)),
    Case("glob without a match", ("--data={}/nowhere/*.jsonl",), ("--data={}/pair*.jsonl",)),
    Case("empty data file", ("--data={}/empty.jsonl",)),
    Case("folder of two kinds of files", ("--data={}/mixed",), ("--data={}/pairs",)),
    Case(
        "broken JSON line", ("--data={}/broken.jsonl",), ("--data={}/broken.jsonl", "--config.data.on_bad_record=skip")
    ),
    Case("empty text", ("--data={}/blank.jsonl",), ("--data={}/blank.jsonl", "--config.data.on_bad_record=skip")),
    Case("not UTF-8", ("--data={}/latin.jsonl",), ("--data={}/latin.jsonl", "--config.data.on_bad_record=skip")),
    Case(
        "other names of columns",
        ("--data={}/columns.jsonl",),
        (
            "--data={}/columns.jsonl",
            """--config.data.train[0].columns={'query': 'q', 'positive': 'a'}""",
        ),
    ),
    Case("gzip file cut short", ("--data={}/cut.jsonl.gz",)),
    Case("unknown tfds data set", ("--data=tfds:py_dokstrings",)),
    Case("data set that is on no disk", ("--data=hf:nobody/nothing",)),
    Case("unknown tokenizer", ("--config.tokenizer=train:wordpiece:500",), ("--config.tokenizer=train:bpe:500",)),
    Case("model folder missing", ("--config.model.init=hf:{}/nowhere",), ("--config.model.init=hf:{}/model",)),
    Case("model on no disk", ("--config.model.init=hf:nobody/nothing",), ("--config.model.init=hf:{}/model",)),
    Case("model folder without weights", ("--config.model.init=hf:{}/empty",), ("--config.model.init=hf:{}/model",)),
    Case("missing tensors", ("--config.model.init=hf:{}/missing",), ("--config.model.init=hf:{}/model",)),
    Case("tensors too many", ("--config.model.init=hf:{}/extra",), ("--config.model.init=hf:{}/model",)),
    Case("tensor of another shape", ("--config.model.init=hf:{}/shape",), ("--config.model.init=hf:{}/model",)),
    Case("weights cut short", ("--config.model.init=hf:{}/short",), ("--config.model.init=hf:{}/model",)),
    Case(
        "tokenizer larger than the weights' table",
        ("--config.model.init=hf:{}/model", "--config.tokenizer=file:{}/large.json"),
        ("--config.model.init=hf:{}/model",),
    ),
    Case(
        "unknown architecture in a folder", ("--config.model.init=hf:{}/unknown",), ("--config.model.init=hf:{}/model",)
    ),
    Case("run without a checkpoint", ("--config.model.init=run:{}/empty",), ("--config.model.init=run:{}/done",)),
    Case("step that was not kept", ("--config.model.init=run:{}/done@1",), ("--config.model.init=run:{}/done@2",)),
    Case("workdir of another config", ("--workdir={}/done", "--config.seed=7"), ("--workdir={}/done",)),
    Case("workdir that is a file", ("--workdir={}/pairs.jsonl",)),
    Case("cache folder that is a file", ("--config.data.cache_dir={}/pairs.jsonl",)),
    Case("logger that is not installed", ("--config.log_to=('wandb',)",), ("--config.log_to=()",)),
    Case("full disk while saving", ("--workdir={}/disk/run",)),
    Case(
        "evaluation file missing",
        ("--config.eval.every=1", "--config.eval.sts=('nowhere.jsonl',)"),
        ("--config.eval.every=1", "--config.eval.sts=('{}/sts.jsonl',)"),
    ),
    Case(
        "nothing to evaluate on",
        ("--model={}/model",),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case("no model", ("--sts={}/sts.jsonl",), ("--model={}/model", "--sts={}/sts.jsonl"), "evaluate", bare=True),
    Case(
        "score that is no number",
        ("--model={}/model", "--sts={}/badsts.jsonl"),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case(
        "folder without judgements",
        ("--model={}/model", "--retrieval={}/empty"),
        ("--model={}/model", "--retrieval={}/beir"),
        "evaluate",
        bare=True,
    ),
    Case(
        "unknown MTEB task",
        ("--model={}/model", "--mteb=STSBenchmrk"),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case(
        "texts to predict, by a model that only makes vectors",
        ("--model={}/model", "--texts={}/pairs.jsonl"),
        ("--model={}/model", "--pairs={}/pairs.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case(
        "texts to predict that are not there",
        ("--config.eval.every=1", "--config.eval.texts=('nowhere.txt',)"),
        ("--config.eval.every=1", "--config.eval.pairs=('{}/pairs.jsonl',)"),
    ),
    Case(
        "masks of no texts",
        ("--model={}/model", "--sts={}/sts.jsonl", "--draws=4"),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case(
        "words filled in by a model that only makes vectors",
        ("--model={}/model", MASKED),
        ("--model={}/words", MASKED),
        "sample",
        bare=True,
    ),
    Case("no word to fill in", ("--model={}/words", "--text=red"), ("--model={}/words", MASKED), "sample", bare=True),
    Case(
        "masks of a text that has its own",
        ("--model={}/words", MASKED, "--mask_rate=0.2"),
        ("--model={}/words", "--texts={}/pairs.jsonl", "--mask_rate=0.2"),
        "sample",
        bare=True,
    ),
    Case("export to nowhere", ("--workdir={}/done",), ("--workdir={}/done", "--out={}/out"), "export", bare=True),
    Case(
        "export over something else",
        ("--workdir={}/done", "--out={}/beir"),
        ("--workdir={}/done", "--out={}/out"),
        "export",
        bare=True,
    ),
    Case(
        "adapters of a run that has none",
        ("--workdir={}/done", "--out={}/out", "--adapter"),
        ("--workdir={}/done", "--out={}/out", "--dtype=bfloat16"),
        "export",
        bare=True,
    ),
    Case(
        "unknown type of numbers",
        ("--workdir={}/done", "--out={}/out", "--dtype=int8"),
        ("--workdir={}/done", "--out={}/out", "--dtype=bfloat16"),
        "export",
        bare=True,
    ),
    Case(
        "unknown template",
        ("--model={}/model", "--sts={}/sts.jsonl", "--template=prompt_eal"),
        ("--model={}/model", "--sts={}/sts.jsonl", "--template=prompt_eol"),
        "evaluate",
        bare=True,
    ),
    Case("folder without a fingerprint", ("--verify={}/beir",), ("--verify={}/model",), "export", bare=True),
    Case("report of no run", ("--workdir={}/empty",), ("--workdir={}/done",), "report", bare=True),
)
