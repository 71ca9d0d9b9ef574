"""Write a run's model as a folder that sentence-transformers opens, or check such a folder.

    python -m jaxembed.export --workdir=RUN --out=FOLDER [--layers=N] [--dim=N] [--dtype=bfloat16] [--expert=N]
    python -m jaxembed.export --workdir=RUN --out=FOLDER --adapter
    python -m jaxembed.export --workdir=RUN --out=FOLDER --layout=hub
    python -m jaxembed.export --verify=FOLDER

--workdir takes RUN, RUN@STEP or RUN@best. --layers and --dim write a smaller model: the first N layers, vectors cut to
their first N dimensions; config.matryoshka trains models that bear it. --expert: where each source of the training has
an expert of its own (config.model.experts.routing = 'source'), a folder is the dense model of one of them. --adapter
writes a run's low-rank adapters alone, as a folder of the peft library; without it they are merged. --layout=hub: of a
LLaDA or Dream, which else is written as the llama or qwen2 that it is, seen from both sides: the folder that its own
code on the hub opens, with the head that predicts words, but without pooling, prompts and that code. --verify encodes
the folder's 8 fingerprint texts anew, in JAX and, where it is installed, in sentence-transformers, and compares the
vectors with those that were written with it; there it also checks that every weight is found, that attention sees what
it should, and that padding changes nothing.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.distributed import connect
from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, local, path_of
from jaxembed.verification import FINGERPRINT, TEXTS, verify, write_fingerprint

if TYPE_CHECKING:
    from jaxembed.blueprint import Blueprint
    from jaxembed.embedder import Embedder
    from jaxembed.losses.objective import Size

PORTABLE, HUB = "portable", "hub"  # layouts of folders
WIDTHS = "matryoshka_dimensions"  # in config.json: programs that serve the folder let vectors be cut to these only


def export_model(
    embedder: "Embedder",
    out: AnyPath,
    layers: int = 0,
    dim: int = 0,
    dtype: str = "float32",
    layout: str = PORTABLE,
    note: str = "",
) -> None:
    """Writes the folder, with its model card and fingerprint: all of it, or nothing.

    Args:
      embedder: the model; its parameters are gathered to the host a tensor at a time. Of what run it is, and of which
        step, says its `run`: the card tells of that run's data and scores.
      out: the folder; one that was exported before is replaced.
      layers: only the first so many; 0 = all.
      dim: vectors are cut to their first dimensions, after all else; 0 = as the model says.
      dtype: of the tensors written: 'float32' | 'bfloat16'. The fingerprint is that of the weights as written.
      layout: 'portable', for sentence-transformers; 'hub', of a model whose class is code on the hub: for that code.
      note: what else the card is to say, a sentence or more.

    Raises:
      UserError: `out` is something else, or cannot be written; the model is smaller than what is asked for, or its
        vectors are made of routing weights; it has no layout of its own on the hub.
    """
    import jax

    from jaxembed import run_folder
    from jaxembed.hf.table import export_tensors
    from jaxembed.hf.writer import write_folder
    from jaxembed.losses.objective import sizes_of
    from jaxembed.model_source import FOLDER, Blueprint
    from jaxembed.models.text_encoder import BACKBONE, LANGUAGE, flatten
    from jaxembed.reporting.model_card import card_files
    from jaxembed.sharding import to_host
    from jaxembed.stages import stages_of

    if layout == HUB:
        _export_for_hub(embedder, out, layers, dim, dtype)
        return
    _require_of_states(embedder.blueprint, out)
    small = _as_kin(_as_written(_smaller(_of_one_expert(embedder), layers, dim), dtype))
    layers = 0 if layers == embedder.blueprint.backbone.layers else layers
    blueprint, hf_config = small.blueprint, small.blueprint.hf_config
    sizes: tuple[Size, ...] = ()
    if small.run:
        sizes = sizes_of(stages_of(run_folder.read_config(small.run.workdir))[-1].config.matryoshka)
        hf_config = _with_widths(hf_config, sizes, layers, small.width)
    with jax.default_matmul_precision("float32"):
        fingerprint = write_fingerprint(small.encode(list(TEXTS)))
    scored = Blueprint.load(small.run.workdir / FOLDER) if small.run else blueprint
    notes = (note, _note(embedder, sizes, layers, dim), _expert_note(embedder.blueprint, scored))
    note = " ".join(filter(None, notes))
    with jax.set_mesh(small.mesh):
        backbone = flatten(small.params["backbone"])
        others = (BACKBONE, LANGUAGE)
        head = {path: to_host(x) for path, x in flatten(small.params).items() if not path.startswith(others)}
        kernel = head.get("projection/kernel")
        projection = None if kernel is None else (kernel, head.get("projection/bias"))
        if jax.process_index() > 0:  # helps to gather, and leaves the writing to process 0
            for _ in export_tensors(
                blueprint.architecture.rows(blueprint.backbone), backbone, blueprint.backbone.layers
            ):
                pass
            return
        write_folder(
            out,
            hf_config=hf_config,
            architecture=blueprint.architecture,
            config=blueprint.backbone,
            leaves=backbone,
            tokenizer=blueprint.tokenizer,
            pooling=blueprint.head.pooling,
            pool_prompt=blueprint.head.pool_prompt,
            normalize=blueprint.head.normalize,
            projection=projection,
            max_length=blueprint.max_length,
            prompts=blueprint.prompts,
            default_prompt_name=blueprint.default_prompt_name,
            similarity=blueprint.similarity,
            truncate_dim=blueprint.truncate_dim,
            dtype=dtype,
            head=head,
            unused=blueprint.unused,
            extra_files={**card_files(small, note), FINGERPRINT: fingerprint},
        )


def _export_for_hub(embedder: "Embedder", out: AnyPath, layers: int, dim: int, dtype: str) -> None:
    """Writes the folder that a model's own code on the hub opens."""
    import jax

    from jaxembed.hf.table import export_tensors, leaves_of
    from jaxembed.hf.writer import hub_rows, write_hub_folder
    from jaxembed.models.text_encoder import BACKBONE, LANGUAGE, flatten

    architecture = embedder.blueprint.architecture
    if not architecture.portable_as:
        raise UserError(
            f"--layout=hub: {architecture.model_type} is a class of transformers, whose layout is the only one: leave "
            "--layout out"
        )
    if dim:
        raise UserError(f"--layout=hub: that code makes no vectors that --dim={dim} could cut: leave --dim out")
    small = _as_written(_smaller(embedder, layers, 0), dtype)
    blueprint = small.blueprint
    leaves = {
        path.removeprefix(BACKBONE): x
        for path, x in flatten(small.params).items()
        if path.startswith((BACKBONE, LANGUAGE))
    }
    with jax.set_mesh(small.mesh):
        if jax.process_index() > 0:  # helps to gather, and leaves the writing to process 0
            trained = any(path.startswith(LANGUAGE) for path in leaves)
            rows = hub_rows(architecture, blueprint.hf_config, blueprint.backbone, trained)
            for _ in export_tensors(rows, {path: leaves[path] for path in leaves_of(rows)}, blueprint.backbone.layers):
                pass
            return
        write_hub_folder(
            out,
            hf_config=blueprint.hf_config,
            architecture=architecture,
            leaves=leaves,
            tokenizer=blueprint.tokenizer,
            max_length=blueprint.max_length,
            dtype=dtype,
            unused=blueprint.unused,
        )


def export_adapter(spec: str, out: AnyPath) -> str:
    """Writes the adapters of a run as a folder that `peft.PeftModel.from_pretrained` opens.

    Args:
      spec: the run: 'DIR', 'DIR@STEP' or 'DIR@best'.
      out: the folder, which must not be there.

    Returns:
      What its README warns of, '' for nothing.

    Raises:
      UserError: the run has no adapters, or has trained what such a folder cannot hold; its base is another run, or has
        other weights now.
    """
    import jax

    from jaxembed import model_source, run_folder, sharding
    from jaxembed.checkpoint import split
    from jaxembed.config import MeshConfig
    from jaxembed.hf.attention_modes import portable
    from jaxembed.hf.peft import base_of, caution, write_peft
    from jaxembed.models.lora import is_adapter
    from jaxembed.models.text_encoder import BACKBONE, flatten

    workdir = split(spec)[0]
    blueprint, model = model_source.Blueprint.load(workdir / model_source.FOLDER), run_folder.read_config(workdir).model
    lora = blueprint.lora(model.lora)
    if lora is None:
        raise UserError(f"--adapter: {workdir} has trained all weights (its config.model.lora.rank is 0): leave it out")
    _require_of_states(blueprint, out)
    if blueprint.architecture.portable_as:
        raise UserError(
            f"--adapter: the class of a {blueprint.architecture.model_type} is code on the hub, which a folder of the "
            "peft library does not find: leave --adapter out"
        )
    if not portable(blueprint.hf_config):
        raise UserError(f"--adapter: no folder can say to other programs what the attention of {workdir} sees")
    kind, _, where = model.init.partition(":")
    if kind != "hf":
        raise UserError(f"--adapter: the adapters of {workdir} stand on {model.init}, no folder: leave --adapter out")
    base, revision = base_of(where)
    own, _ = model_source.open_base(workdir, model.init)
    if own.architecture != blueprint.architecture:
        raise UserError(
            f"--adapter: {workdir} has made a model that reads both ways of {model.init}, which its adapters do not "
            "fit: leave --adapter out"
        )
    warning = caution(blueprint.architecture, blueprint.hf_config, own.hf_config)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        leaves = flatten(model_source.load_trained(spec, blueprint, lora))
        head = sorted({path.split("/")[0] for path in leaves if not is_adapter(path)})
        if head:
            raise UserError(
                f"--adapter: {workdir} has trained its {' and '.join(head)} too, for which an adapter's folder has no "
                "place: leave --adapter out"
            )
        adapters = {path.removeprefix(BACKBONE): sharding.to_host(x) for path, x in leaves.items()}
    if jax.process_index() > 0:
        return warning
    write_peft(
        out,
        architecture=blueprint.architecture,
        hf_config=blueprint.hf_config,
        adapters=adapters,
        lora=lora,
        base=base,
        revision=revision,
        tokenizer=blueprint.tokenizer,
        max_length=blueprint.max_length,
        pooling=blueprint.head.pooling,
        pool_prompt=blueprint.head.pool_prompt,
        normalize=blueprint.head.normalize,
        prompts=blueprint.prompts,
        warning=warning,
    )
    return warning


def _require_of_states(blueprint: "Blueprint", out: AnyPath) -> None:
    """Refuses vectors of routing weights, which no other program makes."""
    if blueprint.head.moee:
        raise UserError(
            f"{out}: no other program makes vectors of routing weights (config.model.moee = {blueprint.head.moee!r}): "
            "set config.export = False; Embedder and jaxembed.evaluate open the run itself"
        )


def _of_one_expert(embedder: "Embedder") -> "Embedder":
    """Returns a model whose texts' sources pick the experts as the dense one that it is for the source it serves."""
    import jax

    from jaxembed.embedder import Embedder
    from jaxembed.models.options import ModelOptions
    from jaxembed.upcycling import only_expert

    experts = embedder.blueprint.experts
    if experts is None or not experts.by_source:
        return embedder
    with jax.set_mesh(embedder.mesh):
        blueprint, params = only_expert(embedder.blueprint, embedder.params, experts.served)
        return Embedder(blueprint, blueprint.factory(ModelOptions()), params, embedder.mesh, embedder.run)


def _smaller(embedder: "Embedder", layers: int, dim: int) -> "Embedder":
    """Returns the model with its first layers only, its vectors cut to their first dimensions."""
    import jax

    from jaxembed.embedder import Embedder
    from jaxembed.hf.table import first_layers
    from jaxembed.models.options import ModelOptions
    from jaxembed.models.text_encoder import flatten, unflatten

    blueprint = embedder.blueprint
    for flag, asked, full in (("layers", layers, blueprint.backbone.layers), ("dim", dim, embedder.width)):
        if not 0 <= asked <= full:
            raise UserError(f"--{flag}={asked}: the model has {full}; wants 1 … {full}, or 0 for all")
    if not layers and not dim:
        return embedder
    if layers and blueprint.head.pool_layers >= 0:
        raise UserError(f"--layers={layers}: the model pools a mean of its layers (model.pool_layers); leave it 0")
    layers = layers or blueprint.backbone.layers
    blueprint = dataclasses.replace(
        blueprint,
        hf_config=blueprint.architecture.with_layers(blueprint.hf_config, layers),
        truncate_dim=dim or blueprint.truncate_dim,
    )
    rows = blueprint.architecture.rows(blueprint.architecture.config_from_hf(blueprint.hf_config, f"--layers={layers}"))
    with jax.set_mesh(embedder.mesh):
        cut = first_layers(rows, flatten(embedder.params["backbone"]), layers)
    params = embedder.params | {"backbone": unflatten(cut)}
    return Embedder(blueprint, blueprint.factory(ModelOptions()), params, embedder.mesh, embedder.run)


def _as_kin(embedder: "Embedder") -> "Embedder":
    """Returns the model as what transformers opens: the same, but where its class is code on the hub."""
    from jaxembed.embedder import Embedder

    blueprint, convert = embedder.blueprint, embedder.blueprint.architecture.portable_as
    if convert is None:
        return embedder
    blueprint = dataclasses.replace(blueprint, hf_config=convert(blueprint.hf_config), unused={})
    return Embedder(blueprint, embedder.factory, embedder.params, embedder.mesh, embedder.run)


def _as_written(embedder: "Embedder", dtype: str) -> "Embedder":
    """Returns the model as its folder will give it back: weights of that dtype, a few exact, computed in float32."""
    import jax
    import jax.numpy as jnp

    from jaxembed.embedder import Embedder
    from jaxembed.hf.table import leaves_of
    from jaxembed.models.options import ModelOptions
    from jaxembed.models.text_encoder import BACKBONE, flatten, unflatten

    blueprint = embedder.blueprint
    exact = leaves_of([row for row in blueprint.architecture.rows(blueprint.backbone) if row.full_precision])
    with jax.set_mesh(embedder.mesh):
        params = unflatten(
            {
                path: x.astype("float32" if path.removeprefix(BACKBONE) in exact else dtype).astype(jnp.float32)
                for path, x in flatten(embedder.params).items()
            }
        )
    return Embedder(embedder.blueprint, embedder.blueprint.factory(ModelOptions()), params, embedder.mesh, embedder.run)


def _with_widths(hf_config: dict[str, Any], sizes: Sequence["Size"], layers: int, full: int) -> dict[str, Any]:
    """Returns config.json with the widths that vectors of this depth were trained at, and without another run's."""
    widths = {size.width for size in sizes if size.layers == layers and size.width}
    others = {key: value for key, value in hf_config.items() if key != WIDTHS}
    return others | ({WIDTHS: sorted({*widths, full})} if widths else {})


def _note(whole: "Embedder", sizes: Sequence["Size"], layers: int, dim: int) -> str:
    """Returns what the model card says of sizes: those trained, and this one where it is not the whole."""
    depth, width = whole.blueprint.backbone.layers, whole.width
    said = []
    if len(sizes) > 1:
        numbers = [(size.layers or depth, size.width or width) for size in sizes]
        trained = [f"{n} layer{'s' if n > 1 else ''} and {dimensions} dimensions" for n, dimensions in numbers]
        said.append(f"Trained to serve at these sizes: {'; '.join(trained)}.")
    if layers or dim:
        said.append(
            f"This folder holds the first {layers or depth} of {depth} layers, and its vectors are cut to "
            f"{dim or width} of {width} dimensions; scores and curves are those of the whole model."
        )
    return " ".join(said)


def _expert_note(blueprint: "Blueprint", of_run: "Blueprint") -> str:
    """Returns what the model card says of the one expert that a folder holds, where sources have an expert each."""
    experts = blueprint.experts
    if experts is None or not experts.by_source:
        return ""
    said = f"This folder holds expert {experts.served} of 0 … {experts.count - 1}, that of the source of this number."
    if of_run.experts and of_run.experts.served != experts.served:
        said += f" Scores during training are those of expert {of_run.experts.served}."
    return said


def main() -> None:
    """Runs the command."""
    workdir, out, folder = flags.FLAGS.workdir, flags.FLAGS.out, flags.FLAGS.verify
    layers, dim, dtype, adapter = flags.FLAGS.layers, flags.FLAGS.dim, flags.FLAGS.dtype, flags.FLAGS.adapter
    expert, layout = flags.FLAGS.expert, flags.FLAGS.layout
    smaller = layers or dim or dtype or expert is not None or layout != PORTABLE
    if bool(folder) == bool(workdir) or bool(workdir) != bool(out) or ((folder or adapter) and smaller):
        raise UserError(
            "give either --workdir=RUN and --out=FOLDER [--layers=N] [--dim=N] [--dtype=…] [--expert=N] "
            "[--layout=hub], or --workdir, --out and --adapter, or --verify=FOLDER"
        )
    with connect() as peers:
        if folder:
            differences = verify(local(path_of(folder)))
            said = [f"{name}: largest difference {value:.1e}" for name, value in differences.items()]
            result = {"verified": folder, **differences}
        elif adapter:
            warning = export_adapter(workdir, path_of(out))
            said, result = [warning] if warning else [], {"exported": out}
        else:
            from jaxembed import run_folder
            from jaxembed.embedder import Embedder

            embedder = Embedder.load(workdir, expert=expert)
            if not dtype:
                dtype = run_folder.read_config(embedder.run.workdir).export_dtype if embedder.run else "float32"
            export_model(embedder, path_of(out), layers, dim, dtype, layout)
            said, result = [], {"exported": out}
        if peers.main:
            print(*said, json.dumps(result), sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The run to export: DIR, DIR@STEP or DIR@best.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_integer("layers", 0, "Export the first so many layers only; 0 = all.")
    flags.DEFINE_integer("dim", 0, "Cut vectors to their first so many dimensions; 0 = not.")
    flags.DEFINE_integer("expert", None, "Export the dense model of one source, where each source has an expert.")
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the weights; '' = the run's config.export_dtype.")
    layouts = "'hub' = as a LLaDA's or Dream's own code opens it, with the head that predicts words."
    flags.DEFINE_enum("layout", PORTABLE, [PORTABLE, HUB], layouts)
    flags.DEFINE_bool("adapter", False, "Export the run's low-rank adapters alone, as a folder of the peft library.")
    flags.DEFINE_string("verify", "", "An exported folder to check.")
    cli.run(main, __doc__)
