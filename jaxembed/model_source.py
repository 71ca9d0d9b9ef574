"""Where a model comes from: a Hugging Face folder, another run, or scratch.

A `Blueprint` is all that is known of a model but its trained weights: architecture, head, tokenizer, prompts, limits.
A run keeps its blueprint in WORKDIR/model/, so that its checkpoints can be used without the folder it started from.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxembed import checkpoint, run_folder
from jaxembed.config import AUTO, Config, LoraConfig, ModelConfig, TeacherConfig
from jaxembed.config_check import MAX_LENGTH, TRAINED
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.data.tokenizer_training import train_for
from jaxembed.errors import UserError
from jaxembed.hf.architectures import Architecture, architecture, architecture_of
from jaxembed.hf.attention_modes import portable
from jaxembed.hf.digest import digest
from jaxembed.hf.folder import Folder, read_folder
from jaxembed.hf.hub import resolve
from jaxembed.hf.loading import load_onto
from jaxembed.hf.peft import linear_layers
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.weights import backbone_leaves, head_leaves, unused_tensors
from jaxembed.hf.word_rules import require_cut
from jaxembed.models.layers.routing import ExpertOptions
from jaxembed.models.lora import Lora, is_adapter, merge
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import (
    BACKBONE,
    HeadConfig,
    ModelFactory,
    Params,
    TextEncoder,
    flatten,
    join,
    split,
    unflatten,
)
from jaxembed.prompting import adapt, require_portable, require_seeing
from jaxembed.stages import stages_of
from jaxembed.storage import AnyPath, filling, local, sizes

FOLDER = "model"  # in a run's folder
FILE = "blueprint.json"  # in that, written last
SIDES = ("query", "document")

Loader = Callable[[ModelFactory], Params]  # puts the weights onto the mesh in use


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its trained weights.

    Attributes:
      hf_config: the Hugging Face config.json; its model_type names the architecture.
      head: from token states to a vector.
      pooling_said: whether the folder that it comes from says how to pool; False where that is a guess.
      max_length: longest text in tokens.
      prompts: named prompts.
      default_prompt_name: the prompt used when none is named; '' for none.
      similarity: how vectors are meant to be compared: 'cosine', 'dot', 'euclidean', 'manhattan'.
      truncate_dim: vectors are cut to this many dimensions after all else; 0 for not.
      tokenizer: texts to token ids.
      unused: tensors that the architecture's class has and embeddings do not use; handed through to the export.
      base: a digest of the weights that a run's adapters stand on; '' without adapters.
    """

    hf_config: dict[str, Any]
    head: HeadConfig
    pooling_said: bool
    max_length: int
    prompts: dict[str, str]
    default_prompt_name: str
    similarity: str
    truncate_dim: int
    tokenizer: Tokenizer
    unused: Mapping[str, np.ndarray]
    base: str = ""

    @property
    def architecture(self) -> Architecture:
        """The entry in the table of architectures."""
        return architecture_of(self.hf_config)

    @property
    def backbone(self) -> Any:
        """The backbone's frozen config."""
        return self.architecture.config_from_hf(self.hf_config)

    @property
    def longest(self) -> int:
        """The most tokens that a text may have."""
        return self.backbone.max_length if self.architecture.bounded else MAX_LENGTH

    def factory(self, options: ModelOptions, seed: int = 0, lora: Lora | None = None) -> ModelFactory:
        """Returns the maker of this model; `seed` is that of fresh weights, `lora` its adapters."""
        make, backbone = self.architecture.backbone, self.backbone
        return ModelFactory(lambda: TextEncoder(jax.random.key(seed), make, backbone, self.head, options, lora))

    def lora(self, c: LoraConfig) -> Lora | None:
        """Returns the adapters that a config asks for, None for none.

        Raises:
          UserError: `targets` names no linear layer.
        """
        if not c.rank:
            return None
        rows = self.architecture.rows(self.backbone)
        scale = c.alpha / (c.rank**0.5 if c.rslora else c.rank)
        return Lora(c.rank, scale, c.dropout, linear_layers(rows, c.targets, "config.model.lora.targets"))

    def save(self, folder: AnyPath) -> None:
        """Writes the blueprint; `load` reads it."""
        said = dataclasses.asdict(dataclasses.replace(self, tokenizer=None, unused=None))
        with filling(folder, FILE, anew=True) as place:  # every start writes the same
            (place / FILE).unlink(missing_ok=True)  # until all is there
            self.tokenizer.save(place, self.max_length)
            if self.unused:
                (place / "unused").mkdir(exist_ok=True)
                write_tensors(place / "unused", self.unused)
            run_folder.write_json(place / FILE, said)

    @classmethod
    def load(cls, folder: AnyPath) -> "Blueprint":
        """Reads what `save` wrote.

        Raises:
          UserError: there is none.
        """
        try:
            place = local(folder)
            said = json.loads((place / FILE).read_text())
        except FileNotFoundError as error:
            raise UserError(f"{folder.parent}: not the folder of a run that has started: no {folder.name}/") from error
        unused = open_tensors(place / "unused") if (place / "unused").exists() else {}
        loaded = {"head": HeadConfig(**said["head"]), "tokenizer": Tokenizer.load(f"hf:{place}"), "unused": unused}
        return cls(**(said | loaded))


def options(model: ModelConfig) -> ModelOptions:
    """Returns how the config wants the model computed."""
    said = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelOptions)}
    c = model.experts
    return ModelOptions(**said | {"experts": ExpertOptions(c.routing == "expert_choice", c.kernel, c.capacity)})


def open_source(c: Config, workdir: AnyPath) -> tuple[Blueprint, Loader]:
    """Finds the model that the config starts from, with the head that the config wants.

    Args:
      c: the run's.
      workdir: the run's folder. A tokenizer that was trained for this run before is taken from there.

    Raises:
      UserError: a folder, run or architecture that does not serve; bad texts, where a tokenizer is made of them.
    """
    blueprint, load = _scratch(c, workdir) if c.model.init == "scratch" else _open(c.model.init)
    base = digest_of(c.model.init) if c.model.lora.rank else ""
    return dataclasses.replace(_adapted(blueprint, c), base=base), load


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model whose vectors of the training texts some losses use.

    Attributes:
      blueprint: its own tokenizer, prompts, limits.
      factory: its maker.
      load: puts its weights onto the mesh in use.
    """

    blueprint: Blueprint
    factory: ModelFactory
    load: Loader


def open_teacher(c: TeacherConfig) -> Teacher | None:
    """Finds the teacher: its vectors whole even where its folder cuts them, and of length 1 if compared by cosine.

    Guides are as in GISTEmbed (Solatorio 2024, arXiv:2402.16829), teachers whose vectors are matched as in Jasper and
    Stella (Zhang et al. 2024, arXiv:2412.19048). No run keeps its teacher: one that goes on finds it by its name again,
    so a run that is still training serves best as 'run:DIR@STEP'. Its weights are held in the dtype of its computation.

    Raises:
      UserError: a folder or run that does not serve.
    """
    if not c.init:
        return None
    blueprint, load = _open(c.init)
    if blueprint.similarity == "cosine":  # guides and scores are dot products of its vectors
        blueprint = dataclasses.replace(blueprint, head=dataclasses.replace(blueprint.head, normalize=True))
    return Teacher(blueprint, blueprint.factory(ModelOptions(dtype=c.dtype, param_dtype=c.dtype)), load)


def _open(init: str) -> tuple[Blueprint, Loader]:
    """Opens 'hf:…' or 'run:…'."""
    kind, _, where = init.partition(":")
    return open_folder(resolve(where)) if kind == "hf" else open_run(where)


def open_folder(path: pathlib.Path) -> tuple[Blueprint, Loader]:
    """Opens a sentence-transformers or transformers folder.

    Raises:
      UserError: it does not hold a model that we know; see `jaxembed.hf.folder.read_folder`.
    """
    folder = read_folder(path)
    dense = {
        name: (module.out_features, module.bias) if module else (0, False)
        for name, module in (("expansion", folder.expansion), ("projection", folder.dense))
    }
    blueprint = Blueprint(
        hf_config=folder.hf_config,
        head=HeadConfig(
            pooling=folder.pooling,
            pool_prompt=folder.pool_prompt,
            latents=folder.latent.latents if folder.latent else 0,
            latent_heads=folder.latent.heads if folder.latent else 0,
            pool_layers=folder.layer_pooling.first if folder.layer_pooling else -1,
            **{name: width for name, (width, _) in dense.items()},
            **{f"{name}_bias": bias for name, (_, bias) in dense.items()},
            normalize=folder.normalize,
        ),
        pooling_said=folder.pooling_said,
        max_length=folder.max_length,
        prompts=dict(folder.prompts),
        default_prompt_name=folder.default_prompt_name,
        similarity=folder.similarity,
        truncate_dim=folder.truncate_dim or 0,
        tokenizer=Tokenizer.load(f"hf:{folder.transformer}"),
        unused=unused_tensors(folder),
    )
    _require_fitting(blueprint.tokenizer, blueprint, f"{path}: its tokenizer")
    longest = blueprint.tokenizer.fitting(blueprint.longest)
    blueprint = dataclasses.replace(blueprint, max_length=min(blueprint.max_length, longest))
    return blueprint, lambda factory: _load_folder(folder, factory)


def open_run(spec: str) -> tuple[Blueprint, Loader]:
    """Opens a run's checkpoint: 'DIR', 'DIR@STEP' or 'DIR@best'.

    Adapters are merged into the weights that the run started from, which are opened again by the same name: so another
    run that is still training serves such a run best as 'run:DIR@STEP'.

    Raises:
      UserError: there is no such run or checkpoint, or what it started from is gone or has changed.
    """
    checkpoint.find(spec)
    workdir = checkpoint.split(spec)[0]
    blueprint = Blueprint.load(workdir / FOLDER)
    model = run_folder.read_config(workdir).model
    if model.lora.rank:
        _, load_base = open_base(workdir, model.init)
        return blueprint, lambda factory: _load_merged(spec, blueprint, model.lora, load_base, factory)

    def load(factory: ModelFactory) -> Params:
        wanted = flatten(factory.abstract())
        had = flatten(blueprint.factory(ModelOptions()).abstract())  # its head may have less than ours, or more
        stored = unflatten({path: wanted.get(path, leaf) for path, leaf in had.items()})
        params = flatten(checkpoint.restore_model(spec, stored))
        kept = {path: x.astype(wanted[path].dtype) for path, x in params.items() if path in wanted}
        return _completed(unflatten(kept), factory)

    return blueprint, load


def open_base(workdir: AnyPath, init: str) -> tuple[Blueprint, Loader]:
    """Opens what a run's adapters stand on: `init` is its config.model.init.

    Raises:
      UserError: it is there no more, or has other weights now.
    """
    try:
        opened = _open(init)
    except UserError as error:
        base = f"its checkpoints hold adapters to config.model.init = {init!r}"
        raise type(error)(f"run:{workdir}: {base}, which cannot be opened: {error}") from error
    require_base(workdir, init, digest_of(init))
    return opened


def require_base(workdir: AnyPath, init: str, base: str) -> None:
    """Makes sure that what a run's adapters stand on is still what they were trained on.

    Args:
      workdir: the run's folder.
      init: its config.model.init.
      base: a digest of the weights there now.

    Raises:
      UserError: its weights are others now.
    """
    if Blueprint.load(workdir / FOLDER).base != base:
        raise UserError(
            f"{workdir}: the weights of config.model.init = {init!r} are not those that its adapters were trained on: "
            "put these back, or train anew in another --workdir; hf:ORG/NAME@REVISION and run:DIR@STEP keep theirs"
        )


def digest_of(init: str) -> str:
    """Returns a digest of the weights of 'hf:…' or 'run:…'; see `Blueprint.base`.

    That of a checkpoint is made of its files' names, which no two that were saved have in common, and sizes.
    """
    kind, _, where = init.partition(":")
    if kind == "hf":
        return digest(open_tensors(read_folder(resolve(where)).transformer))
    step = checkpoint.find(where)
    said = [step.name, Blueprint.load(checkpoint.split(where)[0] / FOLDER).base]
    said += [f"{part}/{name} {size}" for part in ("average", "model") for name, size in sizes(step / part).items()]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def load_trained(spec: str, blueprint: Blueprint, lora: Lora) -> Params:
    """Returns the adapters and the head of a run's checkpoint, in float32."""
    return checkpoint.restore_model(spec, split(blueprint.factory(ModelOptions(), lora=lora).abstract())[0])


def _load_merged(
    spec: str, blueprint: Blueprint, config: LoraConfig, load_base: Loader, factory: ModelFactory
) -> Params:
    """Loads what a run with adapters started from, and brings in what it trained."""
    lora, leaves = blueprint.lora(config), flatten(load_base(factory))
    trained = flatten(load_trained(spec, blueprint, lora))
    adapters = {path.removeprefix(BACKBONE): x for path, x in trained.items() if is_adapter(path)}
    backbone = {path.removeprefix(BACKBONE): x for path, x in leaves.items() if path.startswith(BACKBONE)}
    head = {path: trained.get(path, x).astype(x.dtype) for path, x in leaves.items() if not path.startswith(BACKBONE)}
    merged = {BACKBONE + path: x for path, x in merge(backbone | adapters, lora).items()}
    return _completed(unflatten(merged | head), factory)


def _load_folder(folder: Folder, factory: ModelFactory) -> Params:
    wanted = {path: x for path, x in flatten(factory.abstract()).items() if not is_adapter(path)}
    shapes = {path.removeprefix(BACKBONE): x.shape for path, x in wanted.items() if path.startswith(BACKBONE)}
    leaves = {BACKBONE + path: leaf for path, leaf in backbone_leaves(folder, shapes).items()}
    leaves |= head_leaves(folder, {path: x.shape for path, x in wanted.items()})
    return _completed(unflatten(load_onto(leaves, {path: wanted[path] for path in leaves})), factory)


def _completed(params: Params, factory: ModelFactory) -> Params:
    """Adds fresh weights where the config wants what these have not: adapters, parts of the head."""
    missing = flatten(factory.abstract()).keys() - flatten(params).keys()
    fresh = jax.jit(lambda: {path: x for path, x in flatten(factory.fresh()).items() if path in missing})
    return join(params, unflatten(fresh())) if missing else params


def _scratch(c: Config, workdir: AnyPath) -> tuple[Blueprint, Loader]:
    arch = architecture(c.model.arch)
    tokenizer = _tokenizer(c, workdir)
    shape = dict(c.model.shape)
    hf_config = arch.fresh_hf_config(shape, tokenizer, "config.model.shape")
    longest = arch.config_from_hf(hf_config).max_length
    blueprint = Blueprint(hf_config, HeadConfig(), True, longest, {}, "", "cosine", 0, tokenizer, {})
    return blueprint, lambda factory: jax.jit(factory.fresh)()


def _adapted(blueprint: Blueprint, c: Config) -> Blueprint:
    """Returns the blueprint with what the config asks for."""
    m, head, arch, hf_config = c.model, blueprint.head, blueprint.architecture, blueprint.hf_config
    if m.arch not in (AUTO, arch.model_type):
        raise UserError(f"config.model.arch = {m.arch!r}, but {m.init} is a {arch.model_type!r}: leave it 'auto'")
    if m.rope_scaling:
        hf_config = arch.with_rope_scaling(hf_config, m.rope_scaling)
    longest = dataclasses.replace(blueprint, hf_config=hf_config).longest
    hf_config = arch.with_attention(hf_config, m.attention_layers or (m.attention,))
    if c.export and not portable(hf_config):
        raise UserError(
            f"config.model.attention{'_layers' if m.attention_layers else ''}: no folder can say this to other "
            "programs: set config.export = False; Embedder and jaxembed.evaluate open the run itself"
        )
    if m.projection and head.projection and m.projection != head.projection:
        raise UserError(f"config.model.projection = {m.projection}, but {m.init} has one of width {head.projection}")
    tokenizer = blueprint.tokenizer
    if c.tokenizer != AUTO and m.init != "scratch":
        tokenizer = Tokenizer.load(_tokenizer_spec(c.tokenizer))
        _require_fitting(tokenizer, blueprint, f"config.tokenizer = {c.tokenizer}")
    head = _head(blueprint, c)
    attention = arch.config_from_hf(hf_config).attention
    if not blueprint.pooling_said and "bidirectional" in attention:
        head = dataclasses.replace(head, pooling="mean")  # the guess for what generates was the last token
    head, tokenizer = adapt(head, tokenizer, m.pooling, m.template, "config.model.", blueprint.pooling_said)
    require_seeing(head, attention)
    if c.export:
        require_portable(head, tokenizer)
        require_cut(arch.cuts, tokenizer, arch.model_type)
    if not head.pool_prompt:
        _require_apart(tokenizer, blueprint.prompts | dict(c.prompts))
    if head.pool_layers >= 0:
        hf_config = hf_config | {"output_hidden_states": True}  # else sentence-transformers skips the mean of layers
    lengths = _lengths(c, tokenizer, blueprint.max_length, longest, arch.model_type)
    return dataclasses.replace(
        blueprint,
        hf_config=hf_config,
        head=head,
        pooling_said=True,
        tokenizer=tokenizer,
        max_length=max(lengths.values()),
        prompts=blueprint.prompts | {name: text for name, text in c.prompts.items() if text},
        truncate_dim=0,
    )


def _head(blueprint: Blueprint, c: Config) -> HeadConfig:
    """Returns the head with the parts that the config adds; its pooling is still the model's own."""
    m, head, backbone = c.model, blueprint.head, blueprint.backbone
    latents, heads = head.latents, head.latent_heads
    if m.pooling == "latent" and not latents:
        latents, heads = m.latents, m.latent_heads
        if backbone.width % heads:
            raise UserError(f"config.model.latent_heads = {heads} does not divide the model's width, {backbone.width}")
    first = m.pool_layers
    if first > backbone.layers or (first >= 0 and head.pool_layers not in (-1, first)):
        own = f"pools layers from {head.pool_layers}" if head.pool_layers >= 0 else f"has {backbone.layers} layers"
        raise UserError(f"config.model.pool_layers = {first}, but {m.init} {own}")
    first = max(first, head.pool_layers)
    if first >= 0 and any(stage.config.matryoshka.layers for stage in stages_of(c)):
        raise UserError(
            "config.matryoshka.layers: a model that pools several layers (config.model.pool_layers, or the folder's "
            "own) cannot be cut to fewer; leave it ()"
        )
    return dataclasses.replace(
        head,
        latents=latents,
        latent_heads=heads,
        pool_layers=first,
        pool_prompt=m.pool_prompt and head.pool_prompt,
        projection=m.projection or head.projection,
        normalize=m.normalize,
    )


def _require_apart(tokenizer: Tokenizer, prompts: Mapping[str, str]) -> None:
    """Refuses prompts whose last token swallows the beginning of a text, which then would not be pooled."""
    for name, prompt in prompts.items():
        if prompt and not tokenizer.keeps(prompt):
            raise UserError(
                f"config.prompts.{name} = {prompt!r}: its last token merges with a text's first word, which "
                "config.model.pool_prompt = False then leaves out: end the prompt without a space, or pool prompts too"
            )


def _lengths(c: Config, tokenizer: Tokenizer, usual: int, longest: int, model_type: str) -> dict[str, int]:
    """Returns the longest text of each side in tokens, over all stages; `usual` where the config does not say."""
    said = [stage.config.data.max_length for stage in stages_of(c)]
    most = tokenizer.fitting(longest)
    lengths = {side: max(getattr(s, side) or min(usual, most) for s in said) for side in SIDES}
    for side, length in lengths.items():
        if length > most:
            times = f" of a text that is read {tokenizer.copies} times" if tokenizer.copies > 1 else ""
            raise UserError(f"config.data.max_length.{side} = {length}: this {model_type} takes at most {most}{times}")
    return lengths


def _require_fitting(tokenizer: Tokenizer, blueprint: Blueprint, what: str) -> None:
    size = blueprint.backbone.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(f"{what} has {tokenizer.vocab_size} tokens, but the model's table only {size}")


def _tokenizer(c: Config, workdir: AnyPath) -> Tokenizer:
    """Returns the tokenizer of a model from scratch: loaded, trained before for this run, or trained now."""
    if not c.tokenizer.startswith(TRAINED):
        return Tokenizer.load(_tokenizer_spec(c.tokenizer))
    if (workdir / FOLDER / FILE).is_file():
        return Tokenizer.load(f"hf:{workdir / FOLDER}")
    return train_for(c)


def _tokenizer_spec(spec: str) -> str:
    kind, _, where = spec.partition(":")
    return f"hf:{resolve(where)}" if kind == "hf" else spec
