"""What the miner is asked for. No jax here."""

import dataclasses
import math

from jaxembed.errors import UserError

SAMPLING = ("top", "random")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What makes a candidate a hard negative; None of a rule that is off.

    Attributes:
      negatives: how many a record is to have, those that it has already among them.
      first, last: ranks first + 1 … last are taken, counted over candidates that are not known to match.
      absolute_margin, relative_margin, max_score, min_score: see `rules`.
      sampling: 'top', the best of those that are left; 'random', any, drawn by a hash of query and document.
      seed: of the draw.
      replace: leave out the negatives that records have.
    """

    negatives: int = 4
    first: int = 0
    last: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: str = "top"
    seed: int = 0
    replace: bool = False


def require(settings: Settings) -> None:
    """Refuses rules that leave nothing.

    Raises:
      UserError: names the flag.
    """
    for name in ("absolute_margin", "relative_margin", "max_score", "min_score"):
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name}={value}: must be finite")
    span = f"--range={settings.first}:{settings.last}"
    if not 0 <= settings.first < settings.last:
        raise UserError(f"{span}: the first number must be 0 or more, and below the second")
    if settings.last - settings.first < settings.negatives:
        ranks = settings.last - settings.first
        raise UserError(f"{span} holds {ranks} ranks, fewer than --negatives={settings.negatives}")
    if settings.absolute_margin is not None and settings.absolute_margin < 0:
        raise UserError(f"--absolute_margin={settings.absolute_margin:g}: must be 0 or more")
    if settings.relative_margin is not None and not 0 <= settings.relative_margin < 1:
        raise UserError(f"--relative_margin={settings.relative_margin:g}: is a part of the positive's score, 0 … 1")
    if None not in (settings.min_score, settings.max_score) and settings.min_score > settings.max_score:
        raise UserError(f"--min_score={settings.min_score:g} is above --max_score={settings.max_score:g}")
