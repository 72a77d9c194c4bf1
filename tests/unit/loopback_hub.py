"""A small HTTP server on the loopback that speaks the few words of the Hugging Face hub that reading a data set takes.

    python -m tests.unit.loopback_hub FOLDER     prints its address; FOLDER/<org>/<name>/<files>

A repository has one commit, its branch `main` and its tag `v1`; one whose folder holds `.gated` refuses its files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


def commit_of(repository: Path) -> str:
    """Changes with the files, as a real one does."""
    digest = hashlib.sha1()
    for path in sorted(repository.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(repository).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self.repository(parts[2:4], parts[4:5], parts[5:6], parts[6:])
        elif parts[:1] == ["datasets"] and len(parts) > 5:
            self.repository(parts[1:3], parts[3:4], parts[4:5], parts[5:])
        else:
            self.answer(404, b"{}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.do_GET()

    def repository(self, name: list[str], verb: list[str], revision: list[str], path: list[str]) -> None:
        folder = self.root.joinpath(*name)
        if not folder.is_dir():
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        commit = commit_of(folder)
        if revision and revision[0] not in ("main", "v1", commit):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        place = folder.joinpath(*path)
        match verb:
            case [] | ["revision"]:
                self.json({"id": "/".join(name), "sha": commit, "siblings": [], "tags": []})
            case ["tree"] if place.is_dir():
                found = place.rglob("*") if "recursive=True" in self.path else place.iterdir()
                self.json([self.described(folder, item) for item in sorted(found)])
            case ["paths-info"]:
                found = [folder / item for item in self.paths]
                self.json([self.described(folder, item) for item in found if item.exists()])
            case ["resolve"] if (folder / ".gated").exists():
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            case ["resolve"] if place.is_file():
                body = place.read_bytes()
                self.answer(200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            case _:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

    def described(self, folder: Path, item: Path) -> dict[str, object]:
        kind = "directory" if item.is_dir() else "file"
        content = item.read_bytes() if item.is_file() else b""
        oid = hashlib.sha1(content).hexdigest()
        return {"type": kind, "path": item.relative_to(folder).as_posix(), "oid": oid, "size": len(content)}

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
