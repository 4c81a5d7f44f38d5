"""The numbers of the kernels that a machine may like otherwise: sizes of blocks, and from where on which form pays.

Those of the package were measured on three machines (benchmarks/NOTES.md). `sfumato bench --tune` measures the values
in `VALUES` on another and keeps what it finds there in a file of the cache folder, which later processes read. Kernels
ask `in_use` while they are traced, so the numbers are part of a program and nothing else has to know of them.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from sfumato.cache import cache_folder
from sfumato.errors import FileError
from sfumato.machine import features, machine

FILE = "kernels.json"
"""In the cache folder."""

MACHINE = ("processor", "cores", "jax")
"""What must be the same for measured numbers to hold."""

NEVER = 2**24
"""More places than a picture has that is not left to the compiler anyway (`convolution.LARGEST`)."""


@dc.dataclass(frozen=True)
class Table:
    """The numbers, as they come with the package. Whatever they are, the kernels compute the same."""

    bfloat16_wide: int = 0
    """1 where float32 is multiplied faster than bfloat16, which then is widened on the way into a product and narrowed
    behind it: processors may have bfloat16's fast products in a matrix unit that a virtual machine hides."""
    query_block: int = 1024
    """Queries handled at once where an attention map is large: the map of a block stays in the cache."""
    rows: int = 512
    """Places at once in a feed-forward layer: what it makes of them stays in the cache."""
    channels: int = 96
    """From how many channels on a convolution takes another form than the backend's own."""
    float32_f4: int = 1024
    """From how many places of all pictures on float32 is filtered by `winograd.F4`."""
    f4_block: int = 2**18
    """About how many values, of all channels, that handles at once, so that they stay in the cache."""
    float32_f2: int = NEVER
    """From how many places on, up to `convolution.MANY`, large kernels of float32 are filtered by `winograd.F2`.
    Its programs are longer: that of SD 1.5 takes 5 s more to be read from the cache."""
    bfloat16_f2: int = 4096
    """From how many places on bfloat16 is filtered by `winograd.F2`."""
    f2_block: int = 2**18
    """`f4_block` of that."""
    bfloat16_f2_few: int = 256
    """From how many places on it is filtered so in blocks large enough for the kernel to be read once."""


PLACES = (256, 1024, 4096, NEVER)

VALUES: Mapping[str, tuple[int, ...]] = {
    "bfloat16_wide": (0, 1), "query_block": (256, 512, 1024, 2048), "rows": (128, 256, 512, 1024, 2048),
    "channels": (64, 96, 128, 192),
    "float32_f4": PLACES, "f4_block": (2**15, 2**16, 2**17, 2**18), "float32_f2": (128, 256, 512, NEVER),
    "bfloat16_f2": PLACES, "f2_block": (2**16, 2**17, 2**18, 2**19), "bfloat16_f2_few": PLACES,
}  # fmt: skip
"""What each number may be: with each of these the kernels are tested, and no file brings in another."""

_chosen = jax.make_user_context(None)


def using(table: Table) -> AbstractContextManager[None]:
    """Inside, this table is in use, in this thread; jax knows, and traces anew what it traced with another."""
    return _chosen(table)


def in_use() -> Table:
    """The table that kernels keep to: that of `using`, otherwise what was measured here, otherwise the package's."""
    return _chosen.value or measured() or usual()


def usual() -> Table:
    """The package's numbers for this processor: they depend on whether it has an instruction for bfloat16, as far as
    that is known (benchmarks/NOTES.md). Nothing was measured on others than x86."""
    known = features() if jax.default_backend() == "cpu" else frozenset()
    return Table(bfloat16_wide=int("avx2" in known and "avx512_bf16" not in known))


@functools.cache
def measured() -> Table | None:
    """What `sfumato bench --tune` found on this machine, read once a process.

    None if there is nothing, and where jax computes on no processor. A file that does not fit is a warning.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        path = place()
        return read(path) if path is not None and path.exists() else None
    except FileError as error:
        warnings.warn(str(error), stacklevel=2)
    except (OSError, RuntimeError):  # a folder that nobody may look into; no home folder
        pass
    return None


def place() -> Path | None:
    """The file that is kept between processes, None if nothing is (`SFUMATO_CACHE=off`)."""
    folder = cache_folder()
    return folder / FILE if folder is not None else None


def here() -> dict[str, Any]:
    """The machine, as far as the numbers depend on it."""
    return {key: value for key, value in machine().items() if key in MACHINE}


def written(table: Table) -> str:
    """The contents of a file: the numbers, and where they were measured."""
    return json.dumps({"machine": here(), "numbers": dc.asdict(table)}, indent=2) + "\n"


def read(path: Path) -> Table:
    """The table of a file. Raises FileError, in a sentence, if it is damaged, has other numbers or another machine."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else {}
    numbers = found.get("numbers")
    if not isinstance(numbers, dict) or not _known(numbers):
        why = "holds no numbers for the kernels of this version"
    elif found.get("machine") != here():
        why = "was measured on another machine or with another jax"
    else:
        return Table(**numbers)
    raise FileError(f"{path} is not used: it {why}; `sfumato bench --tune` writes another, or delete it.")


def _known(numbers: Mapping[str, Any]) -> bool:
    """Whether these are all the numbers, each a value that it may have."""
    return numbers.keys() == VALUES.keys() and all(
        type(value) is int and value in VALUES[name] for name, value in numbers.items()
    )
