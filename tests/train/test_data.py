"""Batches: what is in them, in which order, and that a run goes on exactly where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from sfumato.annotators import annotate
from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.image import to_array
from sfumato.train.data import Batches, Example, buckets, examples
from sfumato.train.fit import fit

from batches import assert_same, take
from pictures import drawing

SIZES = [(48, 32), (32, 48), (40, 40), (64, 32), (33, 50), (51, 35), (40, 41)]


@pytest.fixture
def folder(tmp_path):
    """Pictures of several proportions; the mean color tells them apart."""
    for number, size in enumerate(SIZES):
        picture = drawing(*size)
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    return tmp_path


SETTINGS = {"batch": 2, "size": buckets((32, 32), step=8), "flip": True, "crop": True, "seed": 3}


def test_batch(folder):
    batch = next(Batches(examples(folder), batch=3, size=(32, 24), annotator="canny"))
    assert sorted(batch) == ["conditioning", "index", "pixels", "sizes", "text"]
    assert batch["pixels"].shape == batch["conditioning"].shape == (3, 24, 32, 3)
    assert batch["pixels"].dtype == batch["conditioning"].dtype == batch["sizes"].dtype == np.float32
    assert -1 <= batch["pixels"].min() < 0 < batch["pixels"].max() <= 1
    assert set(np.unique(batch["conditioning"])) == {0, 1}
    assert batch["text"] == [f"picture {number}" for number in batch["index"]]
    assert batch["sizes"][:, :2].tolist() == [list(SIZES[number][::-1]) for number in batch["index"]]
    assert batch["sizes"][:, 4:].tolist() == [[24, 32]] * 3


def test_picture_of_the_size_is_left_as_it_is(tmp_path):
    drawing(48, 32).save(tmp_path / "a.png")
    batch = next(Batches(examples(tmp_path), size=(48, 32), crop=True))
    np.testing.assert_array_equal(batch["pixels"][0], to_array(tmp_path / "a.png"))


@pytest.mark.parametrize("threads", [0, 1, 7])
def test_same_batches_whatever_the_threads(folder, threads):
    assert_same(
        take(Batches(examples(folder), **SETTINGS, threads=threads), 9), take(Batches(examples(folder), **SETTINGS), 9)
    )


@pytest.mark.slow
def test_same_batches_whatever_the_processes(folder):
    expected = take(Batches(examples(folder), **SETTINGS), 9)
    batches = Batches(examples(folder), **SETTINGS, workers=2)
    assert_same(take(batches, 5), expected[:5])
    state = batches.get_state()
    batches.close()
    batches = Batches(examples(folder), **SETTINGS, workers=1)
    batches.set_state(state)
    assert_same(take(batches, 4), expected[5:])
    batches.close()


@pytest.mark.slow
def test_processes_outlive_an_interrupt(folder):
    """Ctrl-C is sent to all processes of a terminal; the batches that a last step needs must still come."""
    batches, expected = (
        Batches(examples(folder), **SETTINGS, workers=1),
        take(Batches(examples(folder), **SETTINGS), 12),
    )
    seen = take(batches, 1)
    assert multiprocessing.active_children()
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    assert_same(seen + take(batches, 11), expected)
    batches.close()


def test_nothing_heavy_is_imported():
    code = (
        "import sys, sfumato.train.data; print([m for m in ('grain', 'datasets', 'cv2', 'optax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_training_is_cut_off_and_resumed(folder, tmp_path):
    """The loop itself: a run in two parts has the losses of one in one part."""

    def train(name, *stops):
        losses = []
        for steps in stops:
            batches = Batches(examples(folder), **SETTINGS)
            fit(
                lambda w, _, batch, key: (jnp.mean((batch["pixels"] - w["w"]) ** 2), {}),
                {"w": np.zeros(3, np.float32)}, batches, optax.sgd(0.1), steps=steps, folder=tmp_path / "runs" / name,
                collate=lambda batch: {"pixels": batch["pixels"]}, save_every=2, quiet=True,
                on_step=lambda step, state, metrics: losses.append(float(metrics["loss"])),
            )  # fmt: skip
            batches.close()
        return losses

    assert train("cut", 3, 7) == train("whole", 7)


def test_another_seed_is_another_order(folder):
    one, other = (Batches(examples(folder), size=(32, 32), seed=seed) for seed in (0, 1))
    assert [b["index"][0] for b in take(one, 14)] != [b["index"][0] for b in take(other, 14)]


def test_resume_at_any_batch(folder):
    batches = Batches(examples(folder), **SETTINGS)
    states, all_ = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(batches.get_state())))
        all_.append(next(batches))
    for number in range(12):
        again = Batches(examples(folder), **SETTINGS)
        again.set_state(states[number])
        assert_same(take(again, 12 - number), all_[number:])
    batches.set_state(states[4])
    assert_same(take(batches, 3), all_[4:7])


def test_augmentation_does_not_depend_on_order(folder):
    """A picture's crop in an epoch is the same in batches of one and of three."""
    options = {"size": (24, 24), "flip": True, "crop": True}
    one = take(Batches(examples(folder), **options), 7)
    three = take(Batches(examples(folder), batch=7, **options), 1)[0]
    for batch in one:
        at = three["index"].tolist().index(batch["index"][0])
        np.testing.assert_array_equal(batch["pixels"][0], three["pixels"][at])


def test_epochs_differ(folder):
    batches = take(Batches(examples(folder), size=(24, 24), flip=True, crop=True, batch=7), 4)
    assert len({b["pixels"][b["index"].tolist().index(0)].tobytes() for b in batches}) > 1


@pytest.mark.parametrize("several", [False, True])
def test_shards_are_the_rows_of_one_batch(folder, several):
    size = buckets((32, 32), step=8) if several else (32, 32)
    whole = take(Batches(examples(folder), batch=4, size=size, crop=True), 8)
    shards = [take(Batches(examples(folder), batch=2, size=size, crop=True, shard=(i, 2)), 8) for i in range(2)]
    for all_, first, second in zip(whole, *shards, strict=True):
        for key in all_:
            if key == "text":
                assert all_[key] == first[key] + second[key]
            else:
                np.testing.assert_array_equal(all_[key], np.concatenate([first[key], second[key]]))


def test_all_shards_have_the_same_state(folder):
    batches = [Batches(examples(folder), **SETTINGS, shard=(i, 2)) for i in range(2)]
    for _ in range(3):
        one, other = (next(b) for b in batches)
        assert one["pixels"].shape == other["pixels"].shape
        assert batches[0].get_state() == batches[1].get_state()


def test_conditioning_follows_flip_and_crop(tmp_path):
    """The conditioning picture is the picture itself at half the size: they must stay one over the other."""
    lines = []
    for number in range(6):
        drawing(96, 64).save(tmp_path / f"{number}.png")
        drawing(96, 64).resize((48, 32)).save(tmp_path / f"half{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "", "conditioning_image": f"half{number}.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for batch in take(Batches(examples(tmp_path), batch=6, size=(32, 48), flip=True, crop=True), 2):
        assert np.abs((batch["pixels"] + 1) / 2 - batch["conditioning"]).mean() < 0.03
        assert np.abs((batch["pixels"] + 1) / 2 - batch["conditioning"][:, :, ::-1]).mean() > 0.1
    assert len(set(batch["sizes"][:, 3])) > 1


def test_annotator_sees_what_is_trained_on(folder):
    batch = next(Batches(examples(folder), size=(32, 32), annotator="canny", annotator_options={"low": 40}, crop=True))
    seen = Image.fromarray(np.round((batch["pixels"][0] + 1) * 127.5).astype(np.uint8))
    edges = annotate("canny", seen, low=40)
    np.testing.assert_array_equal(batch["conditioning"][0], to_array(edges, signed=False))


def test_function_as_annotator(folder):
    batch = next(Batches(examples(folder), size=(32, 32), annotator=lambda picture: picture.convert("L")))
    assert np.ptp(batch["conditioning"][0], axis=-1).max() == 0


def test_several_annotators_take_turns(folder):
    """In an epoch all come as often, and a picture is seen under each of them."""
    several = {"canny": 0, "grayscale": 0}
    count = len(examples(folder))
    seen = set()
    for batch in take(Batches(examples(folder), batch=1, size=(32, 32), annotator=tuple(several)), 4 * count):
        pixels = Image.fromarray(np.round((batch["pixels"][0] + 1) * 127.5).astype(np.uint8))
        (found,) = (name for name in several if np.array_equal(
            batch["conditioning"][0], to_array(annotate(name, pixels), signed=False)))  # fmt: skip
        several[found] += 1
        seen.add((int(batch["index"][0]), found))
    assert len({*several.values()}) == 1
    assert len(seen) == 2 * count


def test_a_list_of_texts_is_drawn_from(tmp_path):
    drawing().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    assert {b["text"][0] for b in take(Batches(examples(tmp_path), size=(32, 32)), 12)} == {"one", "two"}


def test_upright_and_on_white(tmp_path):
    """A picture lying on its side by EXIF, and one that is transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(48, 32).save(tmp_path / "lying.jpg", exif=exif)
    Image.new("RGBA", (32, 48)).save(tmp_path / "nothing.png")
    batch = next(Batches(examples(tmp_path), batch=2, size=[(32, 48), (48, 32)]))
    assert batch["pixels"].shape == (2, 48, 32, 3)
    assert batch["sizes"][:, :2].tolist() == [[48, 32]] * 2
    assert (batch["pixels"][batch["text"].index("nothing")] == 1).all()


def spoil(folder, name="2.png", header=False):
    """A picture that breaks off, in the middle or at once."""
    path = folder / name
    path.write_bytes(b"no picture" if header else path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_unreadable_picture(folder, header, workers):
    spoil(folder, header=header)
    with pytest.raises(FileError, match=r"2\.png") as error:
        take(Batches(examples(folder), size=(32, 32), workers=workers), 7)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("header", [True, False])
def test_unreadable_picture_is_skipped_and_counted(folder, header):
    spoil(folder, header=header)
    batches = Batches(examples(folder), size=[(32, 32), (48, 32)], skip_broken=True, batch=2)
    seen = take(batches, 8)
    assert all(2 not in batch["index"] for batch in seen)
    assert list(batches.skipped) == [str(folder / "2.png")]
    again = Batches(examples(folder), size=[(32, 32), (48, 32)], skip_broken=True, batch=2)
    again.set_state(batches.get_state())
    assert again.skipped == batches.skipped
    assert_same(take(again, 2), take(batches, 2))


def test_goes_on_after_an_error(folder):
    """The batch that failed is tried again, and comes once the picture is there."""
    good = (folder / "2.png").read_bytes()
    expected = take(Batches(examples(folder), size=(32, 32)), 7)
    batches = Batches(examples(folder), size=(32, 32))
    spoil(folder)
    seen = []
    with pytest.raises(FileError):
        seen += (next(batches) for _ in range(7))
    with pytest.raises(FileError):
        next(batches)
    (folder / "2.png").write_bytes(good)
    assert_same([*seen, *take(batches, 7 - len(seen))], expected)


def test_all_unreadable(folder):
    for number in range(len(SIZES)):
        spoil(folder, f"{number}.png")
    with pytest.raises(FileError, match=r"7 examples one after another cannot be read; the last: .*\.png"):
        next(Batches(examples(folder), size=(32, 32), skip_broken=True))
    for number in range(len(SIZES)):
        spoil(folder, f"{number}.png", header=True)
    with pytest.raises(FileError, match="None of the 7 examples can be read"):
        Batches(examples(folder), size=(32, 32), skip_broken=True)


def test_conditioning_of_other_proportions(tmp_path):
    drawing(48, 32).save(tmp_path / "a.png")
    drawing(32, 32).save(tmp_path / "b.png")
    found = [Example(tmp_path / "a.png", "", "a.png", tmp_path / "b.png")]
    with pytest.raises(FileError, match=r"a\.png has 48x32 pixels, but its conditioning picture 32x32"):
        Batches(found, size=(32, 32))


def test_only_some_have_a_conditioning_picture(folder):
    one, other = examples(folder)[:2]
    found = [one, Example(other.image, "", "other", other.image)]
    with pytest.raises(SfumatoError, match="all or none must have one"):
        next(Batches(found, size=(32, 32), batch=2))


def test_state_of_other_examples(folder):
    state = Batches(examples(folder), **SETTINGS).get_state()
    with pytest.raises(MismatchError, match="number of examples was 7 and is 6 now"):
        Batches(examples(folder)[1:], **SETTINGS).set_state(state)
    with pytest.raises(MismatchError, match="its seed was 3 and is 4 now"):
        Batches(examples(folder), **SETTINGS | {"seed": 4}).set_state(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch is a whole number from 1 on, not 0"),
        ({"seed": -1}, "seed is a whole number from 0 on"),
        ({"size": (30, 30)}, "multiples of 8; the nearest sizes are 24x24 and 32x32"),
        ({"size": 512.0}, "size"),
        ({"shard": (2, 2)}, "A shard is"),
        ({"annotator": "cany"}, "did you mean canny"),
        ({"annotator": "canny", "annotator_options": {"low": -1}}, "low is a whole number from 0 to"),
        ({"annotator_options": {"low": 1}}, "given by its name"),
        ({"annotator": ("canny", "grayscale"), "annotator_options": {"low": 1}}, "is the only one"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings(folder, settings, message):
    with pytest.raises(SfumatoError, match=message):
        Batches(examples(folder), **{"size": (32, 32)} | settings)


def test_no_examples():
    with pytest.raises(SfumatoError, match="no examples"):
        Batches([], size=(32, 32))
