"""Data sets of Hugging Face `datasets`, from disk."""

from __future__ import annotations

import collections
import io
import json

import numpy as np
import pytest

from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.train.data import Batches, buckets, examples

from batches import assert_same, take
from pictures import drawing

datasets = pytest.importorskip("datasets")

SIZES = [(48, 32), (32, 48), (40, 40), (64, 32), (33, 50)] * 4
SETTINGS = {"batch": 2, "size": buckets((32, 32), step=8), "flip": True, "crop": True, "seed": 3}


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Nothing is written into the home of who runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def encoded(width, height):
    file = io.BytesIO()
    drawing(width, height).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(sizes=SIZES, **columns):
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    columns = {"image": [encoded(*size) for size in sizes], "text": [f"row {n}" for n in range(len(sizes))]} | columns
    features |= {name: datasets.Image() for name in columns.keys() - features.keys()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def parquet(tmp_path):
    """A folder of two parquet files."""
    for number in range(2):
        table().select(range(10 * number, 10 * number + 10)).to_parquet(tmp_path / "set" / f"train-{number}.parquet")
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True])
def test_all_ways_are_the_same(parquet, tmp_path, streaming):
    table().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table(), "test": table(SIZES[:2])}).save_to_disk(tmp_path / "splits")
    made = table().to_iterable_dataset() if streaming else table()
    expected = take(Batches(examples(made), **SETTINGS, window=8), 12)
    for folder in (parquet, tmp_path / "saved", tmp_path / "splits"):
        batches = Batches(examples(folder, streaming=streaming), **SETTINGS, window=8)
        assert_same(take(batches, 12), expected)
    with pytest.raises(SfumatoError, match="has no split 'val'; it has train, test"):
        examples(tmp_path / "splits", split="val", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_and_metadata_by_datasets(tmp_path, streaming):
    """A folder of pictures as `datasets` reads it is the same as read by ourselves."""
    drawing().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    theirs = examples("imagefolder", data_dir=str(tmp_path), streaming=streaming)
    assert_same(take(Batches(theirs, size=(32, 32)), 1), take(Batches(examples(tmp_path), size=(32, 32)), 1))


def test_other_columns(tmp_path):
    pictures = [encoded(48, 32)] * 2
    made = table(SIZES[:1] * 2, edited=pictures, conditioning_image=pictures)
    batch = next(Batches(examples(made), size=(32, 32)))
    assert_same([batch], take(Batches(examples(made, image_column="edited"), size=(32, 32)), 1))
    assert batch["conditioning"].shape == (1, 32, 32, 3)
    assert next(Batches(examples(made, text="sks"), size=(32, 32)))["text"] == ["sks"]
    for streaming in (made, made.to_iterable_dataset()):
        with pytest.raises(FileError, match="no column 'caption'; it has image, text, edited, conditioning_image"):
            examples(streaming, text_column="caption")
        with pytest.raises(FileError, match="no column 'depth'"):
            examples(streaming, conditioning_column="depth")


@pytest.mark.parametrize("several", [False, True])
def test_a_stream_goes_on_at_any_batch(parquet, several):
    settings = SETTINGS | ({} if several else {"size": (32, 32)})
    stream = examples(parquet, streaming=True)
    batches, states, seen = Batches(stream, **settings, window=7), [], []
    for _ in range(24):
        states.append(json.loads(json.dumps(batches.get_state())))
        seen.append(next(batches))
    for number in (0, 1, 3, 4, 5, 9, 10, 11, 20, 23):
        again = Batches(stream, **settings, window=7)
        again.set_state(states[number])
        assert_same(take(again, 24 - number), seen[number:])
        again.close()
    with pytest.raises(MismatchError, match="its seed was 3 and is 4 now"):
        Batches(stream, **settings | {"seed": 4}).set_state(states[0])
    with pytest.raises(MismatchError, match="its window was 7 and is 8 now"):
        Batches(stream, **settings, window=8).set_state(states[0])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("window", [1, 6, 50])
def test_every_row_of_a_stream_once_in_each_epoch(parquet, several, window):
    size = SETTINGS["size"] if several else (32, 32)
    batches = take(Batches(examples(parquet, streaming=True), batch=4, size=size, window=window), 26)
    # A window of 50 rows is 13 batches and spans several epochs; smaller ones end with them.
    counts = collections.Counter(int(number) for batch in batches for number in batch["index"])
    assert sum(counts.values()) == 104
    assert set(counts.values()) <= {5, 6}
    assert batches[0]["index"].tolist() != sorted(batches[0]["index"])


def test_shards_of_a_stream_are_the_rows_of_one_batch(parquet):
    stream = examples(parquet, streaming=True)
    whole = take(Batches(stream, **SETTINGS | {"batch": 4}, window=12), 8)
    shards = [take(Batches(stream, **SETTINGS, window=12, shard=(i, 2)), 8) for i in range(2)]
    for all_, first, second in zip(whole, *shards, strict=True):
        assert all_["text"] == first["text"] + second["text"]
        np.testing.assert_array_equal(all_["pixels"], np.concatenate([first["pixels"], second["pixels"]]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("broken", [{"bytes": b"no picture", "path": None}, None])
def test_broken_rows(streaming, several, broken):
    made = table(image=[broken if number == 3 else encoded(*size) for number, size in enumerate(SIZES)])
    made = made.to_iterable_dataset() if streaming else made
    settings = SETTINGS | ({} if several else {"size": (32, 32)})
    with pytest.raises(FileError, match="Row 3 of the data set: "):
        take(Batches(examples(made), **settings, window=8), 10)
    batches = Batches(examples(made), **settings, window=8, skip_broken=True)
    seen = take(batches, 20)
    assert list(batches.skipped) == ["Row 3 of the data set"]
    assert all(3 not in batch["index"] for batch in seen)


def test_missing_texts(tmp_path):
    made = table(text=[None] * len(SIZES))
    with pytest.raises(FileError, match="Row 0 of the data set has None for a text"):
        next(Batches(examples(made.to_iterable_dataset()), size=(32, 32)))


def test_wrong_data_sets(tmp_path):
    with pytest.raises(SfumatoError, match="has no rows"):
        examples(table([]))
    with pytest.raises(SfumatoError, match="has no rows"):
        next(Batches(examples(table().to_iterable_dataset().take(0)), size=(32, 32)))
    with pytest.raises(SfumatoError, match="has the splits train; pass one of them"):
        examples(datasets.DatasetDict(train=table()))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(SfumatoError, match=r"The data set .*set cannot be loaded"):
        examples(tmp_path / "set")


@pytest.mark.slow
def test_processes_read_a_data_set(parquet):
    expected = take(Batches(examples(parquet), **SETTINGS), 4)
    batches = Batches(examples(parquet), **SETTINGS, workers=1)
    assert_same(take(batches, 4), expected)
    batches.close()
