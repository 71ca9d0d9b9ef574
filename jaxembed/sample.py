"""Let a model fill masked words in, and see how many it restores.

    python -m jaxembed.sample --model=RUN --text="The [MASK] sat on the [MASK]."
    python -m jaxembed.sample --model=RUN --texts=held_out.txt --mask_rate=0.3 --steps=8

--model takes a run with a loss over masked words (RUN, RUN@STEP, RUN@best). Words that the model is surest of are put
in first. Prints texts with their masks and as they were filled, and one JSON line last.

  --text         a text; [MASK], or the tokenizer's own mask token, stands for a masked word of one token
  --texts        texts of which a part is masked: a file of a text per line (.txt), or records as for training. Those
                 shown have their right words in green, their wrong ones in red; a table says how many were restored,
                 beside what guesses by the words' frequencies would restore: always the most frequent word, or drawn
  --mask_rate    part of each text's words that is masked
  --steps        rounds over which the masked words are spread; 0 = one word in each
  --temperature  of words that are drawn; 0 = the best word of each place
  --seed         of which words are masked, and which are drawn
  --show         texts that are printed
"""

import json
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from absl import flags
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from jaxembed import cli
from jaxembed.config import EvalConfig
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.evaluation.sets import require_sets

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder

MASK = "[MASK]"  # stands for any tokenizer's mask token


def main() -> None:
    """Runs the command."""
    _require_flags()
    with connect() as peers:
        _sample(peers)


def _sample(peers: Peers) -> None:
    """Fills the texts in, on the devices of all processes; process 0 says how."""
    flag = flags.FLAGS
    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.likelihood import read_texts
    from jaxembed.filling import require_filling

    data = read_texts(flag.texts, "--texts") if flag.texts else None
    embedder = Embedder.load(flag.model, dtype=flag.dtype, words=True)
    require_filling(embedder.blueprint, f"--model={flag.model}")
    console = Console(quiet=not peers.main)
    said = _fill_one(embedder, console) if data is None else _restore(embedder, data.texts, console, peers.main)
    if peers.main:
        print(json.dumps({"model": flag.model, **said}))


def _fill_one(embedder: "Embedder", console: Console) -> dict[str, Any]:
    """Fills --text; returns what the JSON line says."""
    blueprint, text = embedder.blueprint, flags.FLAGS.text
    shown = Shown(blueprint.tokenizer)
    ids = shown.encode(text, blueprint.max_length)
    masked = ids == blueprint.tokenizer.mask_id
    if not masked.any():
        raise UserError(f"--text: {text!r} has no masked word: put {MASK} where there is to be one")
    filled = _filled(embedder, [ids], [masked], bar=False)[0]
    shown.print(console, ids, filled, masked, ("bold cyan", "bold cyan"))
    return {"filled": shown.decode(filled), "masked": int(masked.sum())}


def _restore(embedder: "Embedder", texts: Sequence[str], console: Console, bar: bool) -> dict[str, Any]:
    """Masks a part of texts and fills it in; returns what the JSON line says."""
    from jaxembed.filling import chances, mask_some

    flag, blueprint = flags.FLAGS, embedder.blueprint
    tokens = blueprint.tokenizer.encode(texts, blueprint.max_length)
    masked = mask_some(tokens, blueprint.language, flag.mask_rate, flag.seed)
    total = sum(int(places.sum()) for places in masked)
    if not total:
        raise UserError(f"--texts={flag.texts}: no text has a word to mask")
    filled = _filled(embedder, tokens, masked, bar)
    right = sum(int((ids == words)[places].sum()) for ids, words, places in zip(tokens, filled, masked))
    shown = Shown(blueprint.tokenizer)
    for ids, words, places in list(zip(tokens, filled, masked))[: flag.show]:
        shown.print(console, np.where(places, blueprint.tokenizer.mask_id, ids), words, ids == words)
    most, drawn = chances(tokens, blueprint.language)
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    for name in ("texts", "masked words", "restored %", "most frequent word %", "words drawn %"):
        table.add_column(name, justify="right")
    table.add_row(f"{len(texts):,}", f"{total:,}", *(f"{100 * x:.2f}" for x in (right / total, most, drawn)))
    console.print(table)
    figures = {"restored": right / total, "most_frequent": most, "unigram": drawn}
    return {"texts": len(texts), "masked": total, **figures}


def _filled(
    embedder: "Embedder", tokens: Sequence[np.ndarray], masked: Sequence[np.ndarray], bar: bool
) -> list[np.ndarray]:
    from jaxembed.filling import Sampling, fill

    flag = flags.FLAGS
    how = Sampling(flag.steps, flag.temperature, flag.seed)
    rounds = max(how.rounds(int(places.sum())) for places in masked)
    with Progress(console=Console(stderr=True), transient=True, disable=not bar) as progress:
        task = progress.add_task("filling in", total=rounds)
        return fill(embedder, tokens, masked, how, lambda: progress.advance(task))


class Shown:
    """Tokens as a person reads them, and the other way round for texts with masked words in them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes a copy of a tokenizer, which has a mask token."""
        self._tokenizer = tokenizer
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder, max_length=tokenizer.n_special + 1)
            self._backend = tokenizers.Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
        self._mask = tokenizer.token(tokenizer.mask_id)
        if tokenizer.mask_id not in self._backend.encode(self._mask).ids:  # a word of the vocabulary like any other
            self._backend.add_special_tokens([tokenizers.AddedToken(self._mask, normalized=False, special=True)])

    def encode(self, text: str, max_length: int) -> np.ndarray:
        """Returns a text's tokens [n], `MASK` and the tokenizer's own mask token read as masked words.

        Raises:
          UserError: it is longer than `max_length`.
        """
        ids = np.array(self._backend.encode(text.replace(MASK, self._mask)).ids, np.int32)
        if len(self._tokenizer.truncate(ids, max_length)) < len(ids):
            raise UserError(f"--text: {len(ids)} tokens, the model takes {max_length}: give a shorter text")
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of tokens, framing ones left out."""
        return self._backend.decode([int(ids[i]) for i in self._kept(ids)], skip_special_tokens=False)

    def print(
        self,
        console: Console,
        masked: np.ndarray,
        filled: np.ndarray,
        right: np.ndarray,
        styles: tuple[str, str] = ("bold green", "bold red"),
    ) -> None:
        """Prints a text, masked and filled, both [n].

        Args:
          console: where.
          masked: its tokens with the mask token.
          filled: its tokens.
          right: bool [n], which of them are right.
          styles: of right and of wrong words that were filled in.
        """
        places = masked == self._tokenizer.mask_id
        above, below = Text(), Text()
        for piece, i in self._pieces(masked):
            above.append(piece, "dim" if places[i] else "")
        for piece, i in self._pieces(filled):
            below.append(piece, styles[0 if right[i] else 1] if places[i] else "")
        console.print(above, below, "", sep="\n", soft_wrap=True)

    def _pieces(self, ids: np.ndarray) -> list[tuple[str, int]]:
        """Returns what each token adds to the text, and its place; framing tokens are left out."""
        kept, pieces, before = self._kept(ids), [], ""
        for count, i in enumerate(kept, 1):
            text = self.decode(ids[kept[:count]])
            start = len(before) if text.startswith(before) else _common(before, text)
            pieces.append((text[start:], i))
            before = text
        return pieces

    def _kept(self, ids: np.ndarray) -> list[int]:
        framing = {*self._tokenizer.framing_ids} - {self._tokenizer.mask_id}
        return [i for i, token in enumerate(ids.tolist()) if token not in framing]


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _require_flags() -> None:
    """Refuses at once what needs no look into the files."""
    flag = flags.FLAGS
    if not flag.model:
        raise UserError("--model is missing: name the folder of a run with a loss over masked words")
    if bool(flag.text) == bool(flag.texts):
        raise UserError(f'give one of --text="… {MASK} …" and --texts=FILE')
    if not math.isfinite(flag.temperature):
        raise UserError(f"--temperature={flag.temperature}: must be finite")
    if not flag.mask_rate:
        raise UserError("--mask_rate=0 masks nothing: give a part of the words, as 0.3")
    if flag.text and flag["mask_rate"].present:
        raise UserError(f"--mask_rate masks words of --texts; in --text write {MASK} for each")
    require_sets(EvalConfig(texts=(flag.texts,) if flag.texts else ()), "--")


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run with a loss over masked words.")
    flags.DEFINE_string("text", "", f"A text with {MASK} in it.")
    flags.DEFINE_string("texts", "", "A set of texts.")
    flags.DEFINE_float("mask_rate", 0.3, "Part of the words that is masked.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("seed", 0, "Of masks and of words drawn.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("steps", 0, "Rounds; 0 = one word in each.", lower_bound=0)
    flags.DEFINE_float("temperature", 0.0, "Of words drawn; 0 = the best.", lower_bound=0.0)
    flags.DEFINE_integer("show", 10, "Texts printed.", lower_bound=0)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
