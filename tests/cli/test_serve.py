"""`lite serve` as a user types it, asked by the client package that everyone uses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lite.cli import main
from tests import served

LITE = [sys.executable, "-c", "from lite.cli import main; raise SystemExit(main())"]
TURNS = [{"role": "user", "content": served.QUESTION}]


class Served:
    """A running `lite serve`."""

    def __init__(self, arguments: list[str], *, key: str = "") -> None:
        environment = {**os.environ, "LITE_API_KEY": key}
        command = [*LITE, "serve", *arguments, "--port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.process.communicate()[1])
        self.name, self.url = re.fullmatch(r"(.*) answers at (http://127\.0\.0\.1:\d+/v1)\n", line).groups()

    def client(self, key: str = "none"):
        """OpenAI's client of it."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def end(self) -> tuple[int, str]:
        """Ctrl-C: its exit status, and what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    server = Served([str(served.gguf()), "--name", "mine"], key="sesame")
    yield server
    if server.process.poll() is None:
        server.end()


def test_answers_openais_client(guarded: Served) -> None:
    client = guarded.client("sesame")
    assert [model.id for model in client.models.list()] == ["mine"]
    answer = client.chat.completions.create(model="mine", messages=TURNS, temperature=0, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(served.prompt())
    cut = client.chat.completions.create(model="mine", messages=TURNS, temperature=0, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(model="mine", messages=TURNS, temperature=0, max_tokens=40, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == answer.choices[0].message.content
    plain = client.completions.create(model="mine", prompt="The capital of", max_tokens=4, temperature=0)
    assert plain.choices[0].text


def test_a_wrong_key_is_refused(guarded: Served) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        guarded.client("open").models.list()
    with pytest.raises(openai.AuthenticationError):
        guarded.client("open").chat.completions.create(model="mine", messages=TURNS)


def test_a_page_of_another_origin_may_not_read(guarded: Served) -> None:
    """What a browser asks for one, and before it: neither the page's origin nor any is let in."""
    for method, key in (("POST", "sesame"), ("OPTIONS", "")):
        headers = {"Origin": "http://page.example", "Content-Type": "text/plain", "Authorization": f"Bearer {key}"}
        body = json.dumps({"messages": TURNS, "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{guarded.url}/chat/completions", body, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            assert not answer.headers["Access-Control-Allow-Origin"]
    headers["Authorization"] = "Bearer open"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(request.full_url, body, headers))


def test_ctrl_c_ends_it_though_an_answer_is_under_way(guarded: Served) -> None:
    """The last to use it: then nobody answers there any more."""
    import openai

    client = guarded.client("sesame")
    endless = {"max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model="mine", messages=TURNS, stream=True, **endless)
    assert next(iter(stream))
    status, err = guarded.end()
    assert status == 0
    assert "stopped" in err
    assert "sesame" not in err
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_trained_run_is_exported_and_served(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a key, which a client need not know then; in this process, which has torch loaded already."""
    run = tmp_path / "tuned"
    assert main(["orpo", "--max-steps", "8", "--samples", "0", "--output-dir", str(run)]) == 0
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers, pieces = [], []

    def ask() -> None:
        import openai

        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=100)
        asked = {"model": "tuned", "messages": TURNS, "temperature": 0, "max_tokens": 60}
        try:
            answers.append(client.chat.completions.create(**asked))
            stream = client.chat.completions.create(**asked, stream=True)
            pieces.extend(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    status = main(["serve", str(run), "--no-check", "--port", str(port)])
    asking.join()
    out, err = capsys.readouterr()
    assert status == 0
    assert out == f"tuned answers at http://127.0.0.1:{port}/v1\n"
    assert "exporting tuned to q8_0, once" in err
    assert list(run.glob("serve/tuned-q8_0-*.gguf"))
    assert "Paris" in answers[0].choices[0].message.content
    assert answers[0].choices[0].finish_reason == "stop"
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == answers[0].choices[0].message.content


def test_another_engine_is_told_by_its_command(capsys: pytest.CaptureFixture) -> None:
    from lite.serve.engines import installed

    if installed("vllm"):
        pytest.skip("vllm is installed, and would be run")
    assert main(["serve", str(served.adapter()), "--engine", "vllm", "--api-key", "sesame", "--host", "[::1]"]) == 0
    out, err = capsys.readouterr()
    typed = r"^lite merge \S+/tuned -o (\S+)\nVLLM_API_KEY=KEY vllm serve \1 .* --host ::1 --port 8080$"
    assert re.search(typed, out, re.MULTILINE)
    assert "sesame" not in out
    assert "pip install vllm" in err
    assert main(["serve", str(served.adapter()), "--engine", "sglang", "--api-key", "sesame"]) == 0
    out, err = capsys.readouterr()
    assert "--api-key KEY" in out
    assert "sglang takes the key on its command line, where others can see it" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: whoever reaches this machine could ask the model"),
        (["--host", "0.0.0.0", "--api-key", ""], "--api-key is empty, which would let everyone in"),
        (["--port", "70000"], "--port = 70000: expected an integer, 0 to 65535"),
        (["--engine", "vlm"], "--engine = 'vlm': expected one of .* Did you mean vllm?"),
        (["--engine", "vllm"], "is a GGUF file. Name the run"),
    ],
)
def test_what_cannot_be_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", str(served.gguf()), *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_port_that_is_taken_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before anything is looked for or exported."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "none"), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {port}: cannot be listened at" in said
    assert "--port 0" in said
