"""Serve the embedded model, on one process and then on two ranks, and talk to it with the official OpenAI client.

python examples/demo.py
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[1]
PROMPT = """\
    def close(self):
        if self._file is not None:
            """
STARTUP_SECONDS = 180
# Longer than torchrun takes to end ranks that do not listen.
SHUTDOWN_SECONDS = 60
LOG_TAIL_LINES = 40


class ServerFailed(Exception):
    """The server ended, or did not become ready in time. The message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A running `moe-plugin serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=60, max_retries=0)

    def log_text(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def failed(self, what: str) -> ServerFailed:
        tail = self.log_text().splitlines()[-LOG_TAIL_LINES:]
        return ServerFailed("\n".join([what, "--- server log ---", *tail]))

    def wait_until_ready(self) -> None:
        """Raises ServerFailed when the server ends or takes longer than STARTUP_SECONDS."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.failed(f"the server ended with exit code {self.process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(0.2)
        raise self.failed(f"the server was not ready after {STARTUP_SECONDS} s")

    def stop(self) -> int:
        """End the server and everything it started; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def serve_command(num_ranks: int = 1) -> list[str]:
    """The command line of a server, without its options."""
    if num_ranks == 1:
        return [sys.executable, "-m", "moe_plugin.cli", "serve"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*torchrun, "-m", "moe_plugin.cli", "serve"]


@contextlib.contextmanager
def running_server(*options: str, num_ranks: int = 1) -> Iterator[Server]:
    """Start a server on a free port, wait until it answers, and end it in any case."""
    port = free_port()
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            [*serve_command(num_ranks), "--port", str(port), *options],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stream_completion(server: Server, prompt: str, max_tokens: int) -> str:
    """Print a completion as it arrives, and return it."""
    pieces = []
    print(prompt, end="", flush=True)
    with server.client() as client:
        chunks = client.completions.create(model="tiny_moe", prompt=prompt, max_tokens=max_tokens, stream=True)
        for chunk in chunks:
            pieces.append(chunk.choices[0].text)
            print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


def show(num_ranks: int) -> str:
    """Serve on `num_ranks` ranks, print what was chosen and a completion, and return the completion."""
    print(f"== {num_ranks} rank{'s' * (num_ranks > 1)}: {' '.join(serve_command(num_ranks)[1:])}\n", flush=True)
    with running_server(num_ranks=num_ranks) as server:
        report = httpx.get(f"{server.url}/moe_strategy", timeout=30).raise_for_status().json()
        print(report["text"])
        try:
            return stream_completion(server, PROMPT, max_tokens=120)
        except Exception as problem:
            raise server.failed(f"the request failed: {problem}") from problem


def main() -> int:
    try:
        completions = [show(num_ranks) for num_ranks in (1, 2)]
    except ServerFailed as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if not all(completions):
        print("error: a completion is empty", file=sys.stderr)
        return 1
    print(f"\nThe completions {'are the same' if completions[0] == completions[1] else 'differ'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
