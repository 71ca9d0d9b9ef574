"""Where a model comes from: a Hugging Face folder, another run, or scratch.

A `Blueprint` is all that is known of a model but its trained weights: architecture, head, tokenizer, prompts, limits.
A run keeps its blueprint in WORKDIR/model/, so that its checkpoints can be used without the folder it started from.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import jax

from jaxembed import checkpoint, run_folder
from jaxembed.adapting import adapted, require_arch, require_fitting, tokenizer_spec
from jaxembed.blueprint import FILE, FOLDER, Blueprint
from jaxembed.both_ways import becomes_both_ways, both_ways_blueprint, both_ways_loader
from jaxembed.config import Config, ExpertsConfig, LoraConfig, ModelConfig, RouterConfig, TeacherConfig
from jaxembed.config_check import TRAINED
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.data.tokenizer_training import train_for
from jaxembed.errors import UserError
from jaxembed.hf.architectures import architecture
from jaxembed.hf.diffusion import MASK_ID
from jaxembed.hf.digest import digest
from jaxembed.hf.folder import Folder, read_folder
from jaxembed.hf.hub import resolve
from jaxembed.hf.language_heads import GENERATING, language_leaves, language_of
from jaxembed.hf.loading import load_onto
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.weights import backbone_leaves, head_leaves, unused_tensors
from jaxembed.language import language_for, masks
from jaxembed.mask_token import with_mask_token
from jaxembed.models.layers.routing import ExpertOptions
from jaxembed.models.layers.ssm import SsmOptions
from jaxembed.models.lora import Lora, is_adapter, merge
from jaxembed.models.moee import with_moee
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import (
    BACKBONE,
    LANGUAGE,
    HeadConfig,
    ModelFactory,
    Params,
    flatten,
    join,
    split,
    unflatten,
)
from jaxembed.stages import stages_of
from jaxembed.storage import AnyPath, sizes
from jaxembed.upcycling import sparse_blueprint, sparse_loader

Loader = Callable[[ModelFactory], Params]  # puts the weights onto the mesh in use


def options(model: ModelConfig) -> ModelOptions:
    """Returns how the config wants the model computed."""
    said = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelOptions)}
    c = model.experts
    parts = {
        "experts": ExpertOptions(c.routing == "expert_choice", c.kernel, c.capacity),
        "ssm": SsmOptions(model.ssm.kernel, model.ssm.chunk),
    }
    return ModelOptions(**said | parts)


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
    require_arch(blueprint, c.model)
    if becomes_both_ways(blueprint, c):
        load = load if c.model.init == "scratch" else _with_head(both_ways_loader(blueprint, load))
        blueprint = both_ways_blueprint(blueprint, c.model.ssm)
    blueprint = dataclasses.replace(adapted(blueprint, c), base=base)
    if masks(c):
        blueprint, load = _with_mask_token(blueprint, load, c.model.mask_token)
    blueprint = dataclasses.replace(blueprint, language=language_for(blueprint, c))
    if blueprint.language and blueprint.language.own_table and blueprint.architecture.portable_as:
        blueprint = dataclasses.replace(blueprint, unused={})  # the head, which is trained now
    if c.model.experts.upcycle:
        load = sparse_loader(blueprint, load, c.model.experts, c.seed)
        blueprint = sparse_blueprint(blueprint, c.model.experts)
    _require_experts(c, blueprint)
    head = with_moee(blueprint.head, blueprint.backbone, c.model.moee, c.model.moee_weight, "config.model.")
    return dataclasses.replace(blueprint, head=head), load


def _with_mask_token(blueprint: Blueprint, load: Loader, token: str) -> tuple[Blueprint, Loader]:
    blueprint, load = with_mask_token(blueprint, load, token)
    return blueprint, _with_head(load)


def with_words(blueprint: Blueprint, load: Loader) -> tuple[Blueprint, Loader]:
    """Returns a folder's model with the head by which its checkpoint predicts words; that of a run as it is.

    Raises:
      UserError: an encoder, whose folder may have none.
    """
    if blueprint.language:
        return blueprint, load
    name = blueprint.architecture.model_type
    if name not in GENERATING:
        raise UserError(
            f"a {name} predicts no words by itself: train it with a loss over tokens, and name the run's folder"
        )
    if blueprint.tokenizer.mask_id >= 0 or MASK_ID in blueprint.hf_config:
        blueprint, load = with_mask_token(blueprint, load, "")
    tokenizer, head = blueprint.tokenizer, language_of(blueprint.hf_config)
    said = {"words": blueprint.backbone.vocab_size, "mask_id": tokenizer.mask_id, "framing": tokenizer.framing_ids}
    return dataclasses.replace(blueprint, language=dataclasses.replace(head, **said)), load


def _require_experts(c: Config, blueprint: Blueprint) -> None:
    """Refuses what the model's experts cannot be, before any device is asked for memory."""
    experts, parallel = blueprint.experts, c.mesh.expert
    if experts and parallel > 1 and experts.count % parallel:
        raise UserError(f"config.mesh.expert = {parallel} does not divide the model's {experts.count} experts")
    stages, usual, routing = [stage.config for stage in stages_of(c)], ExpertsConfig(), c.model.experts.routing
    for field in ("routing", "kernel", "capacity"):
        value = getattr(c.model.experts, field)
        if not experts and value != getattr(usual, field):
            raise UserError(f"config.model.experts.{field} = {value!r}: the model has no experts: leave it alone")
    for field in ("balance", "z"):
        values = {getattr(stage.router, field) for stage in stages} - {getattr(RouterConfig(), field)}
        if not experts and values:
            raise UserError(f"config.router.{field} = {min(values):g}: the model has no experts: leave it alone")
    if experts and experts.by_source != (routing == "source"):
        who = "texts' sources pick experts: set it to 'source'" if experts.by_source else "a router picks experts"
        raise UserError(f"config.model.experts.routing = {routing!r}, but in {c.model.init} {who}")
    sources = max(len(stage.data.train) for stage in stages)
    if experts and experts.by_source and sources > experts.count:
        raise UserError(f"config.data.train: {sources} sources for the {experts.count} experts of {c.model.init}")


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
    require_fitting(blueprint.tokenizer, blueprint, f"{path}: its tokenizer")
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
    config = run_folder.read_config(workdir)
    model = config.model
    if model.lora.rank:
        base, load_base = open_base(workdir, model.init)
        if becomes_both_ways(base, config):
            load_base = both_ways_loader(base, load_base)
        if masks(config):
            base = dataclasses.replace(base, tokenizer=blueprint.tokenizer)  # which has the mask token by now
            _, load_base = _with_mask_token(base, load_base, "")
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


def fingerprint(spec: str, blueprint: Blueprint) -> str:
    """Returns a digest of all that a model's vectors depend on, whatever it is called and wherever it lies.

    Args:
      spec: what was opened: a run ('DIR', 'DIR@STEP', 'DIR@best'), a folder, or 'ORG/NAME[@REVISION]' on the hub.
      blueprint: as it is used.
    """
    if is_run(spec):
        weights = [digest_of(f"run:{spec}")]
    else:
        folder = read_folder(resolve(spec))
        modules = (folder.layer_pooling, folder.latent, folder.expansion, folder.dense)
        weights = [digest(open_tensors(module.path)) for module in modules if module]
        weights.append(digest(open_tensors(folder.transformer)))
    kept = {key: value for key, value in blueprint.hf_config.items() if not key.startswith("_")}
    said = [*weights, blueprint.tokenizer.fingerprint(), repr(blueprint.head), repr(sorted(kept.items(), key=str))]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def is_run(spec: str) -> bool:
    """Tells a run's folder, with or without a step, from other models."""
    return (checkpoint.split(spec)[0] / checkpoint.FOLDER).is_dir()


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
    leaves |= language_leaves(folder, {path: x.shape for path, x in wanted.items() if path.startswith(LANGUAGE)})
    return _completed(unflatten(load_onto(leaves, {path: wanted[path] for path in leaves})), factory)


def _completed(params: Params, factory: ModelFactory) -> Params:
    """Adds fresh weights where the config wants what these have not: adapters, parts of the head."""
    wanted = flatten(factory.abstract())
    missing = wanted.keys() - flatten(params).keys()
    if any(map(is_adapter, wanted)) and any(path.startswith(LANGUAGE) for path in missing):
        raise UserError(
            "config.model.lora.rank: the checkpoint has no head that predicts words, and beside adapters none is "
            "trained: train all weights with a loss over tokens first, or start from a checkpoint that has it"
        )
    fresh = jax.jit(lambda: {path: x for path, x in flatten(factory.fresh()).items() if path in missing})
    return join(params, unflatten(fresh())) if missing else params


def _with_head(load: Loader) -> Loader:
    """Returns a loader that also makes what `load` leaves out: adapters, parts of the head."""
    return lambda factory: _completed(load(factory), factory)


def _scratch(c: Config, workdir: AnyPath) -> tuple[Blueprint, Loader]:
    arch = architecture(c.model.arch)
    tokenizer = _tokenizer(c, workdir)
    shape = dict(c.model.shape)
    hf_config = arch.fresh_hf_config(shape, tokenizer, "config.model.shape")
    longest = arch.config_from_hf(hf_config).max_length
    blueprint = Blueprint(hf_config, HeadConfig(), True, longest, {}, "", "cosine", 0, tokenizer, {})
    return blueprint, lambda factory: jax.jit(factory.fresh)()


def _tokenizer(c: Config, workdir: AnyPath) -> Tokenizer:
    """Returns the tokenizer of a model from scratch: loaded, trained before for this run, or trained now."""
    if not c.tokenizer.startswith(TRAINED):
        return Tokenizer.load(tokenizer_spec(c.tokenizer))
    if (workdir / FOLDER / FILE).is_file():
        return Tokenizer.load(f"hf:{workdir / FOLDER}")
    return train_for(c)
