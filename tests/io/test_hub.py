"""The hub, played by a server on this machine that serves folders made by diffusers."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

import sfumato

from models.tiny import CONTROLNETS
from oracle import seeded
from pipelines import torch_pipeline

COMMIT = "0123456789012345678901234567890123456789"


class Hub(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def do_GET(self):
        self.reply(body=True)

    def do_HEAD(self):
        self.reply(body=False)

    def reply(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            return self.api(path.removeprefix("api/models/"))
        organisation, name, _, _, *rest = path.split("/")
        file = self.root / organisation / name / "/".join(rest)
        if not file.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        self.asked.append("/".join(rest))
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(200, headers, data, body)

    def api(self, path: str) -> None:
        organisation, name, *rest = path.split("/")
        if name == "gated":
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        folder = self.root / organisation / name
        if not folder.is_dir():
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if rest and rest[-1] not in ("main", COMMIT):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        names = [str(p.relative_to(folder)) for p in files]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                for n, p in zip(names, files, strict=True)
            ]
            return self.send(200, {}, json.dumps(entries).encode())
        info = {"id": f"{organisation}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        return self.send(200, {}, json.dumps(info).encode())

    def send(self, status: int, headers: dict[str, str], data: bytes = b"", body: bool = True) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an empty store, and an empty cache; the value is its handler class with `root` and `asked`."""
    from huggingface_hub import constants

    handler = type("OneHub", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    handler.server = server
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(hub, tmp_path):
    """A tiny SD 1.x model on the hub, in float32 and with a variant "fp16", and files that nobody should download."""
    pipeline, place = torch_pipeline("sd1", tmp_path), hub.root / "someone" / "tiny-sd"
    pipeline.save_pretrained(place)
    pipeline.save_pretrained(place, variant="fp16")
    pipeline.save_pretrained(place, safe_serialization=False)
    (place / "README.md").write_text("a card")
    (place / "safety_checker").mkdir()
    (place / "safety_checker/model.safetensors").write_bytes(b"large")
    return place


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_model_is_downloaded_without_what_it_does_not_need(hub, published):
    model = sfumato.load("someone/tiny-sd")
    same(model.unet, sfumato.load(published).unet)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.asked
    strange = [n for n in hub.asked if n.endswith((".bin", ".md")) or "fp16" in n or "safety" in n]
    assert not strange


def test_a_variant_and_the_cache_without_a_network(hub, published):
    from huggingface_hub import constants

    sfumato.load("someone/tiny-sd", variant="fp16", revision="main")
    assert any("fp16" in name for name in hub.asked)
    hub.server.shutdown()
    hub.server.server_close()
    constants.ENDPOINT = "http://127.0.0.1:9"
    same(sfumato.load("someone/tiny-sd", variant="fp16").unet, sfumato.load(published).unet)
    with pytest.raises(sfumato.FileError, match="not in the download cache, and the hub cannot be reached"):
        sfumato.load("someone/another")


def test_a_controlnet_as_repository_and_as_single_file(hub):
    from diffusers import ControlNetModel

    place = hub.root / "someone" / "net"
    seeded(lambda: ControlNetModel(**CONTROLNETS["sd1"])).save_pretrained(place)
    (place / "files").mkdir()
    shutil.copy(place / "diffusion_pytorch_model.safetensors", place / "files/control_sd15_canny.safetensors")
    net = sfumato.load_controlnet("someone/net")
    same(net, sfumato.load_controlnet(place))
    url = "https://huggingface.co/someone/net/blob/main/files/control_sd15_canny.safetensors"
    for name in ("someone/net/files/control_sd15_canny.safetensors", url):
        # A lone file does not tell its number of heads, and the tiny net does not have the usual one.
        single = sfumato.load_controlnet(name)
        same(single.conv_in, net.conv_in)
    with pytest.raises(sfumato.FileError, match=r"has no file files/control_sd15_cany.safetensors \(did you mean"):
        sfumato.load_controlnet("someone/net/files/control_sd15_cany.safetensors")


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("someone/nothing", None, "neither a path here nor a repository on the hub"),
        ("someone/gated", None, "accept its terms on the hub"),
        ("someone/tiny-sd", "v9", "has no revision 'v9'"),
        ("someone/empty", None, "has no model_index.json"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, published, source, revision, words):
    (hub.root / "someone/empty").mkdir()
    (hub.root / "someone/empty/README.md").write_text("nothing")
    with pytest.raises(sfumato.FileError, match=words):
        sfumato.load(source, revision=revision)
