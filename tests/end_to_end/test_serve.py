"""A real server on the embedded model, on one process and on two ranks, over real HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("psutil")

import psutil
from openai import APIError, OpenAI

from examples.demo import Server, running_server

pytestmark = pytest.mark.slow

MODEL = "tiny_moe"
PROMPT = "def main("
NUM_TOKENS = 24
CHAT: list[Any] = [{"role": "user", "content": PROMPT}]
SAMPLED = {"generation_config": json.dumps({"do_sample": True, "temperature": 1.5, "max_new_tokens": NUM_TOKENS})}

MALFORMED: dict[str, Any] = {
    "no JSON": "{",
    "not an object": [],
    "no messages": {},
    "messages of the wrong type": {"messages": "hello"},
    "no message": {"messages": []},
    "a message without role": {"messages": [{"content": "hello"}]},
    "unknown field": {"messages": CHAT, "tokens": 3},
    "another model": {"messages": CHAT, "model": "gpt-4"},
    "no tokens wanted": {"messages": CHAT, "max_tokens": 0},
    "negative tokens wanted": {"messages": CHAT, "max_tokens": -1},
    "temperature is no number": {"messages": CHAT, "temperature": "hot"},
    "stop is no text": {"messages": CHAT, "stop": 7},
    "generation_config is no JSON": {"messages": CHAT, "generation_config": "{"},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running server; its log is shown when a test fails."""
    with running_server(num_ranks=request.param) as running:
        yield running
        print(running.log_text())


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def complete(client: OpenAI, **options: Any) -> str:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, **{"max_tokens": NUM_TOKENS, **options})
    return answer.choices[0].text


def stream(client: OpenAI, **options: Any) -> list[str]:
    options = {"max_tokens": NUM_TOKENS, **options}
    chunks = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **options)
    return [chunk.choices[0].text for chunk in chunks]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What the servers of all parameters answered, to be compared."""
    return {}


def same_on_all_servers(texts: dict[str, str], question: str, answer: str) -> None:
    assert texts.setdefault(question, answer) == answer


def test_the_choice_is_logged_once_and_can_be_asked_for(server: Server) -> None:
    answer = httpx.get(f"{server.url}/moe_strategy", timeout=30).json()
    line = answer["line"]
    assert re.match(r"moe_strategy auto -> \w+\+\w+ \(.+\)", line)
    assert server.log_text().count(line) == 1
    assert answer["text"].replace("\n", " ").startswith(line[:60])


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completion(client: OpenAI, texts: dict[str, str]) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=NUM_TOKENS)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    same_on_all_servers(texts, "completion", answer.choices[0].text)


def test_streamed_completion(client: OpenAI) -> None:
    pieces = stream(client)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == complete(client)


def test_chat(client: OpenAI, texts: dict[str, str]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=NUM_TOKENS)
    text = answer.choices[0].message.content
    assert text
    same_on_all_servers(texts, "chat", text)
    chunks = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=NUM_TOKENS, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_sampling_repeats_with_its_seed(client: OpenAI, texts: dict[str, str]) -> None:
    first, again, other = (complete(client, seed=seed, extra_body=SAMPLED) for seed in (1, 1, 2))
    assert first == again != other
    same_on_all_servers(texts, "sampled", first)


def test_long_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT * 200, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 200 * len(PROMPT)
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request(server: Server, client: OpenAI, case: str) -> None:
    body = MALFORMED[case]
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=30)
    assert answer.is_client_error, answer.text
    assert complete(client, max_tokens=1)


def test_refused_request_is_logged_with_its_traceback(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={}, timeout=30)
    assert answer.status_code == 400
    log = server.log_text()
    assert "a request was refused" in log
    assert "KeyError: 'messages'" in log


def test_error_in_a_stream_leaves_the_server_usable(client: OpenAI) -> None:
    with pytest.raises(APIError, match="streaming"):
        stream(client, extra_body={"stop": 7})
    assert complete(client)


def test_client_that_leaves_frees_the_server(client: OpenAI) -> None:
    expected = complete(client)
    started = time.monotonic()
    chunks = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100_000, stream=True)
    for _, _ in zip(range(3), chunks, strict=False):
        pass
    chunks.close()
    assert complete(client) == expected
    assert time.monotonic() - started < 30


def test_concurrent_requests(client: OpenAI) -> None:
    def ask(streamed: bool) -> str:
        return "".join(stream(client)) if streamed else complete(client)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, [True, False] * 3))
    assert set(answers) == {complete(client)}


def test_other_models_are_not_loaded_and_this_one_stays(server: Server, client: OpenAI) -> None:
    answer = httpx.post(f"{server.url}/load_model", json={"model": "another"}, timeout=30)
    assert "pinned" in answer.text
    assert httpx.post(f"{server.url}/reset", timeout=30).is_success
    assert complete(client)


def test_idle_server_uses_no_cpu(server: Server) -> None:
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]

    def seconds() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    before = seconds()
    time.sleep(2)
    assert seconds() - before < 0.5


def test_sigterm_during_a_request_ends_all_processes(server: Server, client: OpenAI) -> None:
    """Stands last: it ends the server that the tests before it share."""
    chunks = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100_000, stream=True)
    next(iter(chunks))
    children = psutil.Process(server.process.pid).children(recursive=True)
    exit_code = server.stop()
    chunks.close()
    assert not any(child.is_running() for child in children)
    # torchrun itself reports the signal.
    assert (exit_code == 0) == (not children)
