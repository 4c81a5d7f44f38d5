"""The npm packages that art and names come from: exact versions, checked against their SHA-512, fetched once."""

from __future__ import annotations

import base64
import dataclasses as dc
import hashlib
import json
import os
import tarfile
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

REGISTRY = "https://registry.npmjs.org"


class Files(Protocol):
    """The files of a package by their paths, such as `Archive` reads them."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


@dc.dataclass(frozen=True)
class Package:
    """A package of the registry and who made it."""

    name: str
    version: str
    sha512: str
    licence: str
    author: str
    source: str

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def file(self) -> str:
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    package.name: package
    for package in [
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "Apache-2.0",
            "Google Inc.",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "CC-BY-4.0",
            "Twitter, Inc. and other contributors",
            "https://github.com/jdecked/twemoji",
        ),
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Package(
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
            "Apache-2.0",
            "Google Inc.",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Package(
            "unicode-emoji-json",
            "0.9.0",
            "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
            "MIT",
            "Mu-An Chiou",
            "https://github.com/muan/unicode-emoji-json",
        ),
        Package(
            "emojibase-data",
            "17.0.0",
            "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
            "MIT",
            "Miles Johnson",
            "https://github.com/milesj/emojibase",
        ),
        Package(
            "emojilib",
            "4.0.3",
            "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
            "MIT",
            "Mu-An Chiou",
            "https://github.com/muan/emojilib",
        ),
    ]
}


class Archive:
    """The files of a package's archive, with paths below its package/ folder."""

    def __init__(self, path: Path):
        self.path = path
        self._tar = tarfile.open(path)  # noqa: SIM115 - open as long as the archive is read

    @cached_property
    def _members(self) -> dict[str, tarfile.TarInfo]:
        return {member.name.partition("/")[2]: member for member in self._tar if member.isfile()}

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Raises KeyError for a file that the package does not have."""
        file = self._tar.extractfile(self._members[name])
        assert file is not None
        return file.read()


def load_json(files: Files, name: str) -> Any:
    return json.loads(files.read(name))


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sfumato-art"


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in the folder `cache`, from the registry if it is not there yet.

    Raises OSError if it cannot be fetched and ValueError if what came is not what the table above names.
    """
    path = cache / package.file
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with urllib.request.urlopen(package.url, timeout=120) as answer:
                part.write_bytes(answer.read())
            check(package, part)
            part.replace(path)
        except urllib.error.URLError as error:
            raise OSError(f"{package.url} cannot be fetched: {error.reason}.") from None
        finally:
            part.unlink(missing_ok=True)
    check(package, path)
    return path


def check(package: Package, path: Path) -> None:
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(f"{path} is not {package.name} {package.version}: its SHA-512 is {found}.")


def opened(name: str, cache: Path) -> Archive:
    """The files of the package `name`, fetched if need be."""
    return Archive(fetch(PACKAGES[name], cache))
