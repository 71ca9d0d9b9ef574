"""What a config asks of a model, brought into its blueprint: attention, head, prompts, limits."""

import dataclasses
from collections.abc import Mapping

from jaxembed.blueprint import Blueprint
from jaxembed.config import AUTO, Config, ModelConfig
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.hf.attention_modes import portable
from jaxembed.hf.hub import resolve
from jaxembed.hf.word_rules import require_cut
from jaxembed.models.text_encoder import (
    HeadConfig,
)
from jaxembed.prompting import adapt, require_portable, require_seeing
from jaxembed.stages import stages_of

SIDES = ("query", "document")


def require_arch(blueprint: Blueprint, c: ModelConfig) -> None:
    """Raises UserError where the config names another architecture than the model has."""
    found = blueprint.architecture.model_type
    if c.arch not in (AUTO, found):
        raise UserError(f"config.model.arch = {c.arch!r}, but {c.init} is a {found!r}: leave it 'auto'")


def adapted(blueprint: Blueprint, c: Config) -> Blueprint:
    """Returns the blueprint with what the config asks for."""
    m, head, arch, hf_config = c.model, blueprint.head, blueprint.architecture, blueprint.hf_config
    if m.rope_scaling:
        hf_config = arch.with_rope_scaling(hf_config, m.rope_scaling)
    longest = dataclasses.replace(blueprint, hf_config=hf_config).longest
    where = f"config.model.attention{'_layers' if m.attention_layers else ''}"
    hf_config = arch.with_attention(hf_config, m.attention_layers or (m.attention,), where)
    if c.export and not portable(hf_config):
        raise UserError(
            f"{where}: no folder can say this to other "
            "programs: set config.export = False; Embedder and jaxembed.evaluate open the run itself"
        )
    if m.projection and head.projection and m.projection != head.projection:
        raise UserError(f"config.model.projection = {m.projection}, but {m.init} has one of width {head.projection}")
    tokenizer = blueprint.tokenizer
    if c.tokenizer != AUTO and m.init != "scratch":
        tokenizer = Tokenizer.load(tokenizer_spec(c.tokenizer))
        require_fitting(tokenizer, blueprint, f"config.tokenizer = {c.tokenizer}")
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
    if head.pool_layers >= 0 and c.export and not arch.all_states:
        raise UserError(
            f"config.model.pool_layers = {head.pool_layers}: transformers gives other states of a {arch.model_type}'s "
            "layers: leave it -1, or set config.export = False"
        )
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


def require_fitting(tokenizer: Tokenizer, blueprint: Blueprint, what: str) -> None:
    size = blueprint.backbone.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(f"{what} has {tokenizer.vocab_size} tokens, but the model's table only {size}")


def tokenizer_spec(spec: str) -> str:
    """Returns the spec with a name on the hub resolved to its folder."""
    kind, _, where = spec.partition(":")
    return f"hf:{resolve(where)}" if kind == "hf" else spec
