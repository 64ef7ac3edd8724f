"""A server with OpenAI's chat API on this machine, which judges by a number in each answer and can be made to fail."""

import contextlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dpo_jax.evaluation.judging import Contest
from dpo_jax.evaluation.winrate import Asked

QUALITY = re.compile(r"quality (\d+)")


def prepared(count: int, start: int = 0) -> list[Contest]:
    """Contests of answers whose quality is written in them; in a third the first is better, in a third the second."""
    return [
        Contest(
            Asked([{"role": "user", "content": f"Question {number}?"}], f"a:{number}"),
            (f"One of quality {5 + number % 3}", "Another of quality 6"),
        )
        for number in range(start, start + count)
    ]


def better(text: str) -> str:
    """A, B or tie, by the qualities in a question."""
    one, other = map(int, QUALITY.findall(text)[-2:])
    return "A" if one > other else "B" if other > one else "tie"


def completion(content, tokens: int = 7) -> bytes:
    """A reply's body."""
    message = {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": {"total_tokens": tokens}}
    return json.dumps(message).encode()


class ChatServer:
    """Counts what it is asked; `behave(number, text)` may give another (status, headers, body), or None for a verdict.

    A body may be a list of parts, of which a float is a pause in seconds; an empty body closes the connection.
    """

    def __init__(self, behave=lambda number, text: None):
        self.behave, self.lock, self.stopping = behave, threading.Lock(), threading.Event()
        self.requests, self.judged, self.headers, self.bodies = 0, Counter(), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.headers.append(dict(self.headers))
                outer.send(self, outer.behave(0, "") or (200, {}, b'{"data": []}'))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                text = body["messages"][-1]["content"]
                with outer.lock:
                    outer.requests += 1
                    number = outer.requests
                    outer.headers.append(dict(self.headers))
                    outer.bodies.append(body)
                given = outer.behave(number, text)
                if given is None:
                    reply = json.dumps({"reason": "it is so", "better": better(text)})
                    given = (200, {}, completion(reply))
                    with outer.lock:
                        outer.judged[text] += 1
                with contextlib.suppress(OSError):  # whoever asked has gone
                    outer.send(self, given)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def send(self, handler, given):
        """Write an answer, part by part."""
        status, headers, body = given
        if not body:
            handler.close_connection = True
            return
        parts = body if isinstance(body, list) else [body]
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        length = sum(len(part) for part in parts if isinstance(part, bytes))
        handler.send_header("content-length", str(length))
        handler.end_headers()
        for part in parts:
            if isinstance(part, bytes):
                handler.wfile.write(part)
                handler.wfile.flush()
            elif self.stopping.wait(part):
                return

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
