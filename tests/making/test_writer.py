import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from elm_trainer.making import writer as module
from elm_trainer.making.writer import Writer, load_writer


@pytest.fixture
def server(monkeypatch):
    """A server that speaks the OpenAI protocol on loopback, and answers with the codes in `codes`, then well."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            code = self.server.codes.pop(0) if self.server.codes else 200
            content = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.server.keys.append(self.headers["Authorization"])
            self.answer({"data": self.server.models})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, asked))
            self.server.keys.append(self.headers["Authorization"])
            if self.server.stall:
                self.server.stall.wait(5)
            last = asked["messages"][-1]["content"].rpartition("\n")[2]
            message = {"role": "assistant", "content": self.server.text.format(last=last)}
            self.answer({"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
                         "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})  # fmt: skip

        def log_message(self, *args):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.codes, found.asked, found.keys, found.models = [], [], [], [{"id": "big-one"}]
    found.text, found.stall = "{last} Paris.", None
    found.address = f"http://127.0.0.1:{found.server_port}/v1"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_continues_each_text_with_the_model_that_it_lists(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-own")
    writer = load_writer(server.address)
    prompts = ["The capital of France is", "One line.\nThe capital of Peru is"]
    # The beginning of the line, which it repeats, is left out.
    assert writer.write(prompts, max_new_tokens=7, temperature=0.2) == [" Paris.", " Paris."]
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}
    for _, asked in server.asked:
        assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("big-one", 7, 0.2)
    assert set(server.keys) == {"Bearer sk-own"}


def test_the_key_of_the_hub_is_never_sent(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load_writer(f"{server.address}#other").write(["A"])
    assert server.keys == ["Bearer none"] and server.asked[0][1]["model"] == "other"


def test_trouble_of_the_server_is_tried_again_but_not_for_ever(server):
    writer = load_writer(f"{server.address}#m")
    server.codes = [503, 429]
    assert writer.write(["A"]) == [" Paris."] and len(server.asked) == 3
    server.codes = [500] * 9
    with pytest.raises(OSError, match="`writer` is .*failed .*, 3 times: is the server running") as caught:
        writer.write(["A"])
    assert len(server.asked) == 6 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "fix"), [(401, "check OPENAI_API_KEY"), (404, "check address and model")])
def test_what_is_refused_is_not_tried_again(server, code, fix):
    writer = load_writer(f"{server.address}#m")
    server.codes = [code]
    with pytest.raises(OSError, match=f"which refused .*: {fix}"):
        writer.write(["A"])
    assert len(server.asked) == 1


def test_a_server_that_does_not_answer_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    server.stall = threading.Event()
    with pytest.raises(TimeoutError, match="`writer` is .*has not answered within"):
        load_writer(f"{server.address}#m").write(["A"])
    server.stall.set()
    assert len(server.asked) == 3


def test_where_no_server_is_and_where_it_has_no_model_is_said(server, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="`writer` is 'http://127.0.0.1:9/v1', which failed"):
        load_writer("http://127.0.0.1:9/v1")
    server.models = []
    with pytest.raises(ValueError, match="which lists no models: name one behind the address, '.*#MODEL'"):
        load_writer(server.address)
    server.text, server.models = "{last}", [{"id": "m"}]


def test_a_local_model_continues_texts_in_their_order(tiny_model, tokenizer, tmp_path):
    writer = Writer("tiny", tiny_model, tokenizer, cache_dir=tmp_path)
    prompts = ["A long beginning of a text", "Short"]
    found = writer.write(prompts, max_new_tokens=3)
    assert len(found) == 2 and not any(text.startswith(prompt) for text, prompt in zip(found, prompts, strict=True))
    assert writer.write(prompts, max_new_tokens=3) == found and any(tmp_path.glob("*.jsonl"))
