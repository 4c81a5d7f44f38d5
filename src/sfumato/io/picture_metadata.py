"""How a picture was made, inside its file: as JSON of our own, and as the line that other tools read.

The second is the `parameters` of AUTOMATIC1111's web UI: the prompt, a line that starts with "Negative prompt:", and
a last line of "Key: value" pairs. A PNG has both as text chunks, JPEG and WebP in EXIF: the line as UserComment, where
others look for it, and the JSON as MakerNote, which is each maker's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import FileError, SfumatoError

CHUNK, FOREIGN_CHUNK = "sfumato", "parameters"
EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
UNICODE = b"UNICODE\0"
MAKER = b"sfumato\0"

NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
FEWEST = 3
"""Pairs that a last line must have to be settings and not a prompt."""
LONGEST = 50_000
"""Characters that such a line may have."""


def _size(text: str) -> list[int]:
    width, height = text.split("x")
    return [int(width), int(height)]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


SETTINGS: Mapping[str, tuple[str, Callable[[str], Any], Callable[[Any], Any]]] = {
    "Steps": ("steps", int, str),
    "Sampler": ("sampler", str, str),
    "CFG scale": ("guidance", float, _number),
    "Seed": ("seed", int, str),
    "Size": ("size", _size, lambda size: "{}x{}".format(*size)),
    "Denoising strength": ("strength", float, _number),
    # They count the layers that are used from the end, we those that are left out.
    "Clip skip": ("clip_skip", lambda text: int(text) - 1, lambda skip: skip + 1),
}
"""By the name in other tools: the name here, how the value is read, and how it is written."""


def to_json(metadata: Mapping[str, Any]) -> str:
    """The metadata as ASCII JSON. Raises SfumatoError for a value that has no such form."""
    return json.dumps(metadata, default=_plain)


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype == object:
        raise SfumatoError(f"The metadata of a picture cannot hold a {type(value).__name__}.")
    return (array if array.dtype.kind in "biufU" else array.astype(np.float32)).tolist()


def to_parameters(metadata: Mapping[str, Any]) -> str:
    """The metadata as other tools read it: what they know by name, and our version."""
    settings, lines = metadata.get("settings") or {}, [str(metadata.get("prompt") or "")]
    if metadata.get("negative"):
        lines.append(f"{NEGATIVE} {metadata['negative']}")
    pairs = {key: write(settings[ours]) for key, (ours, _, write) in SETTINGS.items() if settings.get(ours) is not None}
    if metadata.get("model"):
        pairs["Model"] = metadata["model"]
    version = (metadata.get("versions") or {}).get("sfumato")
    pairs["Version"] = f"sfumato {version}" if version else "sfumato"
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def from_parameters(text: str) -> dict[str, Any]:
    """What `parameters` text says, under our names: prompt, negative, settings, model.

    A setting of a name that we have not keeps its name and stays text.
    """
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last) if len(last) < LONGEST else []
    if len(pairs) < FEWEST:
        lines, pairs = [*lines, last], []
    start = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:])[len(NEGATIVE) :]
    settings: dict[str, Any] = {}
    for key, value in pairs:
        name, convert, _ = SETTINGS.get(key, (key, str, str))
        value = _unquoted(value.strip())
        try:
            settings[name] = convert(value)
        except ValueError:
            settings[key] = value
    found = {"prompt": prompt.strip(), "negative": negative.strip(), "settings": settings}
    model = settings.pop("Model", None)
    return found | ({} if model is None else {"model": model})


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def save_options(metadata: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What PIL's `save` needs to put the metadata into a file of the format `kind`."""
    own = to_json(metadata)
    text = to_parameters(json.loads(own)).encode("utf-8", "replace").decode()
    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_text(FOREIGN_CHUNK, text)
        chunks.add_text(CHUNK, own)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    ifd = exif.get_ifd(EXIF_IFD)
    ifd[USER_COMMENT] = UNICODE + text.encode("utf-16-be")
    ifd[MAKER_NOTE] = MAKER + own.encode()
    data = exif.tobytes()
    if len(data) > 65533:
        raise SfumatoError(f"The metadata has {len(data)} bytes and a {kind} file takes 65533; a PNG takes all.")
    return {"exif": data}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How a picture was made, from its file; {} if the file does not tell.

    Reads what sfumato wrote, and otherwise the `parameters` of AUTOMATIC1111's web UI and others like it, as a dict of
    "prompt", "negative", "settings" (steps, sampler, guidance, seed, size, strength, clip_skip) and "model". Raises
    FileError for what is no picture.
    """
    try:
        with Image.open(path) as picture:
            texts = getattr(picture, "text", {})
            ifd = {} if texts else picture.getexif().get_ifd(EXIF_IFD)
    except FileNotFoundError:
        raise FileError(f"{path} is not there.") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        known = not isinstance(error, Image.UnidentifiedImageError)
        raise FileError(f"{path} cannot be read as a picture{f' ({error})' if known else ''}.") from None
    own, foreign = texts.get(CHUNK), texts.get(FOREIGN_CHUNK)
    note, comment = ifd.get(MAKER_NOTE), ifd.get(USER_COMMENT)
    if isinstance(note, bytes) and note.startswith(MAKER):
        own = note[len(MAKER) :].decode("utf-8", "replace")
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        foreign = comment[len(UNICODE) :].decode("utf-16-be", "replace")
    try:
        value = json.loads(own) if own else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return from_parameters(foreign) if foreign else {}
