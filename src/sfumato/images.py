"""Results: pictures that know how they were made."""

from __future__ import annotations

import dataclasses as dc
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sfumato import image
from sfumato.errors import SfumatoError
from sfumato.io.picture_metadata import save_options


@dc.dataclass(frozen=True, eq=False)
class Picture:
    """One picture."""

    array: UInt8[np.ndarray, "H W 3"] = dc.field(repr=False)
    metadata: Mapping[str, Any] = dc.field(default_factory=dict)
    """How it was made: "prompt", "negative", "settings", "model", "controls", "versions"."""

    @property
    def pil(self) -> Image.Image:
        """The picture as PIL has it."""
        return Image.fromarray(np.ascontiguousarray(self.array))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.array.shape[1], self.array.shape[0]

    def save(self, path: str | Path) -> Path:
        """Writes a PNG, JPEG or WebP file by the name's ending, with the metadata inside, and returns the path.

        The file appears only when it is complete, in the place of an older one; missing folders are made. Raises
        SfumatoError for another ending, or a place that cannot be written to.
        """
        return image.write(self.pil, path, **save_options(self.metadata, image.format_of(path)))

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.pil.save(file, "PNG", **save_options(self.metadata, "PNG"))
        return file.getvalue()


class Images(Sequence[Picture]):
    """The pictures of one run, in the order of their seeds."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = tuple(pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> Picture | Images:
        return Images(self.pictures[index]) if isinstance(index, slice) else self.pictures[index]

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"Images({', '.join('{}x{}'.format(*picture.size) for picture in self)})"

    def grid(self, columns: int | None = None) -> Picture:
        """All of them on one sheet, whose metadata are the first one's with all seeds. Raises SfumatoError for none,
        or less than one column."""
        sheet = image.grid([picture.pil for picture in self], columns)
        seeds = [(picture.metadata.get("settings") or {}).get("seed") for picture in self]
        return Picture(np.asarray(sheet), {**self[0].metadata, "grid": {"seeds": seeds, "columns": columns}})

    def save(self, pattern: str | Path) -> list[Path]:
        """Writes every picture as `Picture.save` does, under the names that `names` says, and returns the paths."""
        return [picture.save(name) for picture, name in zip(self, self.names(pattern), strict=True)]

    def names(self, pattern: str | Path) -> list[Path]:
        """The file of every picture.

        `pattern` may hold {index}, which counts from 0, and {seed}, with a format as in {index:03}; without either,
        the number is put before the ending if there is more than one picture. Raises SfumatoError for another field,
        another ending than `Picture.save` writes, or if two pictures would get the same name.
        """
        pattern = Path(pattern)
        names = [self._name(pattern, number) for number in range(len(self))]
        if len({*names}) < len(names):
            raise SfumatoError(f"{pattern} gives several pictures the same name; put {{index}} into it.")
        for name in names:
            image.format_of(name)
        return names

    def _name(self, pattern: Path, number: int) -> Path:
        if "{" not in str(pattern):
            return pattern if len(self) == 1 else pattern.with_stem(f"{pattern.stem}-{number}")
        seed = (self[number].metadata.get("settings") or {}).get("seed")
        try:
            return Path(str(pattern).format(index=number, seed=seed))
        except (LookupError, ValueError, TypeError, AttributeError):
            raise SfumatoError(f"{pattern} is no pattern for names: it may hold {{index}} and {{seed}}.") from None

    def _repr_png_(self) -> bytes | None:
        return self.grid()._repr_png_() if self.pictures else None
