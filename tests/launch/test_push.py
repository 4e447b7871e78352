"""launch/export.py --push against a local server that speaks the hub's calls: what it holds is the exported folder."""

import base64
import json
import runpy
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from launching import REPOSITORY

from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.export import save_blip

RUN_CONFIG = """
model: {model_type: tiny, vit_kwargs: {embed_dim: 24, depth: 1, num_heads: 4, patch_size: 8}, image_size: 32}
datasets: {shapes_caption: {}}
"""


class Hub(BaseHTTPRequestHandler):
    """Large files travel as in Git LFS, others within the commit; what a repository holds appears with the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path)
        if self.headers["Authorization"] != "Bearer hf_secret":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            given = json.loads(body)
            self.server.created = f"{given['organization']}/{given['name']}"
            return self.answer({"url": f"{self.server.address}/{self.server.created}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            for file in files:
                large = file["path"].endswith(".safetensors")
                file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for found in objects:
                found["actions"] = {"upload": {"href": f"{self.server.address}/lfs/{found['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == f"/api/models/{self.server.created}/commit/main"
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        commit = f"{self.server.address}/{self.server.created}/commit/1"
        self.answer({"success": True, "commitOid": "1", "commitUrl": commit, "hookOutput": ""})

    def do_PUT(self):
        self.server.large[self.path.removeprefix("/lfs/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_): ...


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.calls, server.files, server.large, server.created = [], {}, {}, None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """export(*arguments) of a tiny checkpoint to tmp_path/my; returns what was printed. Without a login on the hub."""
    main = runpy.run_path(str(REPOSITORY / "launch" / "export.py"))["main"]
    (tmp_path / "run.yaml").write_text(RUN_CONFIG)
    config, _ = load_run_config(tmp_path / "run.yaml")
    torch.manual_seed(0)
    save_blip(tmp_path / "tiny.pth", dict(build_model(config.model, lambda f, *i: f(*i)).named_parameters()), {})
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, spoken by compiled code
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        given = ["--cfg-path", tmp_path / "run.yaml", "--checkpoint", tmp_path / "tiny.pth", *arguments]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, given)])
        main()
        return capsys.readouterr().out

    return run


def test_what_the_hub_holds_is_the_exported_folder(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        printed = export("--format", "hf", "--output", tmp_path / "my", "--push", "somebody/captioner")
    assert printed.endswith(f"pushed to {server.address}/somebody/captioner\n")
    assert server.created == "somebody/captioner"
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "my").iterdir()}
    assert len(server.large) == 1 and "model.safetensors" in server.files
    card = server.files["README.md"].decode()
    assert '\nfolder = "somebody/captioner"\n' in card and "# somebody/captioner" in card
    assert "finetuned on shapes_caption" in card and "resized to 32 x 32 pixels" in card and "at most 20 tokens" in card
    assert "model_type: tiny" in card


def test_what_cannot_be_pushed_is_told_before_the_export(export, tmp_path, monkeypatch):
    def fails(*arguments):
        with pytest.raises(UserError) as caught:
            export("--output", tmp_path / "my", *arguments)
        return str(caught.value)

    no_token = "--push a/b: no token of the Hugging Face hub: type `hf auth login`, or set HF_TOKEN"
    assert fails("--format", "hf", "--push", "a/b") == no_token
    assert fails("--format", "hf", "--push", "b") == "--push b: expected OWNER/NAME"
    assert fails("--format", "blip", "--push", "a/b").endswith("--format is blip; allowed: hf")
    assert not (tmp_path / "my").exists()


def test_a_push_that_the_hub_refuses_keeps_the_folder(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        with pytest.raises(UserError, match=r"^--push a/b: .*401.*Invalid username or password.*/my is complete\)$"):
            export("--format", "hf", "--output", tmp_path / "my", "--push", "a/b")
    assert (tmp_path / "my" / "model.safetensors").exists() and server.calls == ["/api/repos/create"]
