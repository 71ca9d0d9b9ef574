"""What attention may see, as config.json says it.

transformers 5.2 and later make a decoder bidirectional by `is_causal: false` in config.json; older versions ignore the
key silently, so an exported folder that has it also asks for that version. Some architectures and some programs that
serve folders have a word of their own beside it. For what no folder can say (a prefix, layers of different modes) there
is a key of ours, which only jaxembed reads: such a model is not exported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.errors import UserError
from jaxembed.models.layers.attention import MODES

OURS = "jaxembed_attention"  # one mode per layer
IS_CAUSAL_SINCE = "5.2.0"  # of transformers


def read_modes(hf: Mapping[str, Any], native: str, layers: int, where: str) -> tuple[str, ...]:
    """Returns the mode of attention, one for all layers or one for each.

    Args:
      hf: the content of config.json.
      native: what it says in the architecture's own words.
      layers: n.
      where: the file, for messages.

    Raises:
      UserError: our key is there, but is no list of n modes.
    """
    modes = hf.get(OURS)
    if modes is None:
        return (native,)
    if not isinstance(modes, list | tuple) or len(modes) != layers or not set(modes) <= set(MODES):
        raise UserError(f"{where}: {OURS} = {modes!r}: wants {layers} of {', '.join(MODES)}, one per layer")
    return (modes[0],) if len(set(modes)) == 1 else tuple(modes)


def portable(hf: Mapping[str, Any]) -> bool:
    """Whether programs other than jaxembed can know this model's attention."""
    return OURS not in hf


def with_modes(
    hf: Mapping[str, Any],
    modes: Sequence[str],
    native: Sequence[str],
    words: Mapping[str, Mapping[str, Any]],
    layers: int,
) -> dict[str, Any]:
    """Returns config.json of the same model with another attention.

    Args:
      hf: the content of config.json.
      modes: 'native' or one of MODES, one for all layers or one for each.
      native: what config.json says now.
      words: mode → the fields by which config.json says it, those of the architecture. All of them are removed first.
      layers: n.
    """
    whole = [own if mode == "native" else mode for mode, own in zip(_each(modes, layers), _each(native, layers))]
    if whole == _each(native, layers):
        return dict(hf)
    said = {field for fields in words.values() for field in fields} | {OURS}
    rest = {field: value for field, value in hf.items() if field not in said}
    if len(set(whole)) == 1 and whole[0] in words:
        return rest | dict(words[whole[0]])
    return rest | {OURS: whole}


def _each(modes: Sequence[str], layers: int) -> list[str]:
    return list(modes) * layers if len(modes) == 1 else list(modes)
