"""A stand-in for Google Cloud Storage on this machine: as much of its JSON API as TensorStore and gcsfs call.

Objects lie in memory. As there, a write is whole or not at all, a listing has every write before it, and preconditions
on an object's generation hold.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest

API = re.compile(r"(?:/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o(?:/(?P<name>.+))?)?")
Answer = tuple[int, dict[str, Any] | bytes, dict[str, str]]


class Stored(NamedTuple):
    """An object."""

    data: bytes
    generation: int


class ObjectStore:
    """The objects by bucket and name; while it is `shut`, every request is answered with that status."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Stored] = {}
        self.shut: int | None = None
        self.bits: dict[str, bytes] = {}
        self._lock, self._made = threading.RLock(), 0

    def names(self, bucket: str) -> list[str]:
        """Of all objects of a bucket, in order."""
        with self._lock:
            return sorted(name for there, name in self.objects if there == bucket)

    def put(self, at: tuple[str, str], data: bytes, wanted: str | None = None) -> Answer:
        """Write an object; where a generation is `wanted` (0: none), only if it has that."""
        with self._lock:
            found = self.objects.get(at)
            if wanted not in (None, str(found.generation if found else 0)):
                return missed()
            self._made += 1
            self.objects[at] = Stored(data, self._made)
            return 200, self.about(at), {}

    def about(self, at: tuple[str, str]) -> dict[str, Any]:
        """What the API says of an object."""
        data, generation = self.objects[at]
        sums = {"md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00Z")
        named = {"bucket": at[0], "name": at[1], "generation": str(generation), "metageneration": "1"}
        return {"kind": "storage#object", "size": str(len(data)), **named, **sums, **times}

    def listed(self, bucket: str, query: dict[str, str]) -> Answer:
        """Objects below a prefix; with a delimiter, what is further below by the beginning of its name only."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        with self._lock:
            names = [name for name in self.names(bucket) if name.startswith(prefix)]
            rest = {name: name.removeprefix(prefix) for name in names}
            further = {name for name in names if delimiter and delimiter in rest[name]}
            items = [self.about((bucket, name)) for name in names if name not in further]
        prefixes = sorted({prefix + rest[name].split(delimiter or "/")[0] + "/" for name in further})
        return 200, {"kind": "storage#objects", "items": items, "prefixes": prefixes}, {}

    def read(self, at: tuple[str, str], query: dict[str, str], span: str | None) -> Answer:
        """An object's bytes, or what there is to say of it."""
        with self._lock:
            if at not in self.objects:
                return 404, {"error": {"code": 404, "message": f"No such object: {'/'.join(at)}"}}, {}
            data, generation = self.objects[at]
            if query.get("ifGenerationNotMatch") == str(generation):
                return 304, b"", {}
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return missed()
            if query.get("alt") != "media":
                return 200, self.about(at), {}
        headers = {"X-Goog-Generation": str(generation)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", span or "")
        if asked is None:
            return 200, data, headers
        first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
        last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
        return 206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}

    def delete(self, at: tuple[str, str]) -> Answer:
        """Forget an object."""
        with self._lock:
            return (204, b"", {}) if self.objects.pop(at, None) else (404, {"error": {"code": 404}}, {})


def missed() -> Answer:
    """A precondition does not hold."""
    return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its second packet
    wbufsize = -1
    store: ClassVar[ObjectStore]

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _serve(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked is gone
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said, headers = self._answer(body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, body: bytes) -> Answer:
        if self.store.shut is not None:
            return self.store.shut, {"error": {"code": self.store.shut, "message": "shut"}}, {}
        url = urlsplit(self.path)
        query, asked = dict(parse_qsl(url.query)), API.fullmatch(url.path)
        if asked is None:
            return 404, {"error": {"code": 404, "message": f"not built: {self.path}"}}, {}
        bucket, name = unquote(asked["bucket"]), asked["name"]
        if url.path.startswith("/upload"):
            return self._upload(bucket, query, body)
        if not asked["objects"]:
            return 200, {"kind": "storage#bucket", "name": bucket}, {}
        if name is None:
            return self.store.listed(bucket, query)
        if copied := re.fullmatch(r"(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", name):
            source, *target = map(unquote, copied.groups())
            status, data, _ = self.store.read((bucket, source), {"alt": "media"}, None)
            if not isinstance(data, bytes):
                return status, data, {}
            return 200, {"done": True, "resource": self.store.put((target[0], target[1]), data)[1]}, {}
        at = bucket, unquote(name)
        return self.store.delete(at) if self.command == "DELETE" else self.store.read(at, query, self.headers["Range"])

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> Answer:
        """An object in one piece, in two parts, or bit by bit: to an address that is given first."""
        if query["uploadType"] == "resumable" and "bits" not in query:
            named = query.get("name") or json.loads(body)["name"]
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{quote(bucket, safe='')}/o?uploadType=resumable"
            return 200, {}, {"Location": f"{place}&bits={uuid.uuid4().hex}&name={quote(named, safe='')}"}
        if query["uploadType"] == "multipart":
            named, data = self._parts(body)
        else:
            named, data = query["name"], self.store.bits.pop(query.get("bits", ""), b"") + body
        if str(self.headers["Content-Range"]).endswith("/*"):  # there is more to come
            self.store.bits[query["bits"]] = data
            return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
        return self.store.put((bucket, named), data, query.get("ifGenerationMatch"))

    def _parts(self, body: bytes) -> tuple[str, bytes]:
        """Name and bytes of an upload in two parts."""
        boundary = re.fullmatch(r'multipart/related; boundary="?([^"]+)"?', self.headers["Content-Type"])
        assert boundary is not None, self.headers["Content-Type"]
        line = b"--" + boundary[1].encode()
        about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(line)[1:3])
        return json.loads(about)["name"], data.removesuffix(b"\n").removesuffix(b"\r")


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as TensorStore opens."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: who asked is gone."""


@functools.cache
def served() -> tuple[ObjectStore, dict[str, str]]:
    """A store, and the environment of whoever is to use it in place of the real one: one for a process and all that it
    starts, as TensorStore reads its environment once."""
    store = ObjectStore()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    asking = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    return store, {**asking, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def empty_store() -> Iterator[ObjectStore]:
    """That store, empty, for this process and while the block lasts."""
    store, environment = served()
    store.objects.clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield store
    store.shut = None
