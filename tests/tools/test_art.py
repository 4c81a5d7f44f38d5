"""The art: names, captions, what is held out, masks, regions, and the folder that training reads."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sfumato.annotators.regions import COLOURS, PALETTE
from sfumato.train.data import Batches, examples
from tools.art import heldout, packages
from tools.art.build import build, known, select
from tools.art.captions import captions, with_article
from tools.art.draw import draw, mask, on_white
from tools.art.heldout import HeldOut
from tools.art.licences import licences
from tools.art.names import Concept, tidy
from tools.art.regions import of_picture, regions
from tools.art.styles import STYLES, Art, IconSet, art_of

GRADIENT = '<linearGradient id="a"><stop stop-color="#f00"/><stop offset="1" stop-color="#900"/></linearGradient>'
GLEAM = '<linearGradient id="b"><stop stop-color="#fff"/><stop offset="1" stop-color="#fff" stop-opacity="0"/>'
APPLE = (
    f'<defs>{GRADIENT}{GLEAM}</linearGradient></defs><circle cx="16" cy="18" r="12" fill="url(#a)"/>'
    '<rect x="14" y="2" width="4" height="8" fill="#3caa3c"/>'
    '<circle cx="12" cy="14" r="3" fill="url(#b)" opacity=".4"/>'
)
SQUARE = '<path fill="{}" d="M4 4h24v24H4z"/>'


class Files(dict):
    """The files of a package, in memory."""

    def names(self):
        return list(self)

    def read(self, name):
        return self[name] if isinstance(self[name], bytes) else json.dumps(self[name]).encode()


def icons(chars: dict, **bodies: str) -> Files:
    found = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    return Files({"icons.json": {"width": 32, "height": 32, "icons": found}, "chars.json": chars})


def webp(colour: str) -> bytes:
    file, picture = io.BytesIO(), Image.new("RGBA", (64, 64))
    picture.paste(Image.new("RGBA", (48, 48), colour), (8, 8))
    picture.save(file, "webp", lossless=True)
    return file.getvalue()


CHARS = {"1f34e": "red-apple", "1f98a": "fox", "1f415-200d-1f9ba": "service-dog", "1f44d-1f3fb": "thumb"}
PACKAGES = {
    "@iconify-json/noto": icons(
        CHARS, red_apple=APPLE, fox=SQUARE.format("#ff8c00"), service_dog=SQUARE.format("#ff8c00")
    ),
    "@iconify-json/twemoji": icons(CHARS, red_apple=SQUARE.format("#d22"), fox=SQUARE.format("#f80")),
    "@iconify-json/fluent-emoji-flat": icons(CHARS, red_apple=SQUARE.format("#d22")),
    "@iconify-json/fluent-emoji": icons(
        {}, red_apple='<path fill="#0f0" d="M4 4h12v24H4z"/><path d="M16 4h12v24H16z"/>'
    ),
    "@lobehub/fluent-emoji-3d": Files(
        {"assets/1f34e.webp": webp("#dc2828"), "assets/1f98a-fe0f.webp": webp("#ff8c00")}
    ),
    "unicode-emoji-json": Files(
        {
            "data-by-emoji.json": {
                "🍎": {"name": "red apple", "group": "Food & Drink"},
                "🦊": {"name": "fox", "group": "Animals & Nature"},
                "🐕‍🦺": {"name": "service dog", "group": "Animals & Nature"},
                "🇫🇷": {"name": "flag France", "group": "Flags"},
                "👍🏻": {"name": "thumbs up", "group": "People & Body"},
            }
        }
    ),
    "emojibase-data": Files({"en/data.json": [{"emoji": "🍎", "label": "red apple", "tags": ["fruit", "apple"]}]}),
    "emojilib": Files({"dist/emoji-en-US.json": {"🍎": ["red_apple", "fruit", "school"]}}),
}


def open_package(name: str) -> Files:
    return PACKAGES[name]


@pytest.fixture(scope="module")
def concepts():
    return known(open_package)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, concepts):
    out = tmp_path_factory.mktemp("art")
    held = HeldOut({"fox": "twemoji", "red apple": "fluent-3d"})
    styles = ("noto", "twemoji", "fluent-3d", "fluent-color")
    counts = build(out, open_package, concepts, styles, held, aliases={"red apple": ("apple", "fox")}, size=32)
    return out, counts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_have_groups_and_keywords_but_no_flags_and_no_skin_tones(concepts):
    assert [one.name for one in concepts] == ["red apple", "fox", "service dog"]
    assert concepts[0] == Concept("1f34e", "red apple", "food-drink", ("fruit", "school"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("woman: red hair", "woman with red hair"),
        ("person: bald", "bald person"),
        ("family: man, woman, boy", "family of man, woman and boy"),
        ("jack-o-lantern", "jack o lantern"),
        ("Japanese “bargain” button", "japanese bargain button"),
        ("O button (blood type)", "o button"),
    ],
)
def test_names_are_as_one_says_them(name, said):
    assert tidy(name) == said


def test_only_what_is_counted_takes_an_article():
    names = ["red apple", "umbrella", "unicorn", "grapes", "octopus", "glass of milk", "bread", "cloud with rain"]
    said = ["a red apple", "an umbrella", "a unicorn", "grapes", "an octopus", "a glass of milk", "bread"]
    assert [with_article(name) for name in names] == [*said, "a cloud with rain"]


def test_captions_vary_and_stay_the_same(concepts):
    said = captions(concepts[0], "noto", ["apple"])
    assert said == captions(concepts[0], "noto", ["apple"])
    assert said[0] == "red apple, noto"
    assert {"an emoji of a red apple, noto style", "noto style, a red apple", "a red apple", "apple, noto"} <= set(said)
    assert any("fruit" in one and "school" in one for one in said)
    assert len(set(said)) == len(said)


def test_art_is_found_by_code_points_or_by_name(concepts):
    flat = art_of(STYLES["fluent-color"], open_package)
    assert flat.find(concepts[0])
    assert not flat.find(concepts[1])
    assert art_of(STYLES["fluent-3d"], open_package).find(concepts[1]), "FE0F makes no difference"
    assert art_of(STYLES["noto"], open_package).find(concepts[2]), "nor does 200D"


def test_oblong_art_is_centred(concepts):
    files = icons({}, fox=SQUARE.format("#f00"))
    files["icons.json"]["icons"]["fox"] |= {"height": 64}
    drawn = np.array(draw(IconSet(files).find(concepts[1])(), 64))[..., 3]
    assert drawn[2 + 2 : 26, 16 + 4 : 48 - 4].min() == 255
    assert drawn[:, :16].max() == 0


def test_the_folder_is_read_for_training(folder):
    out, _ = folder
    for column in (None, "regions", "mask"):
        found = examples(out, conditioning_column=column)
        assert len(found) == len(lines(out / "metadata.jsonl"))
        assert all(len(example.text) >= 8 for example in found)
        batch = next(Batches(found, batch=2, size=(32, 32), threads=0))
        assert batch["pixels"].shape == (2, 32, 32, 3)
        assert ("conditioning" in batch) == (column is not None)
    assert len(examples(out / "heldout", conditioning_column="regions")) == 3


def test_of_equal_pictures_only_the_first_stays(folder):
    assert folder[1]["noto", "train"] == 2
    assert not (folder[0] / "pictures/noto/service-dog.webp").exists()


def test_what_is_held_out_is_apart(folder):
    out, counts = folder
    assert sum(counts.values()) == 7
    train, held = lines(out / "metadata.jsonl"), lines(out / "heldout.jsonl")
    pairs = {(one["concept"], one["style"]): one["why"] for one in held}
    assert pairs == {
        ("fox", "twemoji"): "pair", ("red apple", "fluent-3d"): "pair", ("red apple", "fluent-color"): "twin",
    }  # fmt: skip
    assert not pairs.keys() & {(one["concept"], one["style"]) for one in train}
    assert all((out / one[key]).is_file() for one in train + held for key in ("file_name", "mask", "regions"))
    assert [one["file_name"] for one in lines(out / "heldout" / "metadata.jsonl")] == [
        one["file_name"].removeprefix("heldout/") for one in held
    ]


def test_a_name_of_another_concept_is_no_other_name(folder):
    said = next(one["text"] for one in lines(folder[0] / "metadata.jsonl") if one["concept"] == "red apple")
    assert "apple, noto" in said
    assert "fox, noto" not in said


def test_pictures_are_on_white_and_masks_are_their_outlines(folder):
    picture = np.array(Image.open(folder[0] / "pictures/noto/fox.webp"))
    outline = np.array(Image.open(folder[0] / "masks/noto/fox.png"))
    inside = np.zeros((32, 32), bool)
    inside[4:28, 4:28] = True
    np.testing.assert_array_equal(outline, np.where(inside, 255, 0))
    np.testing.assert_array_equal(picture, np.where(inside[..., None], [255, 140, 0], 255))


def colours(picture: Image.Image) -> dict[str, int]:
    """How many pixels have each colour of the palette. Raises StopIteration for another colour."""
    found = picture.getcolors()
    assert found is not None
    return {
        next(name for name, c in zip(PALETTE, COLOURS.tolist(), strict=True) if c == list(rgb)): n for n, rgb in found
    }


def test_regions_are_the_shapes_in_flat_colours():
    drawn = draw(Art(svg=IconSet(PACKAGES["@iconify-json/noto"])._svg("red-apple")), 64)
    found = regions(Art(svg=IconSet(PACKAGES["@iconify-json/noto"])._svg("red-apple")), drawn)
    count = colours(found)
    assert set(count) == {"ground", "red", "green"}, "no shade of the gradient, and no gleam"
    assert count["green"] == 8 * 16
    ground = np.array(found).max(-1) == 0
    np.testing.assert_array_equal(ground, np.array(mask(drawn)) < 128)


def test_regions_of_a_picture_are_those_of_its_twin_where_outlines_fit(concepts):
    art = art_of(STYLES["fluent-3d"], open_package).find(concepts[0])()
    twin = art_of(STYLES["fluent-color"], open_package).find(concepts[0])()
    half = Art(svg=twin.svg.replace("M16 4h12", "M16 4h2"))
    drawn = Image.new("RGBA", (32, 32))
    drawn.paste(Image.new("RGBA", (12, 24), "#dc2828"), (4, 4))
    drawn.paste(Image.new("RGBA", (12, 24), "#285ad2"), (16, 4))
    assert colours(regions(art, drawn, twin)) == {"ground": 32 * 32 - 24 * 24, "red": 288, "blue": 288}
    np.testing.assert_array_equal(regions(art, drawn, half), of_picture(drawn))
    assert set(colours(of_picture(drawn))) == {"ground", "red", "blue"}


def test_the_ground_is_white_wherever_art_is_not():
    drawn = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert on_white(drawn).getcolors() == [(16, (255, 255, 255))]


def test_concepts_are_chosen_by_name_or_group(concepts):
    assert [one.name for one in select(concepts, (), ["animals-nature"])] == ["fox", "service dog"]
    assert [one.name for one in select(concepts, ["fox"], ())] == ["fox"]
    with pytest.raises(ValueError, match="no concept or group dodo"):
        select(concepts, ["dodo"], ())


def test_what_is_held_out_depends_on_names_alone(concepts):
    arts = {style: art_of(STYLES[style], open_package) for style in ("noto", "twemoji", "fluent-3d")}
    sizes = {"noun_pairs": 1, "other_pairs": 1, "whole": 0}
    first = heldout.choose(concepts, arts, ["fox"], **sizes)
    assert first == heldout.choose(concepts[::-1], dict(reversed(arts.items())), ["fox"], **sizes)
    assert first.pairs.keys() == {"fox", "red apple"}
    everything = heldout.choose(concepts, arts, ["fox"], **sizes | {"whole": 1})
    assert everything.concepts == {"red apple"}
    assert everything.pairs.keys() == {"fox"}
    assert {everything.why("red apple", style) for style in arts} == {"concept"}


def test_the_list_of_the_repository():
    held, nouns = heldout.read(), heldout.nouns()
    assert len(nouns) == 150
    others = [other for also in nouns.values() for other in also]
    assert len(set(others)) == len(others)
    assert not set(others) & set(nouns), "another name of one is the name of none"
    in_nouns = {concept: style for concept, style in held.pairs.items() if concept in nouns}
    assert len(in_nouns) == 100
    assert set(in_nouns.values()) == set(heldout.NOUN_STYLES)
    assert len(held.pairs) == 200
    assert len(held.concepts) == 40
    assert not held.concepts & (held.pairs.keys() | set(nouns))
    assert held.why("red apple", "noto-blob") is None, "a spare style is whole but for the concepts"


def test_packages_are_those_of_the_table(tmp_path):
    package = packages.PACKAGES["emojilib"]
    assert package.url == "https://registry.npmjs.org/emojilib/-/emojilib-4.0.3.tgz"
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not emojilib 4\.0\.3"):
        packages.fetch(package, tmp_path)
    assert {style.package for style in STYLES.values()} <= packages.PACKAGES.keys()


def test_licences_name_every_author():
    text = licences(STYLES)
    for author in ("Google Inc.", "Twitter, Inc. and other contributors", "Microsoft Corporation", "Mu-An Chiou"):
        assert author in text
    assert all(f"## pictures/{style}\n" in text for style in STYLES)
