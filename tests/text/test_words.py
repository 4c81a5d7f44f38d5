"""Finding words in what text encoders read."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.text.prompt import lay_out, read, tokenize
from sfumato.text.tokenizer import clip_tokenizer
from sfumato.text.words import find_word

TOKENIZER = clip_tokenizer()


def found(text: str, word: str, **options: bool) -> list[str]:
    """The tokens at the positions of a word, decoded."""
    ids = tokenize(TOKENIZER, [text], **options).ids.reshape(-1)
    return [TOKENIZER.decode(ids[[at]]) for at in find_word(TOKENIZER, text, word, **options)]


@pytest.mark.parametrize(("text", "word", "positions"), [
    ("a fox", "fox", [2]),
    ("A Fox in the snow", "fOX", [2]),
    ("a fox, a bear and a fox", "fox", [2, 8]),
    ("a red fox and a red bear", "red", [2, 6]),
    ("a red fox and a red bear", "red  fox", [2, 3]),
    ("a fox's tail", "fox", [2]),
    ("a fox's tail", "fox's tail", [2, 3, 4]),
    ("fox-bear (fox)", "fox", [1, 4]),
    ("a cat, a dog", "cat, a", [2, 3, 4]),
    # with weights and escapes
    ("a (red:1.3) (fox)", "red fox", [2, 3]),
    (r"a \(fox\)", "(fox)", [2, 3, 4]),
    ("a [fox] (fox:0)", "fox", [2, 3]),
    # broken encodings and entities are read as the tokenizer reads them
    ("fish &amp; chips", "fish & chips", [1, 2, 3]),
    ("“curly” fox", '"curly"', [1, 2, 3]),
    # chunks
    ("a fox BREAK a red fox", "fox", [2, 77 + 3]),
    ("a (fox BREAK:1.2) fox", "fox", [2, 77 + 1]),
    ("BREAK fox", "fox", [1]),
    ("a " * 74 + "fox fox", "fox", [75, 77 + 1]),
    ("a " * 74 + "red fox", "red fox", [75, 77 + 1]),
])  # fmt: skip
def test_positions(text, word, positions):
    assert find_word(TOKENIZER, text, word) == positions


def test_all_tokens_of_a_word_count():
    text = "a supercalifragilistic fox, (Supercalifragilistic:1.2)"
    count = len(TOKENIZER.encode("supercalifragilistic"))
    assert count > 1
    tokens = found(text, "supercalifragilistic")
    assert "".join(tokens) == "supercalifragilistic" * 2
    assert len(tokens) == 2 * count
    across = "a " * 73 + "supercalifragilistic"
    assert find_word(TOKENIZER, across, "supercalifragilistic")[:3] == [74, 75, 78]
    assert "".join(found(across, "supercalifragilistic")) == "supercalifragilistic"


@pytest.mark.parametrize(("text", "word"), [
    ("sd15 in 2024", "sd15"), ("sd15 in 2024", "2024"), ("İstanbul", "İstanbul"), ("一只猫 🐱🚀", "🐱🚀"),
    ("naïve cafe\u0301", "cafe\u0301"),
])  # fmt: skip
def test_numbers_and_other_scripts(text, word):
    assert "".join(found(text, word)) == TOKENIZER.decode(TOKENIZER.encode(word)).replace(" ", "")


@pytest.mark.parametrize(("text", "word"), [
    ("a fox", "bear"), ("a foxglove", "fox"), ("a fox", "ox"), ("sd15", "sd"), ("2024", "20"),
    ("a red, fox", "red fox"), ("a red BREAK fox", "red fox"), ("a fox BREAK a bear", "break"), ("a (fox:1.5)", "1"),
    ("a fox", ""), ("a fox", "  "),
])  # fmt: skip
def test_what_is_not_there_is_named_with_what_is(text, word):
    with pytest.raises(SfumatoError, match="is not among the words of the prompt, which are: ") as caught:
        find_word(TOKENIZER, text, word)
    assert repr(word) in str(caught.value)
    assert text.split()[0] in str(caught.value)


def test_an_empty_prompt_has_no_words():
    with pytest.raises(SfumatoError, match=r"'fox' is not among the words of the prompt, which are: none\."):
        find_word(TOKENIZER, "", "fox")


def test_a_word_is_named_once():
    with pytest.raises(SfumatoError, match=r"which are: A, red, fox, and, bear\."):
        find_word(TOKENIZER, "A red fox and red (bear)", "a wolf")


def test_brackets_are_text_where_they_are_no_notation():
    assert find_word(TOKENIZER, "a (fox:1.5)", "fox", weights=False) == [3]
    assert find_word(TOKENIZER, "a (fox:1.5)", "1.5", weights=False) == [5, 6, 7]
    assert find_word(TOKENIZER, "(fox BREAK bear)", "bear", weights=False) == [77 + 1]


@pytest.mark.parametrize("text", ["a (red:1.2) fox BREAK [bear] 3.14 it's", "fox " * 160, "", "👩‍🚀 &lt;b&gt; İ"])
def test_every_token_of_the_prompt_belongs_to_one_word(text):
    words = [word for word, _ in read(TOKENIZER, text)]
    places = lay_out(TOKENIZER, words)
    ids = tokenize(TOKENIZER, [text]).ids
    inside = np.flatnonzero(((ids != 49406) & (ids != 49407)).reshape(-1))
    assert [at for positions in places for at in positions] == inside.tolist()
    for word, positions in zip(words, places, strict=True):
        assert word is None or {*positions} <= {*find_word(TOKENIZER, text, word.text)}
