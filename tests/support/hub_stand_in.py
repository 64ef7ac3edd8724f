"""A hub on this machine: what its client asks for when it downloads and pushes a model, kept in memory.

One server stands for the hub, another for the store of large files that it redirects to, as it is in the world.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

TOKEN, READ_ONLY = "hf_" + "w" * 30, "hf_" + "r" * 30
USERS = {TOKEN: ("ada", "write"), READ_ONLY: ("ada", "read")}
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
HF_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class Repository:
    """Files by commit, and commits by branch or tag."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    log: list[str] = dataclasses.field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        listing = sorted((name, sha256(content)) for name, content in files.items())
        oid = hashlib.sha1(repr((self.refs.get(branch), len(self.commits), listing)).encode()).hexdigest()
        self.commits[oid], self.refs[branch] = dict(files), oid
        self.log.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        oid = self.refs.get(revision, revision)
        return oid if oid in self.commits else None


class Answer(Exception):
    """What to send back."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()


def missing(code: str, status: int = 404) -> Answer:
    return Answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)


class Hub:
    """The state, what was asked of it, how many bytes it has sent, and what it shall do wrong: `faults` maps part of a
    request to a status."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, int] = {}
        self.sent = 0
        self.url = self.store_url = ""

    def add(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> str:
        """A repository with all files of a folder; returns the commit. Called again, it moves `main`."""
        repository = self.repositories.setdefault(name, Repository(private, gated))
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return repository.commit(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[name].commits[self.repositories[name].refs[revision]]

    def count(self, part: str) -> int:
        """How many requests had this in them."""
        return sum(part in line for line in self.asked)

    # ------------------------------------------------------------------------------------------------ who

    def user(self, headers: Any) -> str | None:
        token = (headers.get("authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        return USERS[token][0] if token else None

    def writer(self, headers: Any, owner: str) -> None:
        user = self.user(headers)
        token = (headers.get("authorization") or "").removeprefix("Bearer ")
        if user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        if owner not in (user, "lab") or USERS[token][1] != "write":
            raise Answer(403, {"error": "no write access"}, X_Error_Message="no write access")

    def readable(self, name: str, headers: Any, *, content: bool = False) -> Repository:
        user, found = self.user(headers), self.repositories.get(name)
        if found is None or (found.private and name.split("/")[0] not in (user, "lab" if user else None)):
            raise missing("RepoNotFound", 404 if user else 401)
        if found.gated and content:
            raise missing("GatedRepo", 403 if user else 401)
        return found

    def revision(self, name: str, revision: str, headers: Any, **how: bool) -> tuple[str, dict[str, bytes]]:
        repository = self.readable(name, headers, **how)
        oid = repository.at(unquote(revision))
        if oid is None:
            raise missing("RevisionNotFound")
        return oid, repository.commits[oid]

    # ------------------------------------------------------------------------------------------------ requests

    def whoami(self, headers: Any, body: bytes) -> Answer:
        user = self.user(headers)
        if user is None:
            return Answer(401, {"error": "Invalid username or password."})
        role = USERS[headers["authorization"].removeprefix("Bearer ")][1]
        orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
        return Answer(200, {"name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def info(self, headers: Any, body: bytes, repo: str, revision: str | None = None) -> Answer:
        oid, files = self.revision(repo, revision or "main", headers)
        siblings = [{"rfilename": name} for name in files]
        private = self.repositories[repo].private
        return Answer(200, {"id": repo, "sha": oid, "private": private, "siblings": siblings})

    def tree(self, headers: Any, body: bytes, repo: str, revision: str, folder: str | None, deep: str | None) -> Answer:
        """Files of a folder: of the whole tree, or `deep` ones as their folders."""
        _, files = self.revision(repo, revision, headers)
        inside, found = f"{unquote(folder)}/" if folder else "", {}
        for name, content in files.items():
            first, slash, _ = name.removeprefix(inside).partition("/")
            if name.startswith(inside) and slash and not deep:
                found[inside + first] = _directory(inside + first)
            elif name.startswith(inside):
                found[name] = _entry(name, content)
        if folder and not found:
            return missing("EntryNotFound")
        return Answer(200, list(found.values()))

    def paths(self, headers: Any, body: bytes, repo: str, revision: str) -> Answer:
        _, files = self.revision(repo, revision, headers)
        found = []
        for path in parse_qs(body.decode())["paths"]:
            if path in files:
                found.append(_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(_directory(path))
        return Answer(200, found)

    def resolve(self, headers: Any, body: bytes, repo: str, revision: str, path: str) -> Answer:
        oid, files = self.revision(repo, revision, headers, content=True)
        if (content := files.get(unquote(path))) is None:
            return missing("EntryNotFound")
        if not _is_large(path):
            return Answer(200, content, ETag=f'"{git_digest(content)}"', X_Repo_Commit=oid)
        self.store[sha256(content)] = content
        linked = {"X_Linked_Etag": f'"{sha256(content)}"', "X_Linked_Size": str(len(content))}
        return Answer(302, None, Location=f"{self.store_url}/{sha256(content)}", X_Repo_Commit=oid, **linked)

    def create(self, headers: Any, body: bytes) -> Answer:
        wanted = json.loads(body)
        owner = wanted["organization"] or self.user(headers) or ""
        self.writer(headers, owner)
        name = f"{owner}/{wanted['name']}"
        if name in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        return Answer(200, {"url": f"{self.url}/{name}"})

    def branch(self, headers: Any, body: bytes, repo: str, branch: str) -> Answer:
        self.writer(headers, repo.split("/")[0])
        refs = self.repositories[repo].refs
        if unquote(branch) in refs:
            return Answer(409, {"error": "exists"})
        refs[unquote(branch)] = refs["main"]
        return Answer(200, {})

    def check_card(self, headers: Any, body: bytes) -> Answer:
        front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        named = [front.get("base_model", "x"), *front.get("datasets", ())]
        wrong = [name for name in named if not HF_ID.fullmatch(name)]
        errors = [{"message": f'"{name}" is not valid. Use an id of the hub.'} for name in wrong]
        return Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, headers: Any, body: bytes, repo: str, revision: str) -> Answer:
        self.writer(headers, repo.split("/")[0])
        _, files = self.revision(repo, revision, headers)
        ignored = files.get(".gitignore", b"").decode().split()
        rows = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if _is_large(path) else "regular"
            same = _entry(path, files[path])["oid"] if path in files and mode == "regular" else None
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": same})
        return Answer(200, {"files": rows})

    def batch(self, headers: Any, body: bytes, repo: str) -> Answer:
        self.writer(headers, repo.split("/")[0])
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.store_url}/{wanted['oid']}"}
            there = wanted["oid"] in self.store
            objects.append({**wanted, **({} if there else {"actions": {"upload": upload}})})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, headers: Any, body: bytes, repo: str, revision: str) -> Answer:
        self.writer(headers, repo.split("/")[0])
        repository, branch = self.repositories[repo], unquote(revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repository.commits[repository.refs[branch]])
        if header.get("parentCommit") not in (None, repository.refs[branch]):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for value in ({"key": line["key"], **line["value"]} for line in lines[1:]):
            match value["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.store[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = repository.commit(files, branch, header["summary"])
        return Answer(200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid})

    def get_large(self, headers: Any, body: bytes, digest: str) -> Answer:
        assert headers.get("authorization") is None, "the store must not see the token"
        return Answer(200, self.store[digest]) if digest in self.store else Answer(404)

    def put_large(self, headers: Any, body: bytes, digest: str) -> Answer:
        if sha256(body) != digest:
            return Answer(400)
        self.store[digest] = body
        return Answer(200)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _directory(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": git_digest(name.encode()), "size": 0}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    if not _is_large(name):
        return {"type": "file", "path": name, "size": len(content), "oid": git_digest(content)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(content), "oid": git_digest(pointer.encode()), "lfs": lfs}


ROUTES = tuple(
    (
        method,
        re.compile(
            pattern.replace("KIND", "(?:models|datasets)").replace("REPO", NAME).replace("REV", "(?P<revision>[^/?]+)")
        ),
        handler,
    )
    for method, pattern, handler in (
        ("GET", "/api/whoami-v2", Hub.whoami),
        ("GET", "/api/KIND/REPO", Hub.info),
        ("GET", "/api/KIND/REPO/revision/REV", Hub.info),
        ("GET", "/api/KIND/REPO/tree/REV(?:/(?P<folder>[^?]+))?(?P<deep>[?]deep)?", Hub.tree),
        ("POST", "/api/KIND/REPO/paths-info/REV", Hub.paths),
        ("HEAD", "(?:/datasets)?/REPO/resolve/REV/(?P<path>.+)", Hub.resolve),
        ("GET", "(?:/datasets)?/REPO/resolve/REV/(?P<path>.+)", Hub.resolve),
        ("POST", "/api/repos/create", Hub.create),
        ("POST", "/api/models/REPO/branch/(?P<branch>[^/]+)", Hub.branch),
        ("POST", "/api/validate-yaml", Hub.check_card),
        ("POST", "/api/models/REPO/preupload/REV", Hub.preupload),
        ("POST", "/REPO[.]git/info/lfs/objects/batch", Hub.batch),
        ("POST", "/api/models/REPO/commit/REV", Hub.commit),
        ("GET", "/(?P<digest>[0-9a-f]{64})", Hub.get_large),
        ("PUT", "/(?P<digest>[0-9a-f]{64})", Hub.put_large),
    )
)


class Handler(BaseHTTPRequestHandler):
    """One request; which hub it is for stands in the server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is said on the terminal."""

    def answer(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        path += "?deep" * ("recursive=true" in self.path.lower())
        self.server.hub.asked.append(f"{self.command} {path}")
        try:
            found = self._answer(path, body)
        except Answer as answer:
            found = answer
        if self.command == "GET" and found.status == 200 and (part := self.headers.get("range")):
            first, last = (int(place) for place in part.removeprefix("bytes=").split("-"))
            found = Answer(206, found.body[first : last + 1], **found.headers)
        self.server.hub.sent += len(found.body) if self.command == "GET" else 0
        self.send_response(found.status)
        for name, value in {**found.headers, "Content-Length": str(len(found.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.body)

    def _answer(self, path: str, body: bytes) -> Answer:
        for part, status in self.server.hub.faults.items():
            if part in f"{self.command} {path}":
                return Answer(status, {"error": "as the test wants it"})
        for method, pattern, handle in ROUTES:
            if method == self.command and (match := pattern.fullmatch(path)):
                return handle(self.server.hub, self.headers, body, **match.groupdict())
        return Answer(404)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = answer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub and its store, for as long as the block lasts."""
    hub = Hub()
    servers = [Server(hub), Server(hub)]
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def use(patch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """The hub's client, in this process, talks to the stand-in and keeps its cache in `home`; so does datasets."""
    for name, value in {"HF_ENDPOINT": hub.url, "HF_DATASETS_CACHE": home / "datasets"}.items():
        patch.setattr(datasets.config, name, value)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    disable_progress_bars()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_hub(far: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {file: content for file, content in far.files(name, revision).items() if file != ".gitattributes"}
