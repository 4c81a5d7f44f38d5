from __future__ import annotations

import json

import pytest

from sfumato.errors import FileError, SfumatoError
from sfumato.train.examples import examples

from pictures import drawing


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawing().save(folder / name)


def metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def test_metadata(tmp_path):
    pictures(tmp_path, "a.png", "below/b.png", "c.png")
    metadata(
        tmp_path, '\ufeff{"file_name": "a.png", "text": "é"}', "", {"file_name": "below/b.png", "text": ["x", "y"]}
    )
    one, other = examples(tmp_path)
    assert (one.image, one.text, one.conditioning, one.name) == (tmp_path / "a.png", "é", None, str(tmp_path / "a.png"))
    assert (other.image, other.text) == (tmp_path / "below" / "b.png", ("x", "y"))


def test_conditioning_and_other_names(tmp_path):
    metadata(tmp_path, {"file_name": "a.png", "text": "x", "conditioning_image": "b.png", "edit": "y", "from": "c.png"})
    assert examples(str(tmp_path))[0].conditioning == tmp_path / "b.png"
    other = examples(tmp_path, text_column="edit", conditioning_column="from")[0]
    assert (other.text, other.conditioning) == ("y", tmp_path / "c.png")


def test_one_text_for_all(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    assert [example.text for example in examples(tmp_path, text="a photo of sks dog")] == ["a photo of sks dog"] * 2
    metadata(tmp_path, {"file_name": "a.png"})
    assert examples(tmp_path, text="sks")[0].text == "sks"


def test_names_as_texts(tmp_path):
    pictures(tmp_path, "b/a_red__disc.png", "a.jpg", ".hidden.png", ".folder/c.png")
    (tmp_path / "notes.md").write_text("no picture")
    assert [(example.image.name, example.text) for example in examples(tmp_path)] == [
        ("a.jpg", "a"), ("a_red__disc.png", "a red disc"),
    ]  # fmt: skip


def test_text_files(tmp_path):
    pictures(tmp_path, "a.png", "b.JPG")
    (tmp_path / "a.txt").write_text("\ufeffone\n text \n", "utf-8")
    (tmp_path / "b.txt").write_text("")
    assert [example.text for example in examples(tmp_path)] == ["one text", ""]
    pictures(tmp_path, "c.png")
    with pytest.raises(FileError, match=r"1 of 3 pictures in .* have no text, such as c\.png: there is no c\.txt"):
        examples(tmp_path)


def test_a_text_file_of_something_else(tmp_path):
    """A README.txt does not make names into missing texts."""
    pictures(tmp_path, "a.png")
    (tmp_path / "README.txt").write_text("x")
    assert examples(tmp_path)[0].text == "a"


GOOD = {"file_name": "a.png", "text": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", ', "is not JSON"),
        ('"a.png"', "is no object"),
        ('{"text": "x"}', "has no 'file_name', a file's name; it has text"),
        ('{"file_name": 3, "text": "x"}', "has no 'file_name'"),
        ('{"file_name": "a.png"}', "has no 'text', the text of a.png; it has file_name"),
        ('{"file_name": "a.png", "text": null}', "has no 'text'"),
        ('{"file_name": "a.png", "text": 3}', "has 3 for a text"),
        ('{"file_name": "a.png", "text": []}', "neither a text nor a list of texts"),
        ('{"file_name": "../a.png", "text": "x"}', "names '../a.png', which is not inside of"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "not inside"),
        ('{"file_name": "b/../../a.png", "text": "x"}', "not inside"),
        ('{"file_name": "..\\\\a.png", "text": "x"}', "not inside"),
        ('{"file_name": "C:/a.png", "text": "x"}', "not inside"),
        ('{"file_name": "a.png", "text": "x", "conditioning_image": "../b.png"}', "not inside"),
        ('{"file_name": "a.png", "text": "x", "conditioning_image": "b.png"}', "in line 3 but none in line 1"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_wrong_line(tmp_path, line, message):
    metadata(tmp_path, GOOD, "", line)
    with pytest.raises(FileError, match=message) as error:
        examples(tmp_path)
    assert "metadata.jsonl line 3" in str(error.value) or "line 3" in message


def test_wrong_letters(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xe9"}')
    with pytest.raises(FileError, match=r"line 1 is not UTF-8"):
        examples(tmp_path)


def test_links_are_followed(tmp_path):
    """The hub's own cache is a folder of links that lead out of it."""
    pictures(tmp_path, "blobs/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "blobs" / "a.png")
    metadata(tmp_path / "set", GOOD)
    assert examples(tmp_path / "set")[0].image.is_file()


def test_wrong_folders(tmp_path):
    with pytest.raises(FileError, match="no pictures: it is empty"):
        examples(tmp_path)
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(FileError, match=r"none of its 1 files ends in \.png"):
        examples(tmp_path)
    with pytest.raises(FileError, match="There is no"):
        examples(tmp_path / "none")
    with pytest.raises(FileError, match="is a file"):
        examples(tmp_path / "a.doc")
    metadata(tmp_path, "")
    with pytest.raises(FileError, match="lists no pictures"):
        examples(tmp_path)
    with pytest.raises(SfumatoError, match="not a list"):
        examples([])


def test_metadata_elsewhere(tmp_path):
    pictures(tmp_path, "train/a.png")
    metadata(tmp_path / "train", GOOD)
    with pytest.raises(FileError, match=r"has no metadata\.jsonl, but .*train has; name that folder"):
        examples(tmp_path)
    (tmp_path / "train" / "metadata.jsonl").rename(tmp_path / "train" / "metadata.csv")
    with pytest.raises(FileError, match=r"metadata\.csv is not read"):
        examples(tmp_path)


def test_options_of_data_sets(tmp_path):
    pictures(tmp_path, "a.png")
    with pytest.raises(SfumatoError, match="it takes no streaming, revision"):
        examples(tmp_path, streaming=True, revision="x")
