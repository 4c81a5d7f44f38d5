"""Recognising files by their first bytes, and saying what a file is that holds no tensors."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from sfumato.errors import FileError

HEAD = 4096
"""Bytes that are looked at to tell what a file is."""

MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", "a GGUF file; sfumato reads .safetensors and torch's .ckpt, .pt, .pth and .bin"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow weights); get the .safetensors version of the model"),
    (0, b"\x93NUMPY", "a NumPy array without names; weights come as .safetensors or torch files"),
    (4, b"TFL3", "a TensorFlow Lite model; get the .safetensors version of the model"),
    (257, b"ustar", "a tar archive, the form that torch wrote before version 0.1.10 or a packed folder; unpack it, or "
                    "load it with torch and save it again"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"%PDF", "a PDF document"),
)  # fmt: skip
"""Where in a file (byte) which bytes stand, and what it then is."""

LFS = b"version https://git-lfs.github.com/spec/"


def sniff(path: Path) -> str:
    """What the file's first bytes say it is: "safetensors", "zip", "pickle", "json" or "text".

    Raises FileError with one sentence if there is no such file, it cannot be read, or it is one of the known things
    that hold no tensors (an empty file, a git-lfs pointer, a web page, an archive, a picture).
    """
    head = _head(path)
    size = path.stat().st_size
    if not head:
        raise FileError(f"{path} is empty (0 bytes); download it again.")
    if not head.strip(b"\0"):
        raise FileError(f"{path} begins with {len(head)} zero bytes: the download reserved its room and did not "
                        "finish; download it again.")  # fmt: skip
    if head.startswith(LFS):
        raise FileError(_lfs(path, head))
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
        raise FileError(f"{path} is a web page and not weights ({size} bytes{_title(head)}); the link led to a page, "
                        "perhaps a login, so fetch the file itself.")  # fmt: skip
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    for offset, magic, what in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            raise FileError(f"{path} is {what}.")
    # Eight bytes of length, then JSON. The length is checked by the reader, so that it can say what is wrong with it.
    if head[8:9] == b"{" and not _is_text(head[:8]):
        return "safetensors"
    if head[0] == 0x80:
        return "pickle"
    if _is_text(head):
        return "json" if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in b"{[" else "text"
    raise FileError(f"{path} begins with {head[:8].hex(' ')}, which is neither safetensors nor a file that torch "
                    "saves; it is damaged or of another program.")  # fmt: skip


def text_stub(path: Path) -> str:
    """The sentence for a file of text in which weights were looked for."""
    words = " ".join(_head(path)[:400].decode("utf-8", "replace").split())
    shown = words if len(words) <= 60 else words[:57] + "..."
    return f"{path} holds text and not weights ({path.stat().st_size} bytes: {shown!r}); fetch the file itself."


def line_endings_changed(data: bytes) -> str | None:
    """How a transfer in text mode has changed these binary bytes, if it has; None if they look untouched."""
    feeds, returns, pairs = data.count(b"\n"), data.count(b"\r"), data.count(b"\r\n")
    if feeds >= 12 and pairs == feeds:
        return "every line feed in it has become CR LF"
    # In random bytes there would be this many pairs by chance.
    if pairs == 0 and feeds * returns / max(1, len(data)) > 12:
        return "every CR LF in it has become a line feed"
    return None


def text_mode(path: Path, data: bytes) -> str | None:
    """The sentence for a file that a transfer in text mode has damaged; None if it was not that."""
    how = line_endings_changed(data)
    if how is None:
        return None
    return f"{path} is damaged: {how}, so it was sent or committed as text; fetch it again as binary."


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise FileError(f"{path} is a folder and not a file of tensors; name a file in it.")
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is a device or a pipe and not a file.")
        with path.open("rb") as file:
            return file.read(HEAD)
    except FileNotFoundError:
        raise FileError(missing(path)) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None


def missing(path: Path) -> str:
    """The sentence for a path that is not there, with the nearest names that are."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there."
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return f"There is no {path}: {folder} has no {path.relative_to(folder).parts[0]}."
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"There is no {path}; " + (f"did you mean {' or '.join(near)}?" if near else f"{folder} has no such file.")


def _lfs(path: Path, head: bytes) -> str:
    size = re.search(rb"size (\d+)", head)
    real = f" of {human(int(size[1]))}" if size else ""
    return (f"{path} is a git-lfs pointer, not the file{real} itself; run `git lfs pull` in that repository or "
            "download the file from its page.")  # fmt: skip


def human(size: int | float) -> str:
    """A number of bytes in words, such as 3.4 GB."""
    if size < 1000:
        return f"{size:.0f} bytes"
    power = next((n for n in (1, 2, 3) if size < 999.5 * 1000**n), 4)
    return f"{size / 1000**power:.3g} {'kMGT'[power - 1]}B"


def plain(name: str) -> str:
    """A name out of a file in a form that is safe to print: what is not printable is escaped, what is long is cut."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= 160 else shown[:157] + "..."


def _title(head: bytes) -> str:
    found = re.search(rb"<title[^>]*>\s*(.{1,80}?)\s*<", head, re.IGNORECASE | re.DOTALL)
    return f", titled {found[1].decode('utf-8', 'replace')!r}" if found else ""


def _is_text(head: bytes) -> bool:
    try:
        words = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        words = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in words)
