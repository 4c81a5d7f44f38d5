"""Every kind of broken file gets one sentence, and nothing in it is run."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from sfumato.errors import FileError
from sfumato.io.broken import human, line_endings_changed, missing, plain, sniff
from sfumato.io.tensors import open_tensors

from broken_files import BROKEN, MARK, TENSORS, Broken, crlf


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_one_sentence_for_each(broken: Broken, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = broken.make(folder)
    with pytest.raises(FileError) as caught:
        open_tensors(path)
    message = str(caught.value)
    for words in broken.words:
        assert words in message
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert str(folder) in message, "the sentence says which file"
    said = message.replace(str(folder), "")
    assert len(re.findall(r"[.?] [A-Z]", said)) == 0, "one sentence"
    assert not (folder / MARK).exists()


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(TENSORS))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the owner of the test process may be root, whom no mode stops
    with pytest.raises(FileError, match=r"a\.safetensors cannot be read: Permission denied\."):
        open_tensors(path)


def test_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(FileError, match=r"is a link to .*blob, which is not there"):
        open_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("seed", range(3))
def test_untouched_data_is_not_taken_for_text(seed: int) -> None:
    data = np.random.default_rng(seed).bytes(1 << 21)
    assert line_endings_changed(data) is None
    assert line_endings_changed(bytes(1 << 21)) is None
    assert "CR LF" in (line_endings_changed(crlf(data)) or "")
    assert "line feed" in (line_endings_changed(data.replace(b"\r\n", b"\n")) or "")


def test_sniffing_a_large_text_cut_within_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(("x" + "ä" * 4000).encode())
    assert sniff(path) == "text"


def test_numbers_in_words() -> None:
    assert [human(size) for size in (3, 999, 1000, 999_900, 4_265_146_304, 5 * 10**12)] == [
        "3 bytes", "999 bytes", "1 kB", "1 MB", "4.27 GB", "5 TB"]  # fmt: skip
    assert plain("a\x1b[31mb") == "a\\x1b[31mb"
    assert len(plain("x" * 999)) == 160
    assert "has no such file" in missing(Path("/zzzz-not-there"))
