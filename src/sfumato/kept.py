"""Traced programs are kept between processes: a later one neither traces nor lowers them, but reads a file.

jax keeps what the compiler makes (`sfumato.cache`), which leaves Python's share of a start: tracing a network and
writing it down for the compiler. Its result, StableHLO by `jax.export`, lies beside the compiled programs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from sfumato import compiler
from sfumato.cache import enabled_folder
from sfumato.errors import SfumatoError
from sfumato.fingerprint import Unstable, fingerprint
from sfumato.image import write_atomically
from sfumato.models.kernels.fused import CALLS
from sfumato.models.kernels.table import in_use

MOST = 100
"""Programs that are kept; one has a third of a megabyte. Of more, those go that were not used for longest."""


class Ways(NamedTuple):
    """The two ways in which a function is compiled."""

    plain: Any
    """The ordinary one."""
    recalled: Any
    """The same with the program of the disk inside: jax finds it again as it finds a trace."""


class Kept:
    """`jax.jit(function, **options)`, whose program is read from disk where a former process has left it.
    With `top` the compiler is told what `sfumato.compiler` has, for functions that no other program calls.

    Arguments are given by position. What `function` returns is arrays, in tuples, lists and dictionaries if there are
    several. A call goes the ordinary way where compiled programs are not kept or several devices are at hand; if its
    arrays are being traced (what is read cannot be differentiated or vectorized); and if something in the program has
    no stable name (`sfumato.fingerprint`), such as a network, control or sampler of the user's own.
    """

    def __init__(self, function: Callable[..., Any], *, top: bool = False, **options: Any):
        self.function, self.top, self.options = function, top, options
        functools.update_wrapper(self, function)
        self.prepared: dict[Any, threading.Thread] = {}
        self.ways = functools.cache(self._compiled)

    def _compiled(self, light: bool) -> Ways:
        """Both ways, for arguments of few numbers or of many (`compiler.LIGHT`)."""
        recalled = functools.wraps(self.function)(lambda *args: self._recalled(args))
        # What comes out of such a program is bound to its device. With a place for all that goes in, too, it is one
        # program whether an argument is bound or not.
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        compiled = functools.partial(
            jax.jit, compiler_options=compiler.options(light) if self.top else None, **self.options
        )
        return Ways(compiled(self.function), compiled(recalled, in_shardings=place))

    def __call__(self, *args: Any) -> Any:
        return self.way(*args)(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As of `jax.jit`."""
        return self.way(*args).lower(*args)

    def prepare(self, *args: Any) -> Callable[[], None]:
        """Compiles in the background for a call with such arguments, which is to come after what this gives: it waits.
        Of arrays, `jax.ShapeDtypeStruct`s will do. Costs nothing the second time.

        On processors alone: elsewhere compilers try kernels out on a device, which must not be busy then. In vain under
        settings of jax that hold in one thread, such as another precision: then the call compiles as ever.
        """
        leaves, tree = jax.tree.flatten(args)
        kind = tree, tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves)
        if kind not in self.prepared and jax.default_backend() == "cpu":
            self.prepared[kind] = threading.Thread(target=_compile, args=(self.way(*args), args))
            self.prepared[kind].start()
        return self.prepared[kind].join if kind in self.prepared else lambda: None

    def way(self, *args: Any) -> Any:
        """The one of `ways` that suits such arguments: for a caller with many calls of one kind."""
        leaves = jax.tree.leaves(args)
        ways = self.ways(compiler.is_light(leaves))
        if enabled_folder() is None or jax.device_count() > 1:
            return ways.plain
        here = {jax.local_devices()[0]}
        for leaf in leaves:
            if _traced(leaf) or (isinstance(leaf, jax.Array) and leaf.devices() != here):
                return ways.plain
        return ways.recalled

    def _recalled(self, args: tuple[Any, ...]) -> Any:
        """`function(*args)` in a trace, by the program on disk; without one it is made and left there."""
        leaves, tree = jax.tree.flatten(args)
        folder, program = enabled_folder(), None
        with contextlib.suppress(Unstable):
            key = fingerprint(self, in_use(), tree, [jax.typeof(leaf) if _traced(leaf) else leaf for leaf in leaves])
            if folder is not None:
                path = folder / "traced" / f"{self.function.__name__}-{key}"
                program = _read(path) or self._made(leaves, tree, path)
        return program.call(*filter(_traced, leaves)) if program else self.function(*args)

    def _made(self, leaves: list[Any], tree: Any, path: Path) -> jax.export.Exported | None:
        """The program of these arguments, now on disk; None for one with a part that cannot be written down."""

        def flat(*arrays: Any) -> Any:
            # Flat, because a file has names for lists and tuples, and none for networks.
            given = iter(arrays)
            return self.function(*tree.unflatten(next(given) if _traced(leaf) else leaf for leaf in leaves))

        kinds = map(jax.typeof, filter(_traced, leaves))
        shapes = [jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type) for kind in kinds]
        traced = jax.jit(flat)
        traced.trace(*shapes)  # what the function refuses, it refuses here; jax remembers the trace
        # Those that jax promises to its own version alone will do: a program's name has the version.
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CALLS]
        try:
            program = jax.export.export(traced, disabled_checks=checks)(*shapes)
        except (ValueError, NotImplementedError):  # a call into this process, or of a library that may change
            return None
        content = bytes(program.serialize())
        _write(path, content)
        return jax.export.deserialize(bytearray(content))  # jax keeps what is called, and `program` keeps its trace


def _compile(way: Any, args: tuple[Any, ...]) -> None:
    with contextlib.suppress(Exception):  # the call that this is for will raise it
        way.lower(*args).compile()


def _traced(leaf: Any) -> bool:
    return isinstance(leaf, Tracer)


def _read(path: Path) -> jax.export.Exported | None:
    """The program in a file; None if there is none or not a whole one."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    check, program = content[:32], content[32:]
    return jax.export.deserialize(bytearray(program)) if hashlib.sha256(program).digest() == check else None


def _write(path: Path, content: bytes) -> None:
    """Leaves a program for later processes, and drops what is too many. A full disk is a warning."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)  # as of the compiled ones
        write_atomically(path, lambda file: file.write(hashlib.sha256(content).digest() + content))
    except (OSError, SfumatoError) as error:
        warnings.warn(f"A traced program is not kept ({error}).", stacklevel=2)
    with contextlib.suppress(OSError):  # another process may be dropping the same ones
        for each in sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-MOST]:
            each.unlink()
