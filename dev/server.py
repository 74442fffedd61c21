"""The real ComfyUI server as a subprocess, and a client for it. Used by the demo, the tests and the benchmarks."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

PACK = "comfyui-posterior"
PREVIEW = (1).to_bytes(4, "big")  # how a websocket message with a preview begins; 4 more bytes tell its file format


class PromptFailed(Exception):
    """A prompt was refused or failed; the message names node and cause."""


class Server:
    """A running ComfyUI, reached over HTTP and its websocket."""

    def __init__(self, port: int, log: Path) -> None:
        self.address, self.log = f"127.0.0.1:{port}", log
        self.process: subprocess.Popen | None = None  # when it was started from here

    def get(self, path: str, **query: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> Any:
        return json.loads(self.get(path, **query))

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def run(
        self,
        prompt: dict[str, Any],
        on_message: Callable[[dict[str, Any]], None] | None = None,
        *,
        on_preview: Callable[[bytes], None] | None = None,
        extra_data: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Queue an API-format prompt, wait until the server is done with it, and return its outputs by node id.

        Args:
            on_message: gets every message on the websocket.
            on_preview: gets the file, mostly JPEG, of every preview picture; `extra_data` must ask for them.
            extra_data: for example {"preview_method": "latent2rgb"}.

        Raises:
            PromptFailed: refused, failed, or interrupted.
        """
        client = uuid.uuid4().hex
        body = {"prompt": prompt, "client_id": client, "extra_data": extra_data or {}}
        with contextlib.closing(websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=600)) as ws:
            try:
                queued = json.loads(self.post("/prompt", body))
            except urllib.error.HTTPError as error:
                raise PromptFailed(f"the server refused the prompt: {refusal(json.load(error))}") from error
            prompt_id = queued["prompt_id"]
            # The server leaves out the output nodes it cannot run, and runs the rest.
            failure = f"the server refused a part of the prompt: {refusal(queued)}" if queued["node_errors"] else None
            while True:
                message = ws.recv()
                if isinstance(message, bytes):
                    if on_preview is not None and message.startswith(PREVIEW):
                        on_preview(message[8:])
                    continue
                message = json.loads(message)
                if on_message is not None:
                    on_message(message)
                data = message.get("data", {})
                if data.get("prompt_id") != prompt_id:
                    continue
                if message["type"] == "execution_error":
                    kind = data["exception_type"].rpartition(".")[2]
                    failure = f"{data['node_type']}: {kind}: {data['exception_message'].strip()}"
                elif message["type"] == "execution_interrupted":
                    failure = f"{data['node_type']}: interrupted"
                elif message["type"] == "executing" and data["node"] is None:
                    break  # the last message: only now is the prompt in the history
        if failure is not None:
            raise PromptFailed(failure)
        return self.get_json(f"/history/{prompt_id}")[prompt_id]["outputs"]

    def picture(self, saved: dict[str, str]) -> bytes:
        """The file behind one entry of an output's `images`."""
        return self.get("/view", **saved)


def refusal(answer: dict[str, Any]) -> str:
    """What /prompt found wrong."""
    found = [
        f"{node['class_type']}: {error['message']}: {error['details']}"
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    return "; ".join(found) or answer["error"]["message"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Threads that spin while they wait make a busy machine many times slower, and an idle one no faster.
THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def command(python: str, comfyui: Path, base: Path, port: int, *extra: str) -> list[str]:
    """How ComfyUI is started: on the loopback only, with this pack and no other, and with its data in `base`."""
    where = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    only = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, "--disable-api-nodes"]
    return [python, str(comfyui / "main.py"), *where, *only, *extra]


@contextlib.contextmanager
def running(python: str, comfyui: Path, base: Path, log: Path, *extra: str, wait_s: float = 180) -> Iterator[Server]:
    """Start ComfyUI on a free loopback port, wait until it answers, and stop it at the end."""
    server = Server(port := free_port(), log)
    with log.open("w") as stream:
        arguments = command(python, comfyui, base, port, "--database-url", "sqlite:///:memory:", *extra)
        environment = {**THREADS_SLEEP, **os.environ, "NO_COLOR": "1"}
        process = server.process = subprocess.Popen(
            arguments, stdout=stream, stderr=subprocess.STDOUT, cwd=base, env=environment
        )
        try:
            deadline = time.monotonic() + wait_s
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    ended = f"stopped with exit code {process.returncode}" if process.poll() is not None else "did not answer"
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise RuntimeError(f"ComfyUI {ended} within {wait_s:.0f} s. The end of {log}:\n{tail}")
                with contextlib.suppress(OSError):
                    server.get("/system_stats")
                    break
                time.sleep(0.3)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
