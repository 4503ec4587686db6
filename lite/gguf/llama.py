"""llama.cpp in this process: a GGUF file loaded by it, and spoken to over its own HTTP on a port of this machine.

`running` starts the server of the xllamacpp wheel, quietly, and stops it. What it serves is OpenAI's protocol and
llama.cpp's own; `Llama` has the questions that lite asks.
"""

import json
import os
import secrets
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from lite.errors import ExportError
from lite.gguf.heard import heard

LOOPBACK = "127.0.0.1"
CONTEXT = 4096  # tokens
PARALLEL = 4  # requests answered at once; they share the context's memory
SMALL_BYTES = 64 * 2**20  # a file's, up to which one thread is faster than several that wait for each other
SILENT, ERRORS = 0, 1  # llama.cpp's verbosity
PROMPTS = 32  # of one request
FORCED = 1e9  # added to a logit: whatever the others are, it is the largest


class Distribution(NamedTuple):
    """What may come next: the likeliest tokens, best first."""

    ids: NDArray[np.int64]  # (top,)
    logps: NDArray[np.float32]  # (top,) natural logs of the plain softmax over the whole vocabulary


class Answer(NamedTuple):
    """What was generated after a prompt."""

    ids: list[int]  # the token that ended it is the last one
    stopped: bool  # whether a token of the model ended it, and not the limit


class Llama:
    """A file that llama.cpp has loaded, at `address`. Every method raises ExportError in llama.cpp's own words."""

    def __init__(self, path: Path, address: str, key: str | None) -> None:
        self.path = path
        self.address = address
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it says of the model: n_vocab, n_ctx_train, n_embd, n_params, size (bytes), ftype."""
        return self._asked("/v1/models")["data"][0]["meta"]

    def tokenise(self, text: str, *, special: bool = True, beginning: bool = False) -> list[int]:
        """Token ids of a text as it stands.

        special: whether the text of a special token (`<|im_end|>`) becomes that token. beginning: put before and after
        it what the file says belongs there (the beginning-of-text token).
        """
        asked = {"content": text, "add_special": beginning, "parse_special": special}
        return self._asked("/tokenize", asked)["tokens"]

    def rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation through the file's chat template, as its own engine renders it, with the generation prompt.

        A file without a template is given ChatML by llama.cpp.
        """
        return self._asked("/apply-template", {"messages": list(messages)})["prompt"]

    def next_tokens(self, prompts: Sequence[Sequence[int]], top: int) -> list[Distribution]:
        """After each prompt, the `top` likeliest next tokens, or the whole vocabulary if it has no more.

        Prompts that begin alike, asked in the order of their length of a server with parallel=1, cost their new tokens
        only. Each costs about 15 µs a token of `top`, which come as text.
        """
        # With a token that is part of a character it gives no distribution: a whole one is made to follow. What is told
        # is from before that.
        whole = self.tokenise("a")[-1]
        asked = {"n_predict": 1, "n_probs": top, "logit_bias": [[whole, FORCED]], "cache_prompt": True}
        found = []
        for start in range(0, len(prompts), PROMPTS):
            part = [list(prompt) for prompt in prompts[start : start + PROMPTS]]
            if not all(part):
                raise ValueError("a prompt has no token")
            answers = self._asked("/completion", {**asked, "prompt": part})
            found += [_distribution(answer) for answer in _listed(answers)]
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[Answer]:
        """The likeliest answer to each prompt, by its own idea of which tokens end one."""
        asked = {"n_predict": max_tokens, "temperature": 0.0, "return_tokens": True}
        answers = self._asked("/completion", {**asked, "prompt": [list(prompt) for prompt in prompts]})
        return [Answer(answer["tokens"], answer["stop_type"] == "eos") for answer in _listed(answers)]

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends where the token comes, which is made to come twice."""
        asked = {"prompt": [token], "n_predict": 2, "logit_bias": [[token, FORCED]]}
        return self._asked("/completion", asked)["stop_type"] == "eos"

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Iterator[str]:
        """The answer to a conversation, piece by piece as it comes; `settings` are OpenAI's: max_tokens, temperature.

        Closing the iterator stops the generation.
        """
        asked = {"messages": list(messages), "stream": True, "reasoning_format": "none", **settings}
        with self._opened("/v1/chat/completions", asked) as stream:
            for line in stream:
                kind, _, event = line.decode().strip().partition(": ")
                if kind == "error":
                    raise self._refusal("/v1/chat/completions", event)
                if kind != "data" or event == "[DONE]":
                    continue
                told = json.loads(event)
                if "error" in told:
                    raise self._refusal("/v1/chat/completions", event)
                for choice in told["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._opened(path, body) as answer:
            return json.load(answer)

    def _opened(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, self._headers)
        # The machine's proxy, if it has one, is not asked for an address of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return opener.open(request)
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error.read().decode(errors="replace")) from None
        except OSError as error:
            raise self._refusal(path, str(error)) from None

    def _refusal(self, path: str, answer: str) -> ExportError:
        try:
            told = json.loads(answer)
            told = told.get("error", told)
            answer = told["message"] if isinstance(told, dict) else str(told)
        except (ValueError, KeyError, AttributeError):
            pass
        return ExportError(f"{self.path}: llama.cpp answered {path} with: {answer}")


@contextmanager
def running(
    path: Path,
    *,
    context: int = CONTEXT,
    parallel: int = PARALLEL,
    threads: int | None = None,
    lora: Sequence[Path] = (),
    exact: bool = False,
    api_keys: Sequence[str] | None = None,
    host: str = LOOPBACK,
    port: int = 0,
    name: str | None = None,
) -> Iterator[Llama]:
    """The file, loaded and served while this is open.

    context: tokens, of all requests under way together. threads: None takes all cores, of a small file one. lora: GGUF
    adapters to put on. exact: keys and values are kept in float32, not in fp16. api_keys: None makes one that nobody
    else knows; an empty sequence asks for none. port: 0 takes a free one. name: of the model in /v1/models. Raises
    ExportError in llama.cpp's words if the file cannot be loaded or the port not be had.
    """
    own = [secrets.token_hex(16)] if api_keys is None else list(api_keys)
    named, where = name or path.stem, (host, port)
    server = _started(path, context, parallel, threads, lora=lora, exact=exact, keys=own, where=where, name=named)
    try:
        address = server.listening_address
        if not host.startswith("127."):
            address = address.replace("0.0.0.0", LOOPBACK).replace("[::]", "[::1]")
        yield Llama(path, address, own[0] if own else None)
    finally:
        _hang_up(int(server.listening_address.rpartition(":")[2]))
        del server  # joins its threads, which end within a second or two


def _started(
    path: Path,
    context: int,
    parallel: int,
    threads: int | None,
    *,
    lora: Sequence[Path],
    exact: bool,
    keys: list[str],
    where: tuple[str, int],
    name: str,
) -> Any:
    llama = _library()
    missing = [str(file) for file in (path, *lora) if not file.is_file()]
    if missing:
        raise ExportError(f"{', '.join(missing)}: no such file. Expected a GGUF file.")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in lora]
    params.n_ctx, params.n_parallel, params.kv_unified = context, parallel, True
    if exact:
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.fit_params = False  # or it would load the model twice, to shrink what was asked for
    params.warmup = False
    if threads is None and path.stat().st_size <= SMALL_BYTES:
        threads = 1
    if threads is not None:
        params.cpuparams.n_threads = threads
    params.hostnames, params.port = [where[0]], where[1]
    params.api_keys = keys
    params.model_alias = {name}
    # No page of another origin may read an answer; a browser takes the empty name for none.
    params.cors_origins, params.cors_credentials, params.cors_origins_explicit = "", False, True
    params.ui = params.endpoint_slots = False
    params.sse_ping_interval = 1  # seconds: how soon it sees that a stream's reader has gone
    params.verbosity = SILENT
    try:
        return llama.Server(params)
    except RuntimeError:
        pass  # it says why in its log alone
    params.verbosity = ERRORS
    with heard() as said:
        try:
            return llama.Server(params)
        except RuntimeError:
            pass
    words = "\n".join(f"  {line}" for line in said) or "  (it did not say why)"
    at = f" and serve it at {where[0]}:{where[1]}" if where[1] else ""
    raise ExportError(
        f"{path}: llama.cpp cannot load it{at}. It says:\n{words}\n"
        "Expected a whole GGUF file of a model: make it again, or fetch it again."
    )


def _hang_up(port: int) -> None:
    """End the connections to the port from this side: a stopping server waits for requests that it answers no more."""
    for connection in psutil.Process().net_connections(kind="tcp"):
        if connection.laddr and connection.laddr.port == port and connection.raddr and connection.fd >= 0:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as open_socket:
                open_socket.shutdown(socket.SHUT_RDWR)


def require() -> None:
    """Raise ExportError with the pip line if llama.cpp is not here."""
    _library()


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ExportError(
            f"llama.cpp cannot be loaded: {error}. It comes with `pip install xllamacpp`, which has wheels for Linux, "
            "macOS and Windows."
        ) from None
    return xllamacpp


def _listed(answers: Any) -> list[dict[str, Any]]:
    """The answers in the order of their prompts; of a single prompt llama.cpp gives no list."""
    return sorted(answers, key=lambda answer: answer["index"]) if isinstance(answers, list) else [answers]


def _distribution(answer: Mapping[str, Any]) -> Distribution:
    top = answer["completion_probabilities"][0]["top_logprobs"]
    ids = np.fromiter((entry["id"] for entry in top), np.int64, len(top))
    return Distribution(ids, np.fromiter((entry["logprob"] for entry in top), np.float32, len(top)))
