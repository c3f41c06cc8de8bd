# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A stand-in for the Hub on this computer: the part of its HTTP interface that `huggingface_hub` uses to create a
repository, to commit files to it (small ones inside the commit, others by git-lfs first) and to download them again.

It keeps everything in memory, checks tokens, sizes and hashes, and can fail in the ways a network does. Point
`HF_ENDPOINT` at `HubServer().url`, and set `HF_HUB_DISABLE_XET=1`, for it speaks no xet.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_stand_in_token"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Commits of a repository, the latest last: the message, and what each file is then."""

    def __init__(self):
        self.commits = [("initial commit", {})]

    @property
    def files(self):
        return self.commits[-1][1]

    @property
    def sha(self):
        return hashlib.sha1(repr([message for message, _ in self.commits]).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """
    The server, and what a test looks at: `repositories` by name, and `requests`, each a method and a path.

    `failure` says how it answers: None as it should; a status (500, 503, 403) to all, or to the paths in which `where`
    is found; "hang" never.
    """

    daemon_threads = True

    def __init__(self, user="someone"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.user = user
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.objects = {}  # of git-lfs, by sha256
        self.requests = []
        self.failure, self.where = None, ""
        self.let_go = threading.Event()  # ends what hangs
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fail(self, failure, where=""):
        self.failure, self.where = failure, where

    def stop(self):
        self.let_go.set()
        self.shutdown()
        self.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Refused(Exception):
    """What a request is answered with instead."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


def route(method, pattern):
    def register(handle):
        ROUTES.append((method, re.compile(pattern), handle))
        return handle

    return register


ROUTES = []
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.failure is not None and self.server.where in path:
            if self.server.failure == "hang":
                self.server.let_go.wait()
                self.close_connection = True
                return
            self.send_json({"error": "the stand-in was told to fail"}, self.server.failure)
            return
        try:
            for method, pattern, handle in ROUTES:
                match = pattern.fullmatch(path)
                if match and method == self.command:
                    handle(self, body, **match.groupdict())
                    return
            raise Refused(404, f"the stand-in knows no {self.command} {path}", "EntryNotFound")
        except Refused as refused:
            self.send_json({"error": str(refused)}, refused.status, {"X-Error-Code": refused.code or ""})

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def send(self, content, status=200, headers=None, type_="application/octet-stream"):
        self.send_response(status)
        headers = {"Content-Type": type_, "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status=200, headers=None):
        message = value.get("error") if isinstance(value, dict) else None
        headers = {**(headers or {}), **({"X-Error-Message": message} if message else {})}
        self.send(json.dumps(value).encode(), status, headers, "application/json")

    def check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid username or password.")

    def repository(self, name):
        if name not in self.server.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[name]


@route("GET", "/api/whoami-v2")
def whoami(request, body):
    request.check_token()
    request.send_json({"type": "user", "name": request.server.user, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/repos/create")
def create_repo(request, body):
    request.check_token()
    asked = json.loads(body)
    owner = asked["organization"] or request.server.user
    if owner != request.server.user:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    name = f"{owner}/{asked['name']}"
    known = name in request.server.repositories
    request.server.repositories.setdefault(name, Repository())
    answer = {"url": f"{request.server.url}/{name}", "name": name}
    if known:
        request.send_json({**answer, "error": "You already created this model repo"}, 409)
    else:
        request.send_json(answer)


@route("POST", "/api/validate-yaml")
def validate_yaml(request, body):
    ok = json.loads(body)["content"].startswith("---\n")
    request.send_json({"errors": [], "warnings": [] if ok else [{"message": "empty or missing yaml metadata"}]})


@route("POST", f"/api/models/{NAME}/preupload/{REVISION}")
def preupload(request, body, repo, revision):
    request.check_token()
    files = request.repository(repo).files

    def mode(file):
        name = file["path"]
        known = files.get(name)
        oid = None
        if known is not None:  # git's name of what is there, of a pointer if that is what git keeps
            oid = hashlib.sha256(known).hexdigest() if name.endswith(LFS_SUFFIXES) else git_oid(known)
        kind = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
        return {"path": name, "uploadMode": kind, "shouldIgnore": False, "oid": oid}

    request.send_json({"files": [mode(file) for file in json.loads(body)["files"]]})


@route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
def lfs_batch(request, body, repo):
    request.check_token()
    objects = []
    for wanted in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{request.server.url}/lfs/{wanted['oid']}", "header": {}}}
        known = wanted["oid"] in request.server.objects
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if known else {"actions": upload})})
    request.send_json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, "The content is not what was announced")
    request.server.objects[oid] = body
    request.send(b"")


@route("POST", f"/api/models/{NAME}/commit/{REVISION}")
def commit(request, body, repo, revision):
    request.check_token()
    repository = request.repository(repo)
    lines = [json.loads(line) for line in body.splitlines()]
    files, message = dict(repository.files), lines[0]["value"]["summary"]
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in request.server.objects:
                raise Refused(400, f"{value['path']} was not uploaded")
            files[value["path"]] = request.server.objects[value["oid"]]
        else:
            raise Refused(400, f"the stand-in knows no {line['key']}")
    repository.commits.append((message, files))
    url = f"{request.server.url}/{repo}/commit/{repository.sha}"
    request.send_json({"success": True, "commitUrl": url, "commitOid": repository.sha})


@route("GET", f"/api/models/{NAME}(/revision/{REVISION})?")
def model_info(request, body, repo, revision=None):
    repository = request.repository(repo)
    siblings = [{"rfilename": name} for name in repository.files]
    request.send_json({"id": repo, "modelId": repo, "sha": repository.sha, "siblings": siblings, "tags": []})


@route("GET", f"/api/models/{NAME}/tree/{REVISION}(/.*)?")
def tree(request, body, repo, revision):
    recursive = parse_qs(urlsplit(request.path).query).get("recursive", ["false"])[0].lower() == "true"
    files = request.repository(repo).files
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        for name, content in files.items()
        if recursive or "/" not in name
    ]
    request.send_json(entries)


def download(request, body, repo, revision, name):
    repository = request.repository(repo)
    if name not in repository.files:
        raise Refused(404, "Entry not found", "EntryNotFound")
    content = repository.files[name]
    headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{git_oid(content)}"'}
    request.send(content, 200, headers)


for _method in ("GET", "HEAD"):
    route(_method, f"/{NAME}/resolve/{REVISION}/(?P<name>.+)")(download)


if __name__ == "__main__":
    with HubServer() as server:
        print(f"HF_ENDPOINT={server.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN}", flush=True)
        while True:
            time.sleep(1)
