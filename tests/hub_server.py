"""A Hugging Face Hub on localhost, in memory: as much of its API as creating, pushing and loading models needs."""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from secrets import token_hex
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # comes with huggingface_hub
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

DATE = "2025-01-01T00:00:00.000Z"
USERS = {"hf_test": "me", "hf_other": "other"}  # by token
LFS_SUFFIXES = (".safetensors", ".bin")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REPO, NAME = "([^/]+/[^/]+)", "([^/]+)"
ROUTES = []


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **details):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.content = {"error": message, "errors": [{"message": message}], **details}


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    parent: str | None = None
    sha: str = field(default_factory=lambda: token_hex(20))


@dataclass
class Repo:
    """Branches, tags and pull requests (named `refs/pr/1` and so on) give the sha of a commit."""

    private: bool
    commits: list[Commit]
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit:
        sha = (self.pull_requests | self.tags | self.branches).get(revision, revision)
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise HubError(404, "Invalid rev id", "RevisionNotFound")


class HubServer:
    """Serves at `url` during a `with` block. A request for which `fail_on(method, path)` is true gets status 500; one
    for which `lose_answers(method, path)` is true is carried out and gets status 504."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.fail_on = self.lose_answers = lambda method, path: False
        self.lock = threading.Lock()
        self.caches = tempfile.TemporaryDirectory(prefix="hf_hub_")

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.caches.cleanup()

    def environment(self, home) -> dict[str, str]:
        """For a process that starts with this Hub as its own and with its caches in the folder `home`."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_MODULES_CACHE": f"{home}/modules",
            "HF_TOKEN": "hf_test",
        }


def online(monkeypatch, hub: HubServer):
    """Makes `hub` the Hub of this process, which may have started offline. Its caches are gone when `hub` is."""
    for name, value in {
        "AGENT_HARNESSES_PATH": f"{hub.caches.name}/agent-harnesses.json",
        "ENDPOINT": hub.url,
        "HF_HUB_CACHE": f"{hub.caches.name}/hub",
        # With hf_xet installed, huggingface_hub uploads large files to Xet without asking the server.
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    # These two remember the endpoint they were made with.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    # The five retries after a status 500 would wait for 23 seconds.
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def is_lfs(path: str, size: int) -> bool:
    return size > 2**20 or path.endswith(LFS_SUFFIXES)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
    if is_lfs(path, len(content)):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def entries(files: dict[str, bytes]) -> list[dict]:
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    return [file_entry(path, content) for path, content in files.items()] + [
        {"type": "directory", "path": folder, "oid": git_sha(folder.encode())} for folder in folders
    ]


def card_metadata(card: str) -> dict:
    block = re.match(r"---\r?\n(.*?)^---\r?$", card, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid YAML") from error
    if not isinstance(metadata, dict | None):
        raise HubError(400, "The metadata must be a mapping")
    return metadata or {}


def route(method: str, path: str):
    def register(action):
        ROUTES.append((method, re.compile(path), action))
        return action

    return register


class Handler(BaseHTTPRequestHandler):
    """An action takes the groups in its route; it returns the bytes of a file or what to send as JSON."""

    hub: HubServer

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply_headers = {}
        status = 200
        try:
            with self.hub.lock:
                content = self.act()
        except HubError as error:
            status, content = error.status, error.content
            self.reply_headers |= error.headers
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (self.reply_headers | {"Content-Length": len(content)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

    def act(self):
        url = urlsplit(self.path)
        if self.hub.fail_on(self.command, url.path):
            raise HubError(500, "Internal Server Error")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = USERS.get(token)
        self.query = parse_qs(url.query)
        for method, path, action in ROUTES:
            match = path.fullmatch(url.path)
            if match and method == self.command.replace("HEAD", "GET"):
                answer = action(self, *(unquote(group) for group in match.groups("")))
                if self.hub.lose_answers(self.command, url.path):
                    raise HubError(504, "Gateway Timeout")
                return answer
        self.hub.unknown.append(f"{self.command} {self.path}")
        raise HubError(404, f"This Hub does not know {self.command} {self.path}")

    def signed_in(self) -> str:
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def check_owner(self, repo_id: str):
        if not repo_id.startswith(f"{self.signed_in()}/"):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if not repo or (repo.private and not repo_id.startswith(f"{self.user}/")):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str) -> Repo:
        repo = self.readable(repo_id)
        if "create_pr" in self.query:  # open to anyone
            self.signed_in()
        else:
            self.check_owner(repo_id)
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": self.signed_in(), "fullname": self.user, "orgs": [], "auth": token}

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self):
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        found = card_metadata(json.loads(self.body)["content"])
        return {"errors": [], "warnings": [] if found else [{"message": "empty or missing yaml metadata"}]}

    def requested_repo(self) -> tuple[str, dict]:
        request = json.loads(self.body)
        if request.get("type", "model") != "model":
            raise HubError(400, "This Hub has models only")
        repo_id = f"{request['organization'] or self.signed_in()}/{request['name']}"
        self.check_owner(repo_id)
        return repo_id, request

    @route("POST", "/api/repos/create")
    def create_repo(self):
        repo_id, request = self.requested_repo()
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        first = Commit("initial commit", {".gitattributes": GITATTRIBUTES})
        self.hub.repos[repo_id] = Repo(request.get("visibility") == "private", [first], {"main": first.sha})
        return {"url": url}

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        repo_id, _ = self.requested_repo()
        self.readable(repo_id)
        del self.hub.repos[repo_id]

    @route("GET", f"/api/models/{REPO}(?:/revision/{NAME})?")
    def model_info(self, repo_id, revision):
        repo = self.readable(repo_id)
        commit = repo.commit(revision or "main")
        card = card_metadata(commit.files.get("README.md", b"").decode())
        return {
            "id": repo_id,
            "sha": commit.sha,
            "private": repo.private,
            "siblings": [{"rfilename": path, "size": len(content)} for path, content in commit.files.items()],
            "cardData": card,
            "tags": card.get("tags") or [],
        }

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo_id):
        repo = self.readable(repo_id)
        kinds = {
            "branches": ("refs/heads/", repo.branches),
            "tags": ("refs/tags/", repo.tags),
            "pullRequests": ("", repo.pull_requests),
            "converts": ("", {}),
        }
        return {
            kind: [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]
            for kind, (prefix, refs) in kinds.items()
        }

    @route("GET", f"/api/models/{REPO}/tree/{NAME}(?:/{NAME})?")
    def tree(self, repo_id, revision, folder):
        top = PurePosixPath(folder)
        depth = None if self.query["recursive"] == ["true"] else 1
        listed = entries(self.readable(repo_id).commit(revision).files)
        found = [entry for entry in listed if top in PurePosixPath(entry["path"]).parents[:depth]]
        if not found:
            raise HubError(404, "Path does not exist", "EntryNotFound")
        return found

    @route("POST", f"/api/models/{REPO}/paths-info/{NAME}")
    def paths_info(self, repo_id, revision):
        paths = parse_qs(self.body.decode())["paths"]
        return [entry for entry in entries(self.readable(repo_id).commit(revision).files) if entry["path"] in paths]

    @route("GET", f"/{REPO}/resolve/{NAME}/(.+)")
    def resolve(self, repo_id, revision, path):
        commit = self.readable(repo_id).commit(revision)
        self.reply_headers["X-Repo-Commit"] = commit.sha
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        if is_lfs(path, len(content)):
            self.reply_headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": len(content)}
        self.reply_headers["ETag"] = f'"{git_sha(content)}"'
        return content

    @route("POST", f"/api/models/{REPO}/branch/{NAME}")
    def create_branch(self, repo_id, branch):
        repo = self.writable(repo_id)
        self.add_ref(repo.branches, branch, repo.commit(json.loads(self.body).get("startingPoint", "main")))

    @route("POST", f"/api/models/{REPO}/tag/{NAME}")
    def create_tag(self, repo_id, revision):
        repo = self.writable(repo_id)
        self.add_ref(repo.tags, json.loads(self.body)["tag"], repo.commit(revision))

    def add_ref(self, refs: dict[str, str], name: str, commit: Commit):
        if name in refs:
            raise HubError(409, "Reference already exists")
        refs[name] = commit.sha

    @route("DELETE", f"/api/models/{REPO}/(branch|tag)/{NAME}")
    def delete_ref(self, repo_id, kind, name):
        repo = self.writable(repo_id)
        if not (repo.branches if kind == "branch" else repo.tags).pop(name, None):
            raise HubError(404, "Reference does not exist", "RevisionNotFound")

    @route("POST", f"/api/models/{REPO}/preupload/{NAME}")
    def preupload(self, repo_id, revision):
        present = self.writable(repo_id).commit(revision).files
        files = json.loads(self.body)["files"]
        for file in files:
            lfs = is_lfs(file["path"], file["size"])
            file |= {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in present:
                file["oid"] = (sha256 if lfs else git_sha)(present[file["path"]])
        return {"files": files}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id):
        self.readable(repo_id)
        self.signed_in()
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.uploads:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", f"/upload/{NAME}")
    def upload(self, oid):
        if sha256(self.body) != oid:
            raise HubError(400, "The content does not have this hash")
        self.hub.uploads[oid] = self.body

    @route("POST", f"/api/models/{REPO}/commit/{NAME}")
    def commit(self, repo_id, revision):
        repo = self.writable(repo_id)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        parent = repo.commit(revision)
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = Commit(header["value"]["summary"], dict(parent.files), parent.sha)
        for operation in operations:
            self.apply(operation["key"], operation["value"], commit.files)

        reply = {"commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.sha}"}
        if "create_pr" in self.query:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = commit.sha
            reply["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        else:
            refs = repo.pull_requests if revision in repo.pull_requests else repo.branches
            if revision not in refs:
                raise HubError(400, "Commits go to a branch or to a pull request")
            refs[revision] = commit.sha
        repo.commits.append(commit)
        return reply

    @route("GET", f"/api/models/{REPO}/commits/{NAME}")
    def history(self, repo_id, revision):
        repo, found = self.readable(repo_id), []
        sha: str | None = revision
        while sha is not None:
            commit = repo.commit(sha)
            found.append({"id": commit.sha, "title": commit.message, "message": "", "authors": [], "date": DATE})
            sha = commit.parent
        return found

    def apply(self, operation: str, value: dict, files: dict[str, bytes]):
        path = value["path"]
        match operation:
            case "file":
                files[path] = base64.b64decode(value["content"])
            case "lfsFile" if value["oid"] in self.hub.uploads:
                files[path] = self.hub.uploads[value["oid"]]
            case "deletedFile" if path in files:
                del files[path]
            case "deletedFolder":
                for file in [file for file in files if file.startswith(f"{path.removesuffix('/')}/")]:
                    del files[file]
            case "deletedFile":
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            case _:
                raise HubError(400, f"This Hub cannot carry out {operation}")
