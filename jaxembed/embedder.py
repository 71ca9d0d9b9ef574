"""Texts in, vectors out: packed rows, on every device of the mesh, in the order given."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import model_source, sharding, similarity
from jaxembed.blueprint import Blueprint
from jaxembed.checkpoint import find, split
from jaxembed.config import AUTO, MeshConfig
from jaxembed.data.templates import several
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.encoding import DeviceBatch, TokenizedTexts, device_batches
from jaxembed.errors import UserError
from jaxembed.hf.hub import resolve
from jaxembed.hf.source_experts import serving
from jaxembed.models.moee import MODES as MOEE
from jaxembed.models.moee import with_moee
from jaxembed.models.options import ModelOptions
from jaxembed.models.pooling import MODES
from jaxembed.models.text_encoder import ModelFactory, Params
from jaxembed.prompting import adapt, require_seeing
from jaxembed.run_folder import RunStep
from jaxembed.sharding import ROWS, batch_shards, put
from jaxembed.storage import path_of

WINDOW = 65_536  # texts tokenised and packed together


class Embedder:
    """A text-embedding model that is ready to encode. Make one with `Embedder.load`."""

    def __init__(
        self,
        blueprint: Blueprint,
        factory: ModelFactory,
        params: Params,
        mesh: jax.sharding.Mesh,
        run: RunStep | None = None,
        tokenizers: Sequence[Tokenizer] = (),
        options: ModelOptions | None = None,
    ) -> None:
        """Joins what makes a model.

        Args:
          blueprint: tokenizer, prompts, limits.
          factory: the model's maker.
          params: its parameters, on the mesh.
          mesh: where to compute.
          run: the run that the parameters are of, for the model card; None for none.
          tokenizers: several in place of the blueprint's; the vectors that they lead to are averaged.
          options: those that the factory was made with; None: the usual ones.
        """
        self.options = options or ModelOptions()
        self.tokenizers = tuple(tokenizers) or (blueprint.tokenizer,)
        self.blueprint, self.factory, self.params, self.mesh, self.run = blueprint, factory, params, mesh, run
        self._forward = factory.encoder

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        attention: str = "native",
        pooling: str = AUTO,
        template: str | Sequence[str] = "",
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        moee: str = "",
        moee_weight: float = 1.0,
        expert: int | None = None,
        words: bool = False,
    ) -> "Embedder":
        """Loads a run's newest checkpoint, or a sentence-transformers or transformers folder.

        Args:
          path: a work directory ('DIR', 'DIR@STEP', 'DIR@best'), a folder, or 'ORG/NAME[@REVISION]' on the hub.
          attention: 'bidirectional' or 'causal' instead of the model's own.
          pooling: instead of the model's own.
          template: put every text into it: 'prompt_eol', 'echo', or a text with {text} in it; see
            `jaxembed.data.templates`. Of several ('meta_eol', or a sequence) the vectors are averaged (MetaEOL, Lei et
            al. 2024, arXiv:2402.18458), and brought to length 1 again where the model does that.
          dtype: of the computation: 'float32' or 'bfloat16'.
          mesh: by default all devices along `data`.
          moee: of a mixture of experts, routing weights as vectors (`jaxembed.models.moee`): 'alone', 'concat' with the
            states' vectors, or 'sum', whose dot products are the weighted sums of both similarities; '' = as the model
            says.
          moee_weight: of the routing weights' similarity in 'sum'.
          expert: of a model whose texts' sources pick their experts, the number of the source that texts are taken to
            come from; None: the one that the model serves with.
          words: with the head by which a checkpoint predicts words, for likelihoods and sampling; runs with a loss over
            tokens have theirs anyway.

        Raises:
          UserError: nothing there that can be opened, or an argument that does not serve.
        """
        mesh = mesh or sharding.make_mesh(MeshConfig())
        spec = str(path)
        run = None
        if model_source.is_run(spec):
            blueprint, load = model_source.open_run(spec)
            run = RunStep(split(spec)[0], int(find(spec).name))
        else:
            blueprint, load = model_source.open_folder(resolve(spec))
        for name, value, known in (
            ("attention", attention, blueprint.architecture.modes),
            ("pooling", pooling, (AUTO, *MODES)),
            ("dtype", dtype, ("float32", "bfloat16")),
            ("moee", moee, ("", *MOEE)),
        ):
            if value not in known:
                raise UserError(f"{name}={value!r}: {path} takes {', '.join(known)}")
        tokenizers: tuple[Tokenizer, ...] = ()
        if attention != "native":
            hf_config = blueprint.architecture.with_attention(blueprint.hf_config, (attention,))
            run, blueprint = None, dataclasses.replace(blueprint, hf_config=hf_config)  # no run's scores are its own
        if template or pooling != AUTO:
            run = None
            blueprint, tokenizers = _prompted(blueprint, pooling, template)
        if expert is not None:
            count = blueprint.experts.count if blueprint.experts else 0
            blueprint = dataclasses.replace(blueprint, hf_config=serving(blueprint.hf_config, expert, count))
        if words:
            blueprint, load = model_source.with_words(blueprint, load)
        if moee:
            run, blueprint = None, _routed(blueprint, moee, moee_weight)
        options = ModelOptions(dtype=dtype)
        factory = blueprint.factory(options)
        with jax.set_mesh(mesh):
            return cls(blueprint, factory, load(factory), mesh, run, tokenizers, options)

    @property
    def width(self) -> int:
        """E, the number of dimensions of a vector."""
        return self.blueprint.head.width(self.blueprint.backbone)

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name. As in sentence-transformers every model has 'query' and 'document', maybe ''."""
        return {"query": "", "document": "", **self.blueprint.prompts}

    def prompt_of(self, name: str) -> str:
        """Returns the prompt of a name; '' for none.

        Raises:
          UserError: the model has no prompt of that name.
        """
        if name and name not in self.prompts:
            raise UserError(f"prompt_name={name!r}: the model's prompts are {', '.join(self.prompts)}")
        return self.prompts.get(name, "")

    def encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 0,
        show_progress_bar: bool | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = False,
    ) -> np.ndarray:
        """Encodes texts.

        Args:
          texts: any strings; a single string gives a single vector [E].
          prompt_name: a name in `prompts`, whose text is put before each text; None = the model's default prompt, where
            it has one.
          prompt: that text itself; wins over the name. '' = no prompt.
          batch_size: texts per device batch, about; 0 = as many as fill a fixed number of tokens.
          show_progress_bar: on standard error; None = no.
          truncate_dim: keep the first dimensions only (of a Matryoshka model); None = as the model says, else all.
          normalize_embeddings: bring vectors to length 1, after truncating.

        Returns:
          float32 [n, E], in the order given.

        Raises:
          UserError: no prompt of that name, or a number that cannot be.
        """
        from rich.console import Console
        from rich.progress import Progress

        if batch_size < 0 or (truncate_dim is not None and truncate_dim < 1):
            raise UserError(f"batch_size={batch_size}, truncate_dim={truncate_dim}: wants 0 or more, and 1 or more")
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        if prompt is None:
            prompt = self.prompt_of(self.blueprint.default_prompt_name if prompt_name is None else prompt_name)
        vectors = np.zeros((len(texts), self.width), np.float32)
        with Progress(console=Console(stderr=True), transient=True, disable=not show_progress_bar) as progress:
            task = progress.add_task("encoding", total=len(texts) * len(self.tokenizers))
            for first in range(0, len(texts), WINDOW):
                window = self.tokenize(texts[first : first + WINDOW], prompt)
                filled = self.encode_tokens(window, batch_size, lambda batch: progress.advance(task, batch.n_texts))
                vectors[first : first + WINDOW] = filled
        width = self.blueprint.truncate_dim if truncate_dim is None else truncate_dim
        vectors = vectors[:, :width] if width else vectors
        if normalize_embeddings:
            vectors = similarity.unit(vectors)
        return vectors[0] if single else vectors

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> tuple[TokenizedTexts, ...]:
        """Returns the tokens of texts behind a prompt, by each of the model's tokenizers. Needs no device."""
        limit = self.blueprint.max_length
        tokenized = []
        for tokenizer in self.tokenizers:
            tokens = tokenizer.encode(texts, limit, prompt)
            lengths = np.array([len(ids) for ids in tokens], np.int64)
            of_prompt = tokenizer.prompt_lengths(tokenizer.prompt_length(prompt), lengths)
            tokenized.append(TokenizedTexts(tokens, of_prompt, tokenizer.longest(limit)))
        return tuple(tokenized)

    def encode_tokens(
        self,
        tokenized: Sequence[TokenizedTexts],
        batch_size: int = 0,
        done: Callable[[DeviceBatch], object] = lambda batch: None,
    ) -> np.ndarray:
        """Encodes texts that `tokenize` made tokens of.

        Args:
          tokenized: the same texts by each tokenizer.
          batch_size: as in `encode`.
          done: called with each device batch when its vectors are there.

        Returns:
          float32 [n, E], in the order given, neither truncated nor scaled beyond what the model does.
        """
        vectors = sum(self._encode_tokens(each, batch_size, done) / len(tokenized) for each in tokenized)
        return similarity.unit(vectors) if len(tokenized) > 1 and self.blueprint.head.unit else vectors

    def encode_query(self, texts: str | Sequence[str], **kwargs: Any) -> np.ndarray:
        """Encodes with the prompt 'query', unless another is asked for; arguments as for `encode`."""
        return self._encode_as("query", texts, kwargs)

    def encode_document(self, texts: str | Sequence[str], **kwargs: Any) -> np.ndarray:
        """Encodes with the prompt 'document', unless another is asked for; arguments as for `encode`.

        A prompt of the name 'passage' or 'corpus' is only used where it is asked for, as in sentence-transformers.
        """
        return self._encode_as("document", texts, kwargs)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compares all of a [n, E] with all of b [m, E], as the model is meant to: float32 [n, m], higher = nearer."""
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        return similarity.all_pairs(a, b, self.blueprint.similarity)

    def similarity_pairwise(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compares each of a [n, E] with its partner in b [n, E], as the model is meant to: float32 [n]."""
        a, b = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        return similarity.pairwise(a, b, self.blueprint.similarity).astype(np.float32)

    def raw(self) -> "Embedder":
        """Returns the model without its own scaling to length 1, for linear heads that go in between."""
        head = dataclasses.replace(self.blueprint.head, normalize=False)
        blueprint = dataclasses.replace(self.blueprint, head=head)
        factory = blueprint.factory(self.options)
        return Embedder(blueprint, factory, self.params, self.mesh, self.run, self.tokenizers, self.options)

    def save(self, folder: str | pathlib.Path, dtype: str = "float32") -> None:
        """Writes a folder that sentence-transformers opens, its tensors of `dtype`: 'float32' or 'bfloat16'.

        Raises:
          UserError: several templates, whose mean no folder can say, or `folder` is something else.
        """
        from jaxembed.export import export_model

        if len(self.tokenizers) > 1:
            raise UserError(f"{folder}: a model of several templates cannot be saved; load it with one")

        export_model(self, path_of(folder), dtype=dtype)

    def _encode_as(self, prompt_name: str, texts: str | Sequence[str], kwargs: dict[str, Any]) -> np.ndarray:
        asked = any(kwargs.get(name) is not None for name in ("prompt", "prompt_name"))
        return self.encode(texts, **(kwargs if asked else kwargs | {"prompt_name": prompt_name}))

    def _encode_tokens(
        self, texts: TokenizedTexts, batch_size: int, done: Callable[[DeviceBatch], object]
    ) -> np.ndarray:
        vectors = np.zeros((len(texts.tokens), self.width), np.float32)
        batches = device_batches(texts, batch_shards(self.mesh), batch_size)
        running: list[tuple[DeviceBatch, jax.Array]] = []

        def collect() -> None:
            batch, vectors_SxTxE = running.pop(0)
            real = batch.texts >= 0
            vectors[batch.texts[real]] = np.asarray(vectors_SxTxE)[real]
            done(batch)

        with jax.set_mesh(self.mesh):
            for batch in batches:
                rows = jax.tree.map(lambda x: put(x, self.mesh, ROWS), batch.rows)
                running.append((batch, self._forward(self.params, rows, batch.slots)))
                if len(running) > 1:  # the device computes one batch while the host prepares the next
                    collect()
            while running:
                collect()
        return vectors


def _prompted(
    blueprint: Blueprint, pooling: str, template: str | Sequence[str]
) -> tuple[Blueprint, tuple[Tokenizer, ...]]:
    """Returns the blueprint with another pooling and with templates, and the tokenizer of each template."""
    each = several(template) if isinstance(template, str) else tuple(template)
    if not each:
        raise UserError("template=(): name at least one")
    said = blueprint.pooling_said
    adapted = (adapt(blueprint.head, blueprint.tokenizer, pooling, one, said=said) for one in each)
    heads, tokenizers = zip(*adapted)
    require_seeing(heads[0], blueprint.backbone.attention)
    if len(set(heads)) > 1:
        raise UserError("template: some of them pool the last token and others not: name the pooling too")
    longest = min(tokenizer.fitting(blueprint.longest) for tokenizer in tokenizers)
    shorter = min(blueprint.max_length, longest)
    return dataclasses.replace(blueprint, head=heads[0], tokenizer=tokenizers[0], max_length=shorter), tokenizers


def _routed(blueprint: Blueprint, moee: str, weight: float) -> Blueprint:
    """Returns the blueprint with routing weights in its vectors."""
    if blueprint.truncate_dim:
        raise UserError(
            f"moee = {moee!r}: the model's vectors are cut to {blueprint.truncate_dim} dimensions, which would cut its "
            "routing weights off: leave it out"
        )
    return dataclasses.replace(blueprint, head=with_moee(blueprint.head, blueprint.backbone, moee, weight))
