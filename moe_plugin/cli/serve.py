"""`moe-plugin serve`: transformers' own OpenAI-compatible server, with its experts run by moe_plugin.

Under torchrun, rank 0 serves HTTP and the other ranks follow it through every request.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_plugin.cli.launch import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Ranks,
    StrategyOption,
    TracebackOption,
    clear_errors,
    joined_ranks,
    load_model,
    require_transformers,
    set_up_logging,
)
from moe_plugin.errors import ConfigError, MoEPluginError

if TYPE_CHECKING:
    import fastapi
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL_NAME = "tiny_moe"
"""What requests call the embedded model."""

GRACE_SECONDS = 5
"""How long running requests may go on after SIGTERM or SIGINT."""

CLIENT_ERRORS = (LookupError, TypeError, ValueError)
"""What transformers raises on a request that is not as it should be."""

logger = logging.getLogger(__name__)


def serve(
    model: ModelArgument = None,
    moe_strategy: StrategyOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    traceback: TracebackOption = False,
) -> None:
    """Serve a model over the OpenAI API. Under torchrun its experts are spread over the ranks."""
    with clear_errors(traceback):
        require_transformers("serve")
        with joined_ranks(device) as ranks:
            set_up_logging(ranks)
            # Taken before the model is loaded: a port in use should not cost that wait.
            with _listener(host, port) if ranks.is_first else contextlib.nullcontext() as listener:
                loaded, tokenizer = load_model(model, moe_strategy, dtype, ranks)
                if listener is not None:
                    _serve_http(loaded, tokenizer, model or EMBEDDED_MODEL_NAME, ranks, listener)
                else:
                    _follow(loaded, tokenizer, ranks)


@contextlib.contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            # With SO_REUSEADDR, only listening keeps others from the port; uvicorn may call it again.
            listener.listen()
        except OSError as problem:
            raise ConfigError(f"cannot listen on {host}:{port}: {problem.strerror}") from problem
        yield listener


def _serve_http(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, ranks: Ranks, listener: socket.socket
) -> None:
    import uvicorn

    from moe_plugin.cli.lockstep import Lockstep

    app = _build_app(model, tokenizer, name)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE_SECONDS, log_level="info"))

    def stop_serving() -> None:
        server.should_exit = True

    lockstep = Lockstep(model, tokenizer, ranks, on_failure=stop_serving)
    model.generate = lockstep.generate
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    logger.info("serving %s at http://%s:%d/v1, %d rank(s)", name, address, port, ranks.size)
    # uvicorn shuts down on these signals, then raises them again; that must not end the process before its work is.
    with _signals_go_to(lambda *_: None):
        server.run(sockets=[listener])
    lockstep.close()
    if lockstep.failure is not None:
        raise lockstep.failure


def _follow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    from moe_plugin.cli.lockstep import Lockstep

    # torchrun signals all ranks at once. Rank 0 finishes its requests first, and needs the others for that.
    with _signals_go_to(signal.SIG_IGN):
        Lockstep(model, tokenizer, ranks).follow()


@contextlib.contextmanager
def _signals_go_to(handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _build_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> fastapi.FastAPI:
    """transformers' server around one model that is already loaded."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    from moe_plugin.cli.loaded_model import LoadedModelManager
    from moe_plugin.integrations.transformers import selection_report

    manager, state = LoadedModelManager(model, tokenizer, name), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        CompletionHandler(manager, state),
        ResponseHandler(manager, state),
        TranscriptionHandler(manager, state),
        state,
    )

    @app.get("/moe_strategy")
    def moe_strategy() -> dict[str, Any]:
        report = selection_report(model)
        return {"line": report.line(), "text": report.text(), **report.to_dict()}

    async def refuse(_request: Request, problem: Exception) -> JSONResponse:
        if isinstance(problem, MoEPluginError):
            raise problem
        # The same errors come from mistakes of the server, which only the traceback tells apart.
        logger.error("a request was refused", exc_info=problem)
        message = f"{type(problem).__name__}: {problem}"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    for kind in (*CLIENT_ERRORS, TemplateError):
        app.add_exception_handler(kind, refuse)
    return app
