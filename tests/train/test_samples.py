"""Sample pictures: what is drawn is what the exported thing draws; wishes that are refused; the contact sheet."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.errors import FileError, SfumatoError
from sfumato.images import Images, Picture
from sfumato.io.picture_metadata import read_metadata
from sfumato.train.recipes.controlnet import controlnet
from sfumato.train.recipes.dreambooth import dreambooth
from sfumato.train.recipes.instruct_pix2pix import instruct_pix2pix
from sfumato.train.recipes.text_to_image import text_to_image
from sfumato.train.recipes.textual_inversion import textual_inversion
from sfumato.train.samples import LINES, Sampling, sheet, wrapped

SETTINGS = {"negative": "blurred", "steps": 2, "seed": 7, "size": (16, 16)}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tuple(str(folder / f"{number}.png") for number in range(2))


def reloaded(model, folder):
    return sfumato.load(folder)


RECIPES = {
    "text-to-image": (lambda model: text_to_image(model, train=("unet", "text_encoder"), remat=True), reloaded),
    "lora": (lambda model: dreambooth(model, prompt="a <fox>", rank=3, alpha=6, text=True),
             lambda model, folder: sfumato.load_lora(folder / "lora.safetensors", model).apply(model)),
    "textual inversion": (lambda model: textual_inversion(model, "<fox>", vectors=2),
                          lambda model, folder: sfumato.load_embedding(folder).apply(model)),
    "controlnet": (lambda model: controlnet(model, remat=True), lambda model, folder: model),
    "instruct-pix2pix": (instruct_pix2pix, reloaded),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_drawn_is_what_the_exported_draws(recipe, models, files, tmp_path, compiled):
    make, load = RECIPES[recipe]
    model, seen = models("sd1"), recipe in ("controlnet", "instruct-pix2pix")
    task, rng = make(model), np.random.default_rng(0)
    trained = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), task.trainable)
    wishes = Sampling(("a <fox> in the snow", "a boat"), files if seen else (), guidance=3.0, **SETTINGS)
    before = task.draw(task.trainable, wishes)
    programs = len(compiled)
    drawn = task.draw(trained, wishes)
    assert len(compiled) == programs, compiled[programs:]

    task.export(trained, tmp_path / "out")
    controls = [sfumato.CFG(3.0)]
    if recipe == "controlnet":
        controls += [sfumato.ControlNet(sfumato.load_controlnet(tmp_path / "out"), list(files))]
    if recipe == "instruct-pix2pix":
        controls = [sfumato.InstructPix2Pix(list(files), text_scale=3.0)]
    wanted = sfumato.generate(load(model, tmp_path / "out"), list(wishes.prompts), controls=controls, **SETTINGS)
    for ours, theirs in zip(drawn, wanted, strict=True):
        np.testing.assert_allclose(ours.array.astype(int), theirs.array.astype(int), atol=1)  # one rounding
        assert ours.metadata["settings"] == theirs.metadata["settings"]
    assert np.abs(drawn[0].array.astype(int) - before[0].array).max() > 2


@pytest.mark.slow
def test_recipes_that_need_pictures_say_so(models):
    for make in (controlnet, instruct_pix2pix):
        task = make(models("sd1"))
        with pytest.raises(SfumatoError, match="need pictures"):
            task.draw(task.trainable, Sampling(("a boat",)))


# Wishes


@pytest.mark.parametrize(("wishes", "message"), [
    ({"prompts": ()}, "need prompts"),
    ({"prompts": "a fox"}, r"prompts is a list, also if it has just one: \['a fox'\]"),
    ({"prompts": ("a", "b", "c"), "pictures": ("1.png", "2.png")}, "There are 2 pictures for 3 sample prompts"),
    ({"prompts": ("a",), "steps": 0}, "whole number of steps from 1 on, not 0"),
    ({"prompts": ("a",), "guidance": float("nan")}, "finite"),
    ({"prompts": ("a",), "sampler": "eulr"}, "euler"),
    ({"prompts": ("a",), "size": (0, 16)}, "whole pixels"),
    ({"prompts": ("a",), "seed": -1}, "seed"),
])  # fmt: skip
def test_wishes_that_nobody_can_fulfil(wishes, message, unchecked):
    with pytest.raises(SfumatoError, match=message):
        Sampling(**wishes)


def test_wishes_that_a_recipe_cannot_fulfil(files, tmp_path):
    Sampling(("a",)).check()
    Sampling(("a", "b"), files).check(pictures=True)
    Sampling((), files).check(prompts=False, pictures=True)
    (tmp_path / "text.png").write_text("no picture")
    for wishes, takes, error, message in (
        (Sampling((), files), {"pictures": True}, SfumatoError, "need prompts"),
        (Sampling(("a",)), {"pictures": True}, SfumatoError, "need pictures"),
        (Sampling(("a",), files[:1]), {}, SfumatoError, "prompts alone"),
        (Sampling(("a",), (str(tmp_path / "none.png"),)), {"pictures": True}, FileError, "none.png is not there"),
        (Sampling(("a",), (str(tmp_path / "text.png"),)), {"pictures": True}, FileError, "text.png is not a picture"),
    ):
        with pytest.raises(error, match=message):
            wishes.check(**takes)


# The sheet


def plain(colour, size=(60, 40)):
    return Picture(np.asarray(Image.new("RGB", size, colour)), {"prompt": "a", "settings": {"seed": 1}})


def middle(path, columns, rows):
    """The colours a little below the upper edge of the cells of a sheet, row by row."""
    with Image.open(path) as found:
        width, height = found.width // columns, found.height // rows
        return [found.getpixel((x * width + width // 2, y * height + 10)) for y in range(rows) for x in range(columns)]


def test_pictures_are_in_the_order_of_the_prompts(tmp_path):
    path = sheet(Images([plain(colour) for colour in COLOURS]), Sampling(tuple("abcde")), tmp_path, 500)
    assert path == tmp_path / "samples" / "step-000500.png"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert middle(path, 3, 2) == [*COLOURS, (255, 255, 255)]


def test_below_each_picture_is_its_own_prompt(tmp_path):
    """Equal prompts look equal, others do not, and all of them are dark on white."""
    images = Images([plain("red", (200, 40))] * 4)
    prompts = ("a fox", "a boat", "a fox", "")
    path = sheet(images, Sampling(prompts), tmp_path, 1)
    assert read_metadata(path)["captions"] == list(prompts)
    with Image.open(path) as found:
        pixels = np.asarray(found)
    half = pixels.shape[0] // 2
    fox, boat, again, empty = (
        part[40:] for row in (pixels[:half], pixels[half:]) for part in (row[:, :200], row[:, 200:])
    )
    np.testing.assert_array_equal(fox, again)
    assert (fox != boat).any()
    assert fox.min() < 60
    assert (empty == 255).all()


@pytest.mark.parametrize("count", [1, 2])
def test_beside_each_picture_is_its_own(count, tmp_path):
    names = []
    for number, colour in enumerate(COLOURS[2 : 2 + count]):
        Image.new("RGB", (90, 90), colour).save(tmp_path / f"{number}.png")
        names.append(str(tmp_path / f"{number}.png"))
    images = Images([plain(COLOURS[0]), plain(COLOURS[1])])
    left = [COLOURS[2], COLOURS[1 + count]]
    for prompts in (("a", "b"), ()):
        path = sheet(images, Sampling(prompts, tuple(names)), tmp_path, 1)
        assert middle(path, 4, 1) == [left[0], COLOURS[0], left[1], COLOURS[1]]


def test_captions_never_leave_their_picture():
    for text in ("word " * 40, "x" * 100, f"a {'y' * 50} b", "two\nlines\tand more", "", "one"):
        lines = wrapped(text, lambda line: len(line) <= 16)
        assert len(lines) <= LINES
        assert all(len(line) <= 16 for line in lines)
        assert "\n" not in "".join(lines)
        kept = "".join(line.removesuffix("...") for line in lines).replace(" ", "")
        left = iter("".join(text.split()))
        assert all(letter in left for letter in kept)  # in its order
    assert wrapped("a red fox in the snow", lambda line: len(line) <= 9) == ["a red fox", "in the", "snow"]
    assert wrapped("one two three four five", lambda line: len(line) <= 6) == ["one", "two", "thr..."]
    assert wrapped("long", lambda line: False) == [""]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(SfumatoError, match="cannot be written"):
        sheet(Images([plain("red")]), Sampling(("a",)), tmp_path, 1)
