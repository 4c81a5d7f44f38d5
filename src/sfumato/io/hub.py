"""From what a user names (a path, a hub id) to files on this disk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sfumato import embedded
from sfumato.errors import FileError
from sfumato.io.folder import NETWORKS, choose_weights

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
IN_REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)/(?P<file>.+\.(safetensors|ckpt|pt|pth|bin))")
SETTINGS = ("model_index.json", "config.json", "*/*.json", "*/merges.txt")
"""The small files of a diffusers repository; the weights are chosen one by one."""


def resolve(
    source: str | Path, choose: Callable[[Collection[str], str], list[str]], *, revision: str | None = None
) -> Path:  # fmt: skip
    """The folder or file that `source` names, downloaded into the Hugging Face cache if it is not on this disk.

    `source` is the name of something that comes with sfumato, a path, a hub id "organisation/name", or a file in a hub
    repository, "organisation/name/file"; `choose(names, source)` picks the weights to download out of a repository's
    files. Without a network the cache is used. Raises FileError if nothing is found.
    """
    piece = embedded.find(source)
    if piece is not None:
        return piece.path
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = re.sub(r"^https://huggingface\.co/|/(blob|resolve)/main(?=/)", "", str(source))
    inside = IN_REPOSITORY.fullmatch(name)
    if inside:
        names = _listing(inside["repo"], revision)
        if names is not None and inside["file"] not in names:
            near = difflib.get_close_matches(inside["file"], names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise FileError(f"The hub repository {inside['repo']} has no file {inside['file']}{hint}.")
        return _download(inside["repo"], [inside["file"]], revision, offline=names is None) / inside["file"]
    if not HUB_ID.fullmatch(name) or path.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}:
        raise FileError(f"{source} does not exist{_nearest(path)}.")
    names = _listing(name, revision)
    if names is None:
        # What of the weights is in the cache, the reader of the folder will find out.
        return _download(name, ["model_index.json", "config.json"], revision, offline=True)
    return _download(name, [*SETTINGS, *choose(names, name)], revision)


def pipeline_weights(variant: str | None) -> Callable[[Collection[str], str], list[str]]:
    """Chooses the weights of every network of a diffusers repository."""

    def choose(names: Collection[str], where: str) -> list[str]:
        if "model_index.json" not in names:
            raise FileError(f"The hub repository {where} is no diffusers model: it has no model_index.json.")
        folders = [name for name in NETWORKS if any(file.startswith(name + "/") for file in names)]
        return [pattern for folder in folders for pattern in _chosen(names, folder + "/", variant, where)]

    return choose


def component_weights(variant: str | None) -> Callable[[Collection[str], str], list[str]]:
    """Chooses the weights of a repository that holds one network (a ControlNet, an autoencoder)."""
    return lambda names, where: _chosen(names, "", variant, where)


def _chosen(names: Collection[str], prefix: str, variant: str | None, where: str) -> list[str]:
    here = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    chosen = choose_weights([name for name in here if "/" not in name], variant=variant, where=f"{where}/{prefix}")
    if not chosen.endswith(".json"):
        return [prefix + chosen]
    stem = chosen.split(".")[0]
    return [prefix + chosen, *(prefix + name for name in here if re.match(rf"{stem}[.-].*\d{{5}}-of-\d{{5}}", name))]


def _listing(repository: str, revision: str | None) -> list[str] | None:
    """The files of a hub repository; None if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # Not every failure of the network is one of the hub's own errors; they have the base of its HTTP library.
    unreachable: Any = (HfHubHTTPError.__bases__[0], OSError)
    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        found = HfApi().model_info(repository, revision=revision).siblings or []
    except GatedRepoError:
        message = f"{repository} asks you to accept its terms on the hub and to log in (hf auth login)."
        raise FileError(message) from None
    except RevisionNotFoundError:
        raise FileError(f"The hub repository {repository} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        message = f"{repository} is neither a path here nor a repository on the hub (or it is private)."
        raise FileError(message) from None
    except unreachable:
        return None
    return [file.rfilename for file in found]


def _download(repository: str, patterns: list[str], revision: str | None, offline: bool = False) -> Path:
    """The folder in the cache with the files of a repository that match; `offline` takes what is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline)
    except LocalEntryNotFoundError:
        raise FileError(
            f"{repository} is not a path on this disk, not in the download cache, and the hub cannot be reached."
        ) from None
    return Path(folder)


def _nearest(path: Path) -> str:
    """A hint at a file with a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor does the folder {path.parent})" if not path.parent.exists() else ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
