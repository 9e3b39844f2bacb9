"""A server that answers as vLLM's OpenAI-compatible one does, from a small model in this process."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tests.teachers import small


class Stub(ThreadingHTTPServer):
    """`spoil` changes an answer before it is sent; `fails`: statuses of the next completions."""

    daemon_threads = True

    def __init__(self, model, tokenizer=small.TOKENIZER, max_logprobs=20, tokenizes="/tokenize", key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.max_logprobs = model, tokenizer, max_logprobs
        self.tokenizes, self.key = tokenizes, key
        self.spoil = lambda answer: answer
        self.fails, self.delay, self.longest = [], 0.0, 64
        self.asked: list[dict] = []
        self.slow = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def completion(self, body):
        """(status, answer), with the checks of vLLM's sampling parameters that matter here."""
        prompt = body["prompt"]
        ids = self.tokens(prompt) if isinstance(prompt, str) else prompt
        k = body.get("prompt_logprobs")
        if body["max_tokens"] < 1:
            return 400, _error(f"max_tokens must be at least 1, got {body['max_tokens']}.")
        if k is not None and k > self.max_logprobs:
            return 400, _error(f"Requested prompt logprobs of {k}, which is greater than max allowed: 20")
        choice = {"index": 0, "text": "x", "prompt_logprobs": None if k is None else self.scores(ids, k)}
        if body.get("return_token_ids") and self.tokenizes != "nowhere":
            choice["prompt_token_ids"] = ids
        return 200, {"model": body["model"], "choices": [choice]}

    @torch.no_grad()
    def scores(self, ids, k):
        """The token that stands there, and then the k likeliest, of which it may be one."""
        rows = self.model.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        found: list[dict | None] = [None]
        for token, row in zip(ids[1:], rows, strict=True):
            top = row.topk(k)
            rank = int((row >= row[token]).sum())
            entries = {str(token): {"logprob": row[token].item(), "rank": rank, "decoded_token": "?"}}
            for n, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
                entries[str(index)] = {"logprob": value, "rank": n + 1, "decoded_token": "?"}
            found.append(entries)
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        models = [{"id": "served", "object": "model", "max_model_len": self.server.longest}]
        self._send(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        if stub.key and self.headers.get("Authorization") != f"Bearer {stub.key}":
            return self._send(401, _error("Unauthorized"))
        if self.path == "/tokenize":
            if stub.tokenizes != "/tokenize":
                return self._send(404, {"detail": "Not Found"})
            return self._send(200, {"tokens": stub.tokens(body["prompt"])})
        stub.asked.append(body)
        if stub.fails:
            status = stub.fails.pop(0)
            if status is None:  # no answer in time
                stub.slow.wait(5)
                status = 500
            return self._send(status, _error("the engine is busy"))
        status, answer = stub.completion(body)
        return self._send(status, stub.spoil(answer) if status == 200 else answer)

    def _send(self, status, answer):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _error(message):
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


@contextmanager
def serving(model, **options):
    with Stub(model, **options) as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield stub
        finally:
            stub.slow.set()
            stub.shutdown()
