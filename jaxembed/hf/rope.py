"""Rotary positions in config.json: both spellings read, both written.

transformers 5 keeps all in `rope_parameters` (one set, or one per kind of layer); before, and in most programs that
serve folders, it is `rope_theta` with `rope_scaling`. Where a file has both, `rope_scaling` counts, as there.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.hf.fields import read_count, read_number
from jaxembed.models.layers.rope import Dynamic, Linear, Llama3, LongRope, RopeConfig, Scaling, Unscaled, Yarn

TRAINED_LENGTH = "original_max_position_embeddings"
# What each kind cannot do without, and what it takes, beside rope_type.
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", TRAINED_LENGTH),
    "llama3": ("factor", TRAINED_LENGTH, "low_freq_factor", "high_freq_factor"),
    "longrope": (TRAINED_LENGTH, "short_factor", "long_factor"),
}
TAKES: dict[str, tuple[str, ...]] = NEEDS | {
    "yarn": (*NEEDS["yarn"], "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": (*NEEDS["longrope"], "factor", "attention_factor"),
}
STRETCHED = ("linear", "dynamic")  # kinds beside which max_position_embeddings is the length of the training
UNSCALED = ("rope_theta", "partial_rotary_factor")  # of the parameters those that are no part of the scaling


@dataclasses.dataclass(frozen=True)
class RopeWords:
    """How an architecture's config.json speaks of rotary positions.

    Attributes:
      theta: the base, where the file does not say.
      kinds: the rope_types that it takes, beside 'default'.
      layer_type: the key in `rope_parameters` of the layers that scaling is for; '' where all layers are alike.
      local_type: that of its local layers, whose positions are never scaled; '' for none.
      local_theta: the base of those, where the file does not say.
      fields: what the two bases were called before `rope_parameters`.
      longrope_names: older names of the kind 'longrope'.
    """

    theta: float = 10_000.0
    kinds: tuple[str, ...] = tuple(NEEDS)
    layer_type: str = ""
    local_type: str = ""
    local_theta: float = 10_000.0
    fields: tuple[str, str] = ("rope_theta", "rope_local_base_freq")
    longrope_names: tuple[str, ...] = ()

    def parameters(self, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Returns the parameters in the words of transformers 5, `rope_type` and `rope_theta` among them.

        Args:
          hf: the content of config.json.
          where: the file, for messages.

        Raises:
          UserError: they are no mapping, or of a kind that the architecture does not take.
        """
        said, scaling = (_mapping(hf, field, where) for field in ("rope_parameters", "rope_scaling"))
        found = {**_mapping(said, self.layer_type, where), **scaling} if self.layer_type else dict(scaling or said)
        older = found.pop("type", "default")
        kind = found.get("rope_type", older)
        kind = found["rope_type"] = "longrope" if kind in self.longrope_names else kind
        if kind not in ("default", *self.kinds):
            takes = ", ".join(("default", *self.kinds))
            raise UserError(f"{where}: rope_type = {kind!r} is not supported; supported: {takes}")
        found.setdefault("rope_theta", hf.get(self.fields[0], self.theta))
        if hf.get("partial_rotary_factor") is not None:
            found.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
        if TRAINED_LENGTH in NEEDS.get(kind, ()) and hf.get(TRAINED_LENGTH):
            found[TRAINED_LENGTH] = hf[TRAINED_LENGTH]  # beside the others, Phi 3's place for it
        return found

    def local_parameters(self, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Returns those of local layers; arguments as for `parameters`."""
        local = RopeWords(self.local_theta, (), self.local_type, fields=self.fields[::-1])
        return local.parameters({field: value for field, value in hf.items() if field != "rope_scaling"}, where)

    def longest_text(self, hf: Mapping[str, Any], where: str) -> int:
        """Returns how many tokens a text may have; arguments as for `parameters`.

        That is `max_position_embeddings`, which beside linear and dynamic scaling, in most folders, is the length of
        the training, and beside yarn either. Where kinds of layers differ it is always the longest.
        """
        found, longest = self.parameters(hf, where), read_count(hf, "max_position_embeddings", where)
        if self.layer_type:
            return longest
        if found["rope_type"] == "yarn":
            return int(read_count(found, TRAINED_LENGTH, where, longest) * read_number(found, "factor", where, 1.0))
        return int(longest * _factor(found, where)) if found["rope_type"] in STRETCHED else longest

    def with_scaling(self, hf: Mapping[str, Any], scaling: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Returns config.json of the same model for texts `factor` times as long: its positions interpolated.

        Args:
          hf: the content of config.json.
          scaling: rope_type, factor and what else the kind takes, in the words of transformers. The length of the
            training is the model's, where this does not say.
          where: what `scaling` is called, for messages.

        Raises:
          UserError: a field that the kind does not take, a wrong value, or a model that is scaled already, otherwise.
        """
        now, length = self.parameters(hf, where), read_count(hf, "max_position_embeddings", where)
        wanted = _wanted(scaling, where, self.kinds, now.get(TRAINED_LENGTH, length))
        if _scaling_of(now) == wanted:
            return dict(hf)
        if now["rope_type"] != "default":
            raise UserError(f"{where}: the model's positions are scaled already: rope_type = {now['rope_type']!r}")
        factor = _factor(wanted, where)
        if TRAINED_LENGTH in wanted:
            length = int(read_count(wanted, TRAINED_LENGTH, where) * factor)
        elif self.layer_type:
            length = int(length * factor)
        kept = {TRAINED_LENGTH: wanted[TRAINED_LENGTH]} if wanted["rope_type"] == "longrope" else {}
        said = {self.fields[0]: now["rope_theta"], "rope_scaling": wanted, "max_position_embeddings": length}
        return self.spelled({**hf, **kept, **said})

    def spelled(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Returns config.json with its rotary positions in both spellings, each complete."""
        now = self.parameters(hf, "config.json")
        out = {field: value for field, value in hf.items() if field != "rope_scaling"}
        out |= {self.fields[0]: now["rope_theta"], "rope_parameters": now}
        if "partial_rotary_factor" in now:
            out["partial_rotary_factor"] = now["partial_rotary_factor"]
        if now["rope_type"] != "default":
            out["rope_scaling"] = _scaling_of(now)
        if self.layer_type:
            local = self.local_parameters(hf, "config.json")
            out[self.fields[1]] = local["rope_theta"]
            out["rope_parameters"] = {self.layer_type: now, self.local_type: local}
        return out


def _mapping(hf: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
    value = hf.get(field) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {field} = {value!r}: wants names and values")
    return value


def _scaling_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in parameters.items() if field not in UNSCALED}


def _wanted(scaling: Mapping[str, Any], where: str, kinds: Sequence[str], length: int) -> dict[str, Any]:
    """Returns the scaling with its defaults, as JSON would hold it."""
    kind = scaling.get("rope_type")
    if kind not in kinds:
        raise UserError(f"{where}: rope_type = {kind!r} is not supported; supported: {', '.join(kinds)}")
    for field in scaling:
        if field not in ("rope_type", *TAKES[kind]):
            raise UserError(f"{where}: {kind} takes no field {field!r}{nearest(field, TAKES[kind])}")
    defaults = {TRAINED_LENGTH: length, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wanted = {field: value for field, value in defaults.items() if field in NEEDS[kind]} | dict(scaling)
    missing = [field for field in ("factor", *NEEDS[kind]) if field not in wanted]
    if missing:
        raise UserError(f"{where}: {kind} wants {', '.join(dict.fromkeys(missing))}")
    return {field: list(value) if isinstance(value, tuple) else value for field, value in wanted.items()}


def read_rope(parameters: Mapping[str, Any], head_width: int, longest: int, where: str) -> RopeConfig:
    """Makes our config of one set of parameters.

    Args:
      parameters: of `RopeWords.parameters`.
      head_width: K.
      longest: `max_position_embeddings`.
      where: the file that they stand in, for messages.

    Raises:
      UserError: a wrong value.
    """
    width = int(head_width * read_number(parameters, "partial_rotary_factor", where, 1.0))
    if width % 2 or not 0 < width <= head_width:
        raise UserError(f"{where}: rotary positions of {width} of {head_width} channels: wants an even number of them")
    return RopeConfig(width, read_number(parameters, "rope_theta", where), _scaling(parameters, width, longest, where))


def _scaling(parameters: Mapping[str, Any], width: int, longest: int, where: str) -> Scaling:
    kind = parameters["rope_type"]
    if kind == "default":
        return Unscaled()
    if kind in STRETCHED:
        factor = _factor(parameters, where)
        return Linear(factor) if kind == "linear" else Dynamic(factor, longest)
    length = read_count(parameters, TRAINED_LENGTH, where, longest)
    if kind == "llama3":
        low, high = (read_number(parameters, f"{name}_freq_factor", where) for name in ("low", "high"))
        if not low < high:
            raise UserError(f"{where}: low_freq_factor = {low:g} is not below high_freq_factor = {high:g}")
        return Llama3(_factor(parameters, where), low, high, length)
    factor = _factor(parameters, where, max(1.0, longest / length))
    if kind == "longrope":
        short, long = (_factors(parameters, f"{name}_factor", width // 2, where) for name in ("short", "long"))
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
        return LongRope(short, long, length, read_number(parameters, "attention_factor", where, magnitude))
    return Yarn(
        factor=factor,
        length=length,
        magnitude=read_number(parameters, "attention_factor", where, _yarn_magnitude(parameters, factor, where)),
        fast=read_number(parameters, "beta_fast", where, 32.0),
        slow=read_number(parameters, "beta_slow", where, 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _factor(parameters: Mapping[str, Any], where: str, default: float = 0.0) -> float:
    factor = read_number(parameters, "factor", where, default)
    if factor < 1:
        raise UserError(f"{where}: factor = {factor:g} of rotary positions, wants a number of at least 1")
    return factor


def _factors(parameters: Mapping[str, Any], field: str, n: int, where: str) -> tuple[float, ...]:
    values = parameters.get(field)
    fits = isinstance(values, Sequence) and len(values) == n and all(type(v) in (int, float) and v > 0 for v in values)
    if not fits:
        raise UserError(f"{where}: {field} of rotary positions: wants {n} numbers above 0, one per frequency")
    return tuple(float(value) for value in values)


def _yarn_magnitude(parameters: Mapping[str, Any], factor: float, where: str) -> float:
    """0.1 ln(factor) + 1 as in the paper; DeepSeek's checkpoints have two coefficients, whose quotient counts."""
    fields = ("mscale", "mscale_all_dim")
    if not all(parameters.get(field) for field in fields):
        return 0.1 * math.log(factor) + 1
    above, below = (0.1 * read_number(parameters, field, where) * math.log(factor) + 1 for field in fields)
    return above / below
