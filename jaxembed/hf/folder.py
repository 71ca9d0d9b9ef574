"""What a folder of sentence-transformers or transformers says about the model in it.

Only JSON is read; code in the folder (`auto_map`, custom module classes) is never run. The formats of
sentence-transformers 2 to 6 are understood; their meaning is that of sentence-transformers 6.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.architectures import Architecture, architecture_of
from jaxembed.hf.files import inside, read_json, read_optional_json

POOLING_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted_mean"}  # theirs → ours
# The legacy booleans, in the order in which sentence-transformers looks at them.
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
FIRST_DENSE = "first of two Dense"
MODULE_ORDER = ("Transformer", "WeightedLayerPooling", "LatentAttention", "Pooling", FIRST_DENSE, "Dense", "Normalize")
# A module of ours, known by this name; the file of that name in the folder, which other programs run, is not looked at.
LATENT_ATTENTION = "modeling_latent_attention.LatentAttention"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
SENTENCE_VECTOR = "sentence_embedding"


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer after pooling, its tensors `linear.weight` [out, in] and `linear.bias` in `path`."""

    path: pathlib.Path
    in_features: int
    out_features: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class LayerPooling:
    """A trained mean of the states of layer `first` (0 = the embeddings) and those above.

    Its tensor is `layer_weights` in `path`.
    """

    path: pathlib.Path
    first: int


@dataclasses.dataclass(frozen=True)
class Latent:
    """Latent attention over the token states; see `jaxembed.models.latent_attention`. Its tensors are in `path`."""

    path: pathlib.Path
    latents: int
    heads: int


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model folder, read.

    Attributes:
      path: the folder.
      transformer: where config.json, the weights and the tokenizer are: the folder itself or one in it.
      hf_config: the content of config.json.
      architecture: that of its model_type.
      config: the backbone's config, made from hf_config.
      pooling: 'mean' | 'cls' | 'last' | 'weighted_mean' | 'latent'.
      pooling_said: whether the folder says so; a bare transformer does not.
      pool_prompt: whether the prompt's tokens are pooled.
      layer_pooling: the mean of layers before pooling, or None.
      latent: the attention before pooling, where that is 'latent', else None.
      normalize: whether vectors are brought to length 1.
      expansion: a layer after pooling, before `dense`, or None.
      dense: the last layer after pooling, or None.
      max_length: longest text in tokens, special tokens included.
      prompts: name → text.
      default_prompt_name: the prompt of texts encoded without a prompt's name, '' for none.
      similarity: 'cosine' | 'dot' | 'euclidean' | 'manhattan'.
      truncate_dim: vectors are cut to this many dimensions after all else, or None.
    """

    path: pathlib.Path
    transformer: pathlib.Path
    hf_config: dict[str, Any]
    architecture: Architecture
    config: Any
    pooling: str
    pooling_said: bool
    pool_prompt: bool
    layer_pooling: LayerPooling | None
    latent: Latent | None
    normalize: bool
    expansion: Dense | None
    dense: Dense | None
    max_length: int
    prompts: dict[str, str]
    default_prompt_name: str
    similarity: str
    truncate_dim: int | None

    @property
    def model_type(self) -> str:
        """The name of the architecture."""
        return self.architecture.model_type


def read_folder(path: pathlib.Path) -> Folder:
    """Reads a folder. Without modules.json it is a bare transformer, pooled and not normalised, as there.

    Raises:
      UserError: a file is missing or broken, or asks for something that is not supported.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    modules = _modules(path)
    transformer = modules.get("Transformer", path)
    config_file = inside(transformer, "config.json", transformer)
    hf_config = read_json(config_file)
    arch = architecture_of(hf_config, str(config_file))
    config = arch.config_from_hf(hf_config, str(config_file))
    hf_config = arch.spelled(hf_config)
    pooling, pool_prompt = _bare_pooling(hf_config), True
    if "Pooling" in modules:
        pooling, pool_prompt = _read_pooling(modules["Pooling"])
    if "WeightedLayerPooling" in modules and not arch.all_states:
        file = modules["WeightedLayerPooling"] / "config.json"
        raise UserError(f"{file}: a mean of layers is not supported of a {arch.model_type}, whose states differ there")
    latent = _read_latent(modules["LatentAttention"], config.width) if "LatentAttention" in modules else None
    if latent and pooling != "mean":
        raise UserError(f"{modules['Pooling'] / 'config.json'}: latent attention with pooling other than the mean")
    expansion = _read_dense(modules[FIRST_DENSE], config.width) if FIRST_DENSE in modules else None
    width = expansion.out_features if expansion else config.width
    if "Normalize" in modules:
        _check_vector_names(modules["Normalize"] / "config.json")
    return Folder(
        path=path,
        transformer=transformer,
        hf_config=hf_config,
        architecture=arch,
        config=config,
        pooling="latent" if latent else pooling,
        pooling_said="Pooling" in modules,
        pool_prompt=pool_prompt,
        layer_pooling=(
            _read_layer_pooling(modules["WeightedLayerPooling"], hf_config, config.layers)
            if "WeightedLayerPooling" in modules
            else None
        ),
        latent=latent,
        normalize="Normalize" in modules,
        expansion=expansion,
        dense=_read_dense(modules["Dense"], width) if "Dense" in modules else None,
        max_length=_read_max_length(transformer, config.max_length, arch.bounded),
        **_read_settings(inside(path, "config_sentence_transformers.json", path)),
    )


def _modules(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns kind → folder of the modules in modules.json, {} where there is no such file."""
    file = inside(path, "modules.json", path)
    if not file.is_file():
        return {}
    modules: dict[str, pathlib.Path] = {}
    for entry in read_json(file, list):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise UserError(f"{file}: an entry without a 'type'")
        place = entry.get("path", "")
        if not isinstance(place, str):
            raise UserError(f"{file}: the path {place!r} of an entry is no string")
        package, kind = entry["type"].split(".")[0], entry["type"].rsplit(".")[-1]
        if package != "sentence_transformers" and entry["type"] != LATENT_ATTENTION:
            raise UserError(f"{file}: module {entry['type']!r} is a class of its own; code of folders is never run")
        if kind not in MODULE_ORDER:
            raise UserError(f"{file}: module {entry['type']!r} is not supported; supported: {', '.join(MODULE_ORDER)}")
        if kind == "Dense" and kind in modules and FIRST_DENSE not in modules:
            modules[FIRST_DENSE] = modules.pop("Dense")
        if kind in modules:
            raise UserError(f"{file}: has too many {kind} modules; one is supported, or two Dense")
        modules[kind] = inside(path, place, file)
    kinds = tuple(modules)
    if not {"Transformer", "Pooling"} <= modules.keys() or kinds != tuple(k for k in MODULE_ORDER if k in modules):
        found = ", ".join(kinds) or "none"
        supported = "supported: Transformer, Pooling, then if any Dense, Normalize"
        raise UserError(f"{file}: modules {found}; {supported} (WeightedLayerPooling and ours before Pooling)")
    return modules


def _read_pooling(folder: pathlib.Path) -> tuple[str, bool]:
    file = inside(folder, "config.json", folder)
    config = read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise UserError(f"{file}: pooling {modes!r} is not supported; supported: one of {', '.join(POOLING_MODES)}")
    return POOLING_MODES[modes[0]], bool(config.get("include_prompt", True))


def _bare_pooling(hf_config: Mapping[str, Any]) -> str:
    """How sentence-transformers pools what comes without modules.json."""
    names = hf_config.get("architectures") or [""]
    generates = str(names[0]).endswith("ForCausalLM") and hf_config.get("is_causal") is not False
    return "last" if generates else "mean"


def _read_layer_pooling(folder: pathlib.Path, hf_config: Mapping[str, Any], layers: int) -> LayerPooling:
    file = inside(folder, "config.json", folder)
    config = read_json(file)
    first, n = config.get("layer_start", 4), config.get("num_hidden_layers", 12)  # their defaults
    if type(first) is not int or not 0 <= first <= layers or n != layers:
        raise UserError(f"{file}: layer_start = {first!r}, num_hidden_layers = {n!r} do not fit {layers} layers")
    if hf_config.get("output_hidden_states") is not True:  # sentence-transformers would silently skip the module
        raise UserError(f"{file}: a mean of layers, but config.json lacks output_hidden_states: true; add it there")
    return LayerPooling(folder, first)


def _read_latent(folder: pathlib.Path, width: int) -> Latent:
    file = inside(folder, "config.json", folder)
    config = read_json(file)
    sizes = [config.get(key) for key in ("width", "latents", "heads")]
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] != width or width % sizes[2]:
        raise UserError(f"{file}: width, latents, heads = {sizes} do not fit a model of width {width}")
    return Latent(folder, *sizes[1:])


def _read_dense(folder: pathlib.Path, width: int) -> Dense:
    file = inside(folder, "config.json", folder)
    config = read_json(file)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))  # their default
    if not (activation.startswith("torch.") and activation.endswith(".Identity")):
        raise UserError(f"{file}: activation_function {activation!r} is not supported; supported: Identity")
    if config.get("use_residual"):
        raise UserError(f"{file}: use_residual is not supported")
    _check_vector_names(file)
    sizes = config.get("in_features"), config.get("out_features")
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] != width:
        raise UserError(f"{file}: in_features, out_features = {sizes} do not fit a model of width {width}")
    return Dense(folder, *sizes, bias=bool(config.get("bias", True)))


def _check_vector_names(file: pathlib.Path) -> None:
    """A module after pooling must read and write the text's vector, not its tokens'."""
    config = read_optional_json(file)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, SENTENCE_VECTOR):
            raise UserError(f"{file}: {key} = {config[key]!r} is not supported; supported: {SENTENCE_VECTOR!r}")


def _read_max_length(transformer: pathlib.Path, usable: int, bounded: bool) -> int:
    """The module's max_seq_length, else the tokenizer's model_max_length; where positions end, no more than these."""
    files = (inside(transformer, name, transformer) for name in TRANSFORMER_CONFIGS)
    file = next((file for file in files if file.is_file()), transformer)
    config = read_optional_json(file)
    for key, supported in (("transformer_task", "feature-extraction"), ("module_output_name", "token_embeddings")):
        if config.get(key, supported) != supported:
            raise UserError(f"{file}: {key} = {config[key]!r} is not supported; supported: {supported!r}")
    length = config.get("max_seq_length")
    if length is None:
        file = inside(transformer, "tokenizer_config.json", transformer)
        length = read_optional_json(file).get("model_max_length")  # a huge number where nobody set it
    if length is None:
        return usable
    if type(length) not in (int, float) or not length >= 1:
        raise UserError(f"{file}: the longest text {length!r} is no whole number above 0")
    return (min(int(length), usable) if bounded else int(length)) if length < 1e9 else usable


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
    """Reads prompts, default_prompt_name, similarity and truncate_dim."""
    settings = read_optional_json(file)

    def get(key: str, default: Any, fits: Callable[[Any], bool]) -> Any:
        value = default if settings.get(key) is None else settings[key]
        if not fits(value):
            raise UserError(f"{file}: {key} = {value!r} is not supported")
        return value

    raw_prompts: Mapping[str, str | None] = get("prompts", {}, lambda v: isinstance(v, dict))
    prompts = {name: "" if text is None else text for name, text in raw_prompts.items()}
    if not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{file}: prompts = {raw_prompts!r}: wants texts")
    return {
        "prompts": prompts,
        "default_prompt_name": get("default_prompt_name", "", lambda v: v == "" or v in prompts),
        "similarity": get("similarity_fn_name", "cosine", lambda v: v in SIMILARITIES),
        "truncate_dim": get("truncate_dim", None, lambda v: v is None or (type(v) is int and v > 0)),
    }
