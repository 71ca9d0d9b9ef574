"""Set-ups of losses over tokens that cannot be right, refused before any device starts. No jax here."""

from jaxembed.config import Config, LossConfig
from jaxembed.errors import require
from jaxembed.losses.table import LOSSES


def check_token_losses(c: Config) -> None:
    """Raises UserError with one line for the first rule that the config's losses over tokens break."""
    losses = [(f"config.losses[{i}]", loss) for i, loss in enumerate(c.losses)] or [("config.loss", c.loss)]
    over_tokens = [(where, loss) for where, loss in losses if LOSSES[loss.name].over_tokens]
    for where, loss in losses:
        end = loss.weight_end
        require(end == -1 or end >= 0, f"{where}.weight_end = {end:g}: must not be negative; -1 = it stays")
    for where, loss in over_tokens:
        _one_loss(c, loss, where)
    over_vectors = len(losses) > len(over_tokens)
    only = "and all losses are over tokens"
    require(
        over_vectors or not (c.matryoshka.dims or c.matryoshka.layers),
        f"config.matryoshka is about vectors, {only}: leave it alone",
    )
    masked = c.data.mask.query or c.data.mask.document
    require(over_vectors or not masked, f"config.data.mask is about texts that become vectors, {only}: leave it 0")
    require(
        c.data.positives > 0 or not over_vectors,
        "config.data.positives = 0: losses over vectors compare queries with positives: set at least 1",
    )
    anneal = c.model.anneal_attention
    require(
        c.steps == 0 or anneal <= c.steps,
        f"config.model.anneal_attention = {anneal}, but there are {c.steps} steps: attention would not become whole",
    )
    require(
        not anneal or c.model.attention_kernel != "pallas",
        "config.model.anneal_attention needs config.model.attention_kernel = 'xla' or 'auto': no kernel knows it",
    )


def _one_loss(c: Config, loss: LossConfig, where: str) -> None:
    require(
        loss.name != "next_token" or c.model.experts.routing != "expert_choice",
        f"{where}: next_token with config.model.experts.routing = 'expert_choice', by which experts see whole texts: "
        "take 'token'",
    )
    require(0 < loss.mask_rate <= 1, f"{where}.mask_rate = {loss.mask_rate:g}: must be above 0, and at most 1")
    replaced = loss.random_rate, loss.keep_rate
    require(
        min(replaced) >= 0 and sum(replaced) <= 1,
        f"{where}.random_rate = {loss.random_rate:g}, .keep_rate = {loss.keep_rate:g}: parts, at most 1 together",
    )
    least = loss.mask_least
    require(0 < least < 1, f"{where}.mask_least = {least:g}: must be above 0 (a loss is divided by t) and below 1")
    require(
        0 < len(loss.sides) == len(set(loss.sides)),
        f"{where}.sides = {loss.sides!r}: wants 'query', 'document' or both, each once",
    )
    require(
        loss.sides != ("document",) or c.data.positives > 0,
        f"{where}.sides = ('document',), but config.data.positives = 0 leaves queries alone",
    )
