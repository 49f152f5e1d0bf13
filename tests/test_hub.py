"""push_to_hub: huggingface_hub uploads a result to a local server that plays the hub's calls."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_examples import TINY

from support.errors import UserError
from support.hub import check_hub

ROOT = Path(__file__).parents[1]


class Hub(ThreadingHTTPServer):
    """The calls of an upload. It keeps the files, and what was called."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Calls)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # of the model
        self.blobs: dict[str, bytes] = {}  # by their SHA-256
        self.created: list[dict] = []
        self.fails = False  # at the commit


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self):
        hub, path, sent = self.server, self.path.partition("?")[0], self.read()
        status, said = 200, {}
        if self.headers.get("Authorization") != "Bearer hf_test" and not path.startswith("/blob/"):
            status, said = 401, {"error": "Invalid token"}
        elif path == "/api/whoami-v2":
            said = {"name": "me", "type": "user"}
        elif path == "/api/repos/create":
            hub.created.append(json.loads(sent))
            said = {"url": f"{hub.url}/me/talker", "id": "1"}
        elif path.endswith("/preupload/main"):
            files = json.loads(sent)["files"]
            large = {True: "lfs", False: "regular"}
            said = {
                "files": [
                    dict(f, uploadMode=large[f["path"].endswith(".safetensors")], shouldIgnore=False) for f in files
                ]
            }
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(sent)["objects"]
            said = {"objects": [dict(o, actions={"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}) for o in objects]}
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = sent
        elif path.endswith("/commit/main"):
            operations = [] if hub.fails else [json.loads(line) for line in sent.splitlines()]
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            said = {"commitUrl": f"{hub.url}/me/talker/commit/1", "commitOid": "1", "success": True}
            if hub.fails:
                status, said = 403, {"error": "no space left for you"}
        elif path == "/api/validate-yaml":
            said = {"errors": [], "warnings": []}
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = answer


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def python(code: str, hub: Hub, token: str = "hf_test") -> str:
    """What a fresh process prints, as huggingface_hub reads its environment once."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", f"from support.hub import check_hub, push\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | own, timeout=120)
    return done.stdout + done.stderr


def test_the_folder_arrives_and_a_new_model_is_private(hub, tmp_path):
    files = {"README.md": b"# Mine\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 100}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    said = python(f"check_hub('me/talker'); push({str(tmp_path)!r}, 'me/talker')", hub)
    assert f"uploaded to {hub.url}/me/talker" in said
    assert {name: hub.files.get(name) for name in files} == files
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "talker")
    assert created.get("visibility") == "private" or created.get("private")


@pytest.mark.slow
def test_a_run_uploads_its_result_with_the_card(hub, tmp_path):
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    command = ["ppo_dialog.py", *TINY, "--run-dir", tmp_path, "--lora-rank", 4, "--push-to-hub", "me/talker"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | own
    )
    assert done.returncode == 0 and f"uploaded to {hub.url}/me/talker" in done.stdout, done.stderr[-2000:]
    policy = tmp_path / "ppo_dialog" / "policy"
    assert hub.files == {file.name: file.read_bytes() for file in policy.iterdir()}
    card = hub.files["README.md"].decode()
    assert "| METEOR |" in card and "This folder is an adapter" in card and '"me/talker"' in card
    assert "library_name: peft" in card and "More Information Needed" not in card


def test_a_failed_upload_is_a_warning_with_the_command_that_tries_again(hub, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    hub.fails = True
    said = python(f"push({str(tmp_path)!r}, 'me/talker')", hub)
    assert "WARNING: the upload failed" in said and f"`hf upload me/talker {tmp_path}` tries again" in said
    assert "Traceback" not in said and hub.files == {}


def test_a_token_that_the_hub_refuses_is_a_sentence_before_training(hub):
    said = python("check_hub('me/talker')", hub, token="hf_old")
    assert re.search(r"UserError: push_to_hub is 'me/talker', but the hub does not answer: .*\.$", said.strip())


@pytest.mark.parametrize("name", ["talker", "me/talker/more", "me/", "me/ talker"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="expected USER/NAME"):
        check_hub(name)
