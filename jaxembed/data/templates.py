"""Templates: words around a text, which make a language model say in its last states what the text means.

A template is a text with {text} in it, once, or twice for echo embeddings. It becomes part of the tokenizer
(`Tokenizer.with_template`), so that an exported folder applies it in other programs too: the text is cut where it is
too long, the template never is, and a prompt goes before the text, inside the template.
"""

import dataclasses

from jaxembed.errors import UserError, require

TEXT = "{text}"

PROMPT_EOL = "prompt_eol"
META_EOL = "meta_eol"
NAMED = {
    # "Explicit one-word limitation": Jiang et al. 2023, arXiv:2307.16645. Its last token is pooled.
    PROMPT_EOL: 'This sentence: "{text}" means in one word: "',
    # Springer et al. 2024, arXiv:2402.15449: in the second copy every token has seen the whole text.
    "echo": "Rewrite the sentence: {text}\nThe rewritten sentence: {text}",
}
# Lei et al. 2024, arXiv:2402.18458: two templates of each of four kinds of task (classification, sentiment, paraphrase,
# information extraction), whose vectors are averaged. The kinds are the paper's, the words are ours.
META_TASKS = (
    'A text is filed under one broad subject, such as science, sport or politics. The subject of the text "{text}" in '
    'one word: "',
    'A statement either reports a fact or gives an opinion. What the statement "{text}" does, in one word: "',
    'A review shows what its writer feels. The feeling in the review "{text}" in one word: "',
    'A message has a tone, such as joy, anger or fear. The tone of the message "{text}" in one word: "',
    'Two sentences are paraphrases where they say the same in other words. What the sentence "{text}" says, in one '
    'word: "',
    'A sentence can be said again more shortly without losing its meaning. The sentence "{text}" shortened to one '
    'word: "',
    'A text is about somebody or something. Who or what the text "{text}" is about, in one word: "',
    'A text is found again by its most important fact. The most important fact in the text "{text}" in one word: "',
)


@dataclasses.dataclass(frozen=True)
class Template:
    """A template, cut at its {text}.

    Attributes:
      before: the words before each copy of the text. Spaces right before the text are left out: text and template are
        tokenised apart, and a space alone would be an odd token.
      after: the words behind the last copy. Where there are some, their last token is meant to be pooled, and stands in
        the place of the tokenizer's own closing tokens.
    """

    before: tuple[str, ...]
    after: str

    @property
    def copies(self) -> int:
        """How often the text is in it."""
        return len(self.before)


def parse(template: str, where: str) -> Template:
    """Reads a template: the name of one, or a text with {text} in it.

    Raises:
      UserError: it is neither; `where` names what holds it.
    """
    require(template != META_EOL, f"{where} = {META_EOL!r}: those are several templates; name one")
    text = NAMED.get(template, template)
    if TEXT not in text:
        raise UserError(f"{where} = {template!r}: wants {', '.join(NAMED)}, or a text with {TEXT} in it")
    require("{instruction}" not in text, f"{where} = {template!r}: {{instruction}} belongs into prompts")
    *before, after = text.split(TEXT)
    return Template(tuple(words.rstrip(" ") for words in before), after)


def several(template: str) -> tuple[str, ...]:
    """Returns the templates of a name that stands for several, or the one."""
    return META_TASKS if template == META_EOL else (template,)
