"""Where the words of a prompt are in what the UNet sees."""

from __future__ import annotations

import itertools

from sfumato.errors import SfumatoError
from sfumato.text.prompt import lay_out, read
from sfumato.text.tokenizer import Tokenizer


def find_word(tokenizer: Tokenizer, text: str, word: str, *, weights: bool = True) -> list[int]:
    """The positions in the text features of all tokens of `word`, wherever it occurs in the prompt `text`.

    `word` is one word, several in a row or a placeholder; it is compared whole and without regard to case. Positions
    count through the chunks side by side, as the features lie (`sfumato.text.prompt.tokenize`), start tokens included;
    `weights` is whether brackets in `text` are notation. Raises SfumatoError, with the prompt's words, if it is not
    there.
    """
    wanted = [each.text.casefold() for each in tokenizer.split(word)]
    words = [each for each, _ in read(tokenizer, text, weights=weights)]
    places = lay_out(tokenizer, words)
    said = [each.text.casefold() if each else None for each in words]
    found: set[int] = set()
    for start in range(len(said) if wanted else 0):
        if said[start : start + len(wanted)] == wanted:
            found.update(itertools.chain(*places[start : start + len(wanted)]))
    if not found:
        there = ", ".join(dict.fromkeys(each.text for each in words if each)) or "none"
        raise SfumatoError(f"{word!r} is not among the words of the prompt, which are: {there}.")
    return sorted(found)
