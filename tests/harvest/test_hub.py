"""Answers of the Hub are reported in one line; a small local server answers as the Hub does."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from gsae.errors import NotFoundError
from gsae.harvest import documents, load_tokenizer

ANSWERS = {
    "owner/gated": (403, "GatedRepo"),
    "owner/absent": (404, "RepoNotFound"),
    "owner/old": (404, "RevisionNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code, word = next((answer for name, answer in ANSWERS.items() if name in self.path), (500, ""))
        self.send_response(code)
        self.send_header("X-Error-Code", word)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


CALLS = [load_tokenizer, documents]


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/gated", r"'owner/gated' is gated: accept its terms at https://huggingface\.co/"),
        ("owner/absent", r"There is no (model|dataset) 'owner/absent'"),
        ("owner/old", r"The Hub has (model|dataset) 'owner/old', but not this revision of it\."),
    ],
)
def test_a_refusal_of_the_hub_is_reported_in_one_line(call: Callable[..., object], name: str, said: str) -> None:
    with pytest.raises(NotFoundError, match=said) as caught:
        call(name, "v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_network_is_reported_as_such(call: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens on port 9.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotFoundError, match=r"on this machine, and huggingface\.co cannot be reached\."):
        call("owner/name")
