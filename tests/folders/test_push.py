"""Push: what is sealed goes to the hub, by its own client, to a server that answers as the hub does."""

import base64
import http.server
import json
import shutil
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants

from jaxsft.cli import main
from jaxsft.disk.seal import seal

REPO = "org/name"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of an upload; keeps what was committed."""

    def do_GET(self):
        if "/tree/" in self.path:
            files = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.server.files]
            return self._answer(files)
        self._answer({"id": REPO, "modelId": REPO, "private": self.server.is_private, "siblings": [], "tags": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{constants.ENDPOINT}/{REPO}", "name": REPO})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if self.server.refuses:
            return self._answer({"error": "You have no right to write here"}, 403)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "deletedFile":
                del self.server.files[line["value"]["path"]]
            elif line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer({"commitUrl": f"{constants.ENDPOINT}/{REPO}/commit/0", "commitOid": "0", "hookOutput": ""})

    def _answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.requests = [], {}, []
    server.is_private = server.refuses = False
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    files = {"config.json": "{}", "README.md": "# Card", "model[1].safetensors": "weights", "tokenizer.json": "{}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    seal(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_sealed_is_uploaded_and_nothing_else(hub, export, capsys):
    sealed = contents(export)
    (export / "notes.txt").write_text("mine")
    assert main(["push", str(export), REPO]) == 0
    assert hub.files == sealed and {token for _, token in hub.requests} == {"Bearer hf_test"}
    assert f"uploaded: {constants.ENDPOINT}/{REPO}" in capsys.readouterr().out
    assert not hub.created[0].get("private")


def test_the_export_of_a_run_is_found(hub, export, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert main(["push", str(tmp_path), REPO]) == 0
    assert hub.files == contents(export)


def test_a_card_that_was_written_on_goes_along_without_the_seal(hub, export):
    (export / "README.md").write_text("# My card")
    assert main(["push", str(export), REPO]) == 0
    assert hub.files == {name: data for name, data in contents(export).items() if name != "seal.json"}
    assert hub.files["README.md"] == b"# My card"


def test_a_later_one_leaves_nothing_of_a_former_one_beside_it(hub, export):
    former = ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors")
    hub.files = {name: b"old" for name in ("seal.json", "notes.md", "config.json", *former)}
    (export / "README.md").write_text("# My card")
    assert main(["push", str(export), REPO]) == 0
    there = {name: data for name, data in contents(export).items() if name != "seal.json"}
    assert hub.files == there | {"notes.md": b"old"}


def test_without_a_card_the_rest_goes(hub, export):
    (export / "README.md").unlink()
    assert main(["push", str(export), REPO]) == 0
    assert hub.files == {name: data for name, data in contents(export).items() if name != "seal.json"}


def test_private_is_made_so_and_a_public_one_gets_nothing(hub, export, capsys):
    assert main(["push", str(export), REPO, "--private"]) == 1
    assert "all can see it" in capsys.readouterr().err and not hub.files
    hub.is_private = True
    assert main(["push", str(export), REPO, "--private"]) == 0
    # The client has called it by two names.
    assert hub.created[-1].get("private") is True or hub.created[-1].get("visibility") == "private"
    assert hub.files == contents(export)


def damage(export):
    (export / "model[1].safetensors").write_text("other")


def remove(export):
    (export / "tokenizer.json").unlink()


def unseal(export):
    (export / "seal.json").unlink()


def empty(export):
    shutil.rmtree(export)
    export.mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage, "model[1].safetensors: 7 bytes"),
        (remove, "tokenizer.json: 2 bytes"),
        (unseal, "no export of jaxsft: without seal.json"),
        (empty, "no export: there is neither config.json nor adapter_config.json"),
        (shutil.rmtree, "no export: there is neither"),
    ],
)
def test_what_is_no_whole_export_is_not_sent(hub, export, capsys, harm, said):
    harm(export)
    assert main(["push", str(export), REPO]) == 1
    assert said in capsys.readouterr().err and not hub.requests


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "org/-x", "org/"])
def test_a_name_that_the_hub_would_not_take_is_one_error(hub, export, capsys, name):
    assert main(["push", str(export), name]) == 1
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and not hub.requests


def test_without_a_token_or_a_right_the_error_says_what_helps(hub, export, capsys, monkeypatch):
    hub.refuses = True
    assert main(["push", str(export), REPO]) == 74
    assert "the hub did not take it" in (error := capsys.readouterr().err) and "403" in error
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(export), REPO]) == 1
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_an_adapter_whose_base_is_here_alone_is_said(hub, export, capsys):
    (export / "config.json").unlink()
    (export / "seal.json").unlink()
    (export / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/base"}))
    seal(export)
    assert main(["push", str(export), REPO]) == 0
    assert "its base is /home/me/base, which is on this machine alone" in capsys.readouterr().out
