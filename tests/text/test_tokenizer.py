"""The tokenizer against Hugging Face's, over many strings and all the kinds of files that checkpoints carry."""

from __future__ import annotations

import functools
import html
import json
import random
import warnings
from pathlib import Path
from typing import Any

import ftfy
import jaxtyping
import numpy as np
import pytest

from sfumato.errors import FileError, SfumatoError
from sfumato.text.tokenizer import Tokenizer, TruncationWarning, clean, clip_tokenizer
from sfumato.text.tokenizer_files import load_tokenizer

ASTRONAUT = "a photograph of an astronaut riding a horse"
ASTRONAUT_IDS = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]

STRINGS = [
    "", " ", "\t a \n\n b \r\n", ASTRONAUT, "A PHOTO of a CaT", "it's we're they've I'm he'll she'd don't DON'T",
    "12345 3.14 1,000,000 ½ Ⅷ ٣٤", "(masterpiece:1.3), [best quality], {{sharp}}", "a-b_c/d\\e|f", "!!! ?!? ... :-) <3",
    "wow! a fox!!", "hello !", "naïve café Ærøskøbing straße İstanbul ΣΊΣΥΦΟΣ", "e\u0301 vs \u00e9 \ufb01ne ＦＵＬＬ",
    "一只戴着帽子的猫 漢字かな交じり文 고양이", "Кот на крыше", "قطة على السطح", "แมว",
    "🐱🚀👩‍🚀🏳️‍🌈 🇩🇪 👍🏽", "zero\u200bwidth \u00a0nbsp",
    "<|endoftext|>", "<|startoftext|>a fox<|endoftext|> and more", "x<|endoftext|>y", "<|EndOfText|> <|StartOfText|>",
    "<| endoftext |> <|endoftext| >", "<cat-toy> on a shelf", "fish &amp; chips &lt;b&gt; &amp;quot;x&amp;quot; &#39;",
    "schÃ¶n âœ” mojibake", "“curly” ‘quotes’ — dash … ellipsis", "\x00 control \x1b[31m", "a" * 300,
    "\ud83d lone surrogate",
    "https://example.com/?q=a&b=c#d", "#hashtag @user $5 50% 20°C", "</w> a</w>b", "ﷺ \U0001f9ff \u0b95\u0bcd\u0bb7",
]  # fmt: skip


def varied(count: int = 400) -> list[str]:
    """Strings of random words, signs and characters from all over Unicode, by a fixed seed."""
    rng = random.Random(0)
    words = " ".join([*STRINGS[2:], "oil painting portrait 8k trending artstation greg van gogh's"]).split()

    def piece() -> str:
        kind = rng.random()
        if kind < 0.7:
            return rng.choice(words)
        if kind < 0.85:
            return "".join(rng.choices("abcXYZ0189 '’,.!?-_()[]<|>&;#\"\n", k=rng.randint(1, 8)))
        planes = [(0x20, 0x24F), (0x370, 0x5FF), (0x900, 0xDFF), (0x2000, 0x2BFF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF)]
        return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 4)))

    def prompt() -> str:
        return rng.choice([" ", ", ", ""]).join(piece() for _ in range(rng.randint(1, 12)))

    return STRINGS + [prompt() for _ in range(count)]


def flags(content: str, normalized: bool, special: bool) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": normalized,
        "special": special,
    }  # fmt: skip


def named(content: str) -> dict[str, Any]:
    """A token as old tokenizer_config.json files write it."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}  # fmt: skip


START, END = "<|startoftext|>", "<|endoftext|>"
OLD = {
    "add_prefix_space": False, "bos_token": named(START), "do_lower_case": True, "eos_token": named(END),
    "errors": "replace", "model_max_length": 77, "pad_token": END, "tokenizer_class": "CLIPTokenizer",
    "unk_token": named(END),
}  # fmt: skip
OLD_MAP = {"bos_token": flags(START, True, False), "eos_token": flags(END, True, False), "pad_token": END,
           "unk_token": flags(END, True, False)}  # fmt: skip
NEW = {
    "added_tokens_decoder": {"49406": flags(START, True, False), "49407": flags(END, False, False)},
    "bos_token": START, "eos_token": END, "model_max_length": 77, "pad_token": END, "unk_token": END,
    "tokenizer_class": "CLIPTokenizer",
}  # fmt: skip
BANG = {"0": flags("!", False, True)}
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"tokenizer_config.json": OLD, "special_tokens_map.json": OLD_MAP},
    # SD 2's tokenizer_config.json names another pad token than special_tokens_map.json, which wins.
    "sd2": {"tokenizer_config.json": OLD, "special_tokens_map.json": OLD_MAP | {"pad_token": "!"}},
    "sdxl": {"tokenizer_config.json": NEW},
    "sdxl-2": {
        "tokenizer_config.json": NEW
        | {"pad_token": "!", "added_tokens_decoder": BANG | NEW["added_tokens_decoder"]},
        "special_tokens_map.json": {"pad_token": END},
        "added_tokens.json": {"!": 0, END: 49407, START: 49406},
    },
    "textual inversion, old": {
        "tokenizer_config.json": OLD, "special_tokens_map.json": OLD_MAP,
        "added_tokens.json": {"<cat-toy>": 49408, "<Hat>": 49409},
    },
    "textual inversion, new": {
        "tokenizer_config.json": NEW | {
            "added_tokens_decoder": NEW["added_tokens_decoder"] | {"49408": flags("<cat-toy>", True, False)},
        },
    },
    "unset length": {"tokenizer_config.json": NEW | {"model_max_length": int(1e30)}},
    "bare": {},
}  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    """A tokenizer folder with CLIP's vocabulary and these files beside it."""
    clip_tokenizer().save(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def theirs(folder: Path) -> Any:
    import transformers

    return transformers.CLIPTokenizer.from_pretrained(folder)


def rows_of(reference: Any, texts: list[str]) -> np.ndarray:
    texts = [clean(text) for text in texts]
    return np.array(reference(texts, padding="max_length", max_length=77, truncation=True).input_ids)


def quiet(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return tokenizer(texts)


def test_the_sentence_everybody_tests_with():
    row = clip_tokenizer()([ASTRONAUT])[0]
    assert row.dtype == np.int32
    assert row.tolist() == ASTRONAUT_IDS + [49407] * 67
    assert clip_tokenizer("!")([ASTRONAUT])[0].tolist() == ASTRONAUT_IDS + [0] * 67
    assert clip_tokenizer().backend.get_vocab_size() == 49408


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_means_what_it_means_to_transformers(tmp_path, kind):
    folder, texts = write(tmp_path, KINDS[kind]), varied()
    ours, reference = load_tokenizer(folder), theirs(folder)
    assert (ours.bos, ours.eos, ours.pad) == tuple(reference.convert_tokens_to_ids(
        [reference.bos_token, reference.eos_token, reference.pad_token]
    ))  # fmt: skip
    assert ours.max_length == 77
    rows, expected = quiet(ours, texts), rows_of(reference, texts)
    wrong = [text for text, a, b in zip(texts, rows, expected, strict=True) if (a != b).any()]
    assert not wrong


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_transformers_and_we_read_back(tmp_path, kind):
    ours, texts = load_tokenizer(write(tmp_path / "first", KINDS[kind])), varied(100)
    ours.save(tmp_path / "second")
    again, reference = load_tokenizer(tmp_path / "second"), theirs(tmp_path / "second")
    assert (again.bos, again.eos, again.pad, again.max_length) == (ours.bos, ours.eos, ours.pad, 77)
    assert reference.model_max_length == 77
    np.testing.assert_array_equal(quiet(again, texts), quiet(ours, texts))
    np.testing.assert_array_equal(rows_of(reference, texts), quiet(ours, texts))
    again.save(tmp_path / "third")
    for file in (tmp_path / "second").iterdir():
        assert file.read_bytes() == (tmp_path / "third" / file.name).read_bytes()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2", "textual inversion, old"])
def test_what_new_transformers_save_we_read(tmp_path, kind):
    reference = theirs(write(tmp_path / "first", KINDS[kind]))
    reference.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.json").exists()
    ours, texts = load_tokenizer(tmp_path / "second"), varied(100)
    np.testing.assert_array_equal(quiet(ours, texts), rows_of(theirs(tmp_path / "second"), texts))


@pytest.mark.parity
def test_decoding_is_that_of_transformers(tmp_path):
    ours, reference = clip_tokenizer(), theirs(write(tmp_path, KINDS["sdxl"]))
    for text in varied(100):
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_a_prompt_that_fits_is_not_warned_of(recwarn):
    row = clip_tokenizer()(["fox " * 75])[0]
    assert (row[0], row[-1]) == (49406, 49407)
    assert (row[1:-1] == clip_tokenizer().encode("fox")[0]).all()
    assert not recwarn.list


def test_the_warning_quotes_the_words_that_were_cut():
    tail = "a supercalifragilistic Étoile"
    with pytest.warns(TruncationWarning) as caught:
        rows = clip_tokenizer()(["fox " * 73 + tail, "short", "fox " * 76])
    assert [str(warning.message).partition("cut off was: ")[2] for warning in caught] == [
        "supercalifragilistic Étoile", "fox",
    ]  # fmt: skip
    assert "and only 75 are read" in str(caught[0].message)
    assert rows[0, -1] == rows[1, 2] == 49407
    assert len(clip_tokenizer().encode("fox " * 200)) == 200


def test_words_know_the_positions_of_their_tokens():
    tokenizer, text = clip_tokenizer(), "A supercalifragilistic étoile's sd15 <|endoftext|> cats!"
    words = tokenizer.words(text)
    assert [word for word, _ in words] == ["A", "supercalifragilistic", "étoile", "'s", "sd15", END, "cats", "!"]
    assert [at for _, positions in words for at in positions] == list(range(1, len(tokenizer.encode(text)) + 1))
    row = tokenizer([text])[0]
    for word, positions in words:
        assert tokenizer.decode(row[list(positions)]).replace(" ", "") == word.lower()


def test_text_is_cleaned_as_openai_does_it():
    assert clean(" fish &amp;amp; chips ") == "fish & chips"
    assert clean("schÃ¶n “x”") == 'schön "x"'
    tokenizer = clip_tokenizer()
    assert tokenizer.encode("Fish &amp; CHIPS") == tokenizer.encode("fish  &\n chips")


def test_plain_text_has_nothing_to_repair():
    """Which is why it is not looked at."""
    letters = np.array([chr(code) for code in range(32, 127) if chr(code) != "&"])
    for row in np.random.default_rng(0).choice(letters, (500, 40)):
        text = "".join(row)
        assert html.unescape(ftfy.fix_text(text)) == text
        assert clean(text) == text.strip()


def test_the_built_in_tokenizer_is_made_once():
    assert clip_tokenizer("!") is clip_tokenizer("!")


# Placeholders


@functools.cache
def placed() -> Tokenizer:
    return clip_tokenizer().place("<Cat>", 3).place("my-style", 2).place("sks_dog").place("<hat>")


@pytest.mark.parametrize(("text", "parts"), [
    ("a <Cat> fox", ["a", 49408, 49409, 49410, "fox"]),
    ("a <cat> <CAT>", ["a", 49408, 49409, 49410, 49408, 49409, 49410]),
    ("<Cat>, (<Cat>)!", [49408, 49409, 49410, ", (", 49408, 49409, 49410, ")!"]),
    ("x<Cat>y", ["x", 49408, 49409, 49410, "y"]),
    ("&lt;Cat&gt;'s", [49408, 49409, 49410, "'s"]),
    ("my-style's, un-my-style", [49411, 49412, "'s, un-", 49411, 49412]),
    ("My-Style sks_dog.", [49411, 49412, 49413, "."]),
    ("my-styles my-style2 sks_dogs", ["my-styles my-style2 sks_dogs"]),
    ("<hat><hat> <Cat", [49414, 49414, "<Cat"]),
    ("", []),
])  # fmt: skip
def test_placeholders_are_read_as_their_tokens(text, parts):
    plain, expected = clip_tokenizer(), []
    for part in parts:
        expected += plain.encode(part) if isinstance(part, str) else [part]
    assert placed().encode(text) == expected


@pytest.mark.parity
def test_other_text_means_what_it_meant():
    plain, new = clip_tokenizer(), placed()
    texts = varied(200)
    assert [new.encode(text) for text in texts] == [plain.encode(text) for text in texts]
    assert plain.size == 49408
    assert new.size == 49415
    assert plain.encode("<Cat>") != [49408, 49409, 49410], "the tokenizer that was given stays as it is"


def test_a_placeholder_is_one_word():
    words = placed().words("a <Cat>, my-style2 <hat>")
    assert [text for text, _ in words] == ["a", "<Cat>", ",", "my", "-", "style2", "<hat>"]
    assert words[1] == ("<Cat>", (2, 3, 4))
    assert words[-1] == ("<hat>", (10,))
    with pytest.warns(TruncationWarning, match="cut off was: <Cat> fox"):
        row = placed()(["fox " * 74 + "<Cat> fox"])[0]
    assert row[75] == 49408


@pytest.mark.parametrize("name", ["<Cat>", "<cat>", "my-STYLE", "my-style_1", "sks_dog", START])
def test_placeholders_that_are_there_are_refused(name):
    with pytest.raises(SfumatoError, match="is in the model's vocabulary already as a placeholder; choose another"):
        placed().place(name)


@pytest.mark.parametrize(("name", "message"), [
    ("fox", "'fox' is a word of the model's vocabulary already; choose another name with token=, such as '<my-fox>'"),
    ("FOX", "is a word of"), ("photogra", "is a word of"), ("é", "is a word of"),
    ("", "cannot be called ''; choose a name with token="), (" ", "cannot be called ' '"),
    ("<hat>_1", "'<hat>_1' would be taken for a part of another placeholder"),
    ("<cat>_3", "would be taken for a part of another placeholder"),
    (" <x> ", "would not be found in a prompt, whose text is cleaned"), ("a&amp;b", "would not be found in a prompt"),
    ("“x-y”", "would not be found"),
])  # fmt: skip
def test_names_that_cannot_be_placeholders_are_refused(name, message):
    with pytest.raises(SfumatoError, match=message):
        placed().place(name)


def test_a_placeholder_may_begin_like_another():
    tokenizer = placed().place("my-style-v2", 2).place("<Cat>s")
    assert tokenizer.encode("my-style-v2 my-style <Cat>s") == [49415, 49416, 49411, 49412, 49417]


@pytest.mark.parity
def test_saved_placeholders_are_read_back(tmp_path):
    ours = placed()
    ours.save(tmp_path)
    again, reference = load_tokenizer(tmp_path), theirs(tmp_path)
    texts = [*varied(100), "a <Cat>, (my-style's) sks_dog", "MY-STYLE <hat>s", "my-styles"]
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    # Without the pipeline around it the reference reads a name as its first token.
    single = [text for text in texts if "style" not in text.lower() and "<Cat>" not in text]
    np.testing.assert_array_equal(rows_of(reference, single), quiet(ours, single))
    assert len(reference) == 49415


@pytest.mark.parametrize("texts", ["a fox", ["a fox", 3], [None]])
def test_prompts_that_are_no_list_of_strings_are_refused(texts, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # else its own check comes first
    with pytest.raises(SfumatoError, match=r"must be a string, not (3|None)|not a single string"):
        clip_tokenizer()(texts)


def swap(name: str, old: str, new: str) -> Any:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def put(name: str, content: bytes | dict[str, Any]) -> Any:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "holds no tokenizer"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "holds no tokenizer"),
    "cut in half": (swap("vocab.json", ', "zz', ', "z'), "do not fit each other|not valid JSON"),
    "not json": (put("vocab.json", b'{"!": 0, "'), "vocab.json is not valid JSON"),
    "a list": (put("vocab.json", b"[1, 2]"), "vocab.json must hold a JSON object, not a list"),
    "a pointer": (put("vocab.json", b"version https://git-lfs.github.com/spec/v1\n"), "vocab.json is not valid JSON"),
    "bytes": (put("merges.txt", b"\xff\xfe\x00"), "merges.txt cannot be read as text"),
    "numbers as text": (put("vocab.json", {"!": "0", START: "1", END: "2"}), "not give every token a number"),
    "one number twice": (swap("vocab.json", '"#": 2,', '"#": 3,'), "vocab.json does not give every token"),
    "other merges": (swap("merges.txt", "\n", "\nfoo bar\n"), "do not fit each other .*foo"),
    "three parts": (swap("merges.txt", "\ni n\n", "\ni n n\n"), "merges.txt: line 2 is not a pair of tokens: 'i n n'"),
    "no end": (swap("vocab.json", END, "<|nothing|>"), r"the eos_token '<\|endoftext\|>' is not in the vocabulary"),
    "unknown pad": (put("special_tokens_map.json", {"pad_token": "[PAD]"}), r"pad_token '\[PAD\]' is not in the voc"),
    "gap": (put("added_tokens.json", {"<cat>": 50000}), "added token '<cat>' cannot have the number 50000"),
    "length": (put("tokenizer_config.json", {"model_max_length": 1}), "model_max_length=1 leaves no room"),
    "length as text": (put("tokenizer_config.json", {"model_max_length": "x"}), "files are damaged"),
    "token without text": (put("tokenizer_config.json", {"pad_token": {"special": True}}), "files are damaged"),
    "not clip": (put("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}), "holds a Unigram tokenizer"),
    "no model": (put("tokenizer.json", {"version": "1.0"}), "files are damaged .*model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(tmp_path, damage):
    change, message = DAMAGES[damage]
    change(write(tmp_path, {}))
    with pytest.raises(FileError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
