"""Masked diffusion: an upper bound of the negative log-likelihood of a text, in nats per word.

A part t of a text's words is masked, t evenly drawn from (0, 1], and the masked ones are predicted. With weights 1 / t
the expectation of the sum of their cross-entropies bounds -log p(text) from above (MDLM, Sahoo et al. 2024,
arXiv:2406.07524, equation 10; LLaDA, Nie et al. 2025, arXiv:2502.09992, equation 3). Dream (Ye et al. 2025,
arXiv:2508.15487) and DiffuLLaMA (Gong et al. 2024, arXiv:2410.17891), made of models of the next token, predict a word
from the state before it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxembed.config import AUTO
from jaxembed.hashing import uniform
from jaxembed.losses.predicting import PART, Questions, Tokens, maskable, masked_part, questions

_GOLDEN = 0x9E3779B9  # 2³² / golden ratio: multiples of it spread evenly, however many there are


def masked_diffusion(tokens: Tokens, mask_least: float, mask_draws: str, predicts: str) -> Questions:
    """Asks for the masked words of each text, with the weight 1 / t of the text.

    The loss is divided by the number of words that could be masked, of all texts of the global batch.

    Args:
      tokens: of the texts.
      mask_least: t is drawn evenly from [mask_least, 1]; what is below it is missing from the bound.
      mask_draws: how; see `parts`.
      predicts: 'same', 'next', or 'auto': as `tokens` says.
    """
    if predicts != AUTO:
        tokens = dataclasses.replace(tokens, shift=predicts == "next")
    part = mask_least + (1 - mask_least) * parts(tokens, mask_draws)
    chosen = masked_part(tokens, part)
    read = jnp.where(chosen, tokens.mask_id, tokens.ids)
    total = maskable(tokens).sum().astype(jnp.float32)
    return questions(tokens, read, jnp.where(chosen, 1 / part, 0), total)


def parts(tokens: Tokens, draws: str) -> jax.Array:
    """Returns the t of each token's text, float32 [R, L] in (0, 1).

    Args:
      tokens: of the texts.
      draws: 'independent'; 'antithetic': of two texts in a row one has t and the other 1 - t; 'low_discrepancy': the
        texts of a step are spread evenly, by multiples of the golden ratio (Weyl 1916), from a common random start.
    """
    number = (tokens.texts - 1) // tokens.stride
    if draws == "low_discrepancy":
        start = dataclasses.replace(tokens, texts=jnp.zeros_like(tokens.texts)).uniform(PART, each="text")
        bits = start + number.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    elif draws == "antithetic":
        bits = dataclasses.replace(tokens, texts=number // 2).uniform(PART, each="text")
        bits = jnp.where(number % 2 == 0, bits, ~bits)
    else:
        bits = tokens.uniform(PART, each="text")
    return uniform(bits)
