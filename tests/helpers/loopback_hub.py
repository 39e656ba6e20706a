"""A Hugging Face hub for one dataset on the loopback, with faults on request.

It speaks what huggingface_hub asks for: the commit of a revision, the tree of a commit with sizes and LFS hashes, and files
at `resolve`, redirected to another path as the real hub redirects to its CDN, with ranges.
"""

import hashlib
import json
import re
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


class LoopbackHub:
    """Serves `files` (name: bytes) of dataset `repository`; use it as a context manager.

    faults[name]: what goes wrong at the next GETs of that file ("tree" is the listing), one after the other: a status,
    "cut" (half of what is left, then the connection is lost), "short" and "long" (another length, and closed properly),
    "flip" (one byte is another), "no range" (answers 200 to a range), "trickle" (a byte now and then, for ever), "endless" (no
    length, and no end), "around" (redirected to itself), "file" (redirected to a local file). listing: what is told in place
    of the true listing, and `commit` of the true commit. sent: bytes of endless bodies. requests: (method, path, range) of
    all requests.
    """

    def __init__(self, repository: str, files: dict[str, bytes]):
        self.repository, self.files = repository, dict(files)
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self.slow_s = 0.0  # before every 64 KiB
        self.pause = threading.Event()
        self.commit: object = COMMIT
        self.listing: bytes | None = None
        self.next_page: str | None = None
        self.sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """A client that leaves in the middle is none."""
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(request, client_address)  # type: ignore[arg-type]

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.pause.set()
        self.server.shutdown()
        self.server.server_close()

    def fetches(self, name: str) -> list[str | None]:
        """The ranges of all GETs of a file's bytes."""
        return [span for method, path, span in self.requests if method == "GET" and path == f"/cdn/{name}"]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        span = request.headers.get("Range")
        self.requests.append((request.command, path, span))
        api = f"/api/datasets/{self.repository}"
        if path.startswith(api):
            self.tokens.add(request.headers.get("Authorization"))
            fault = self.faults["tree"].pop(0) if self.faults["tree"] else None
            if isinstance(fault, int):
                return self.send(request, fault)
            revision = path.removeprefix(api).split("/")[2]
            if revision not in ("main", COMMIT):
                return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
            headers = {"Content-Type": "application/json"}
            if not path.startswith(f"{api}/tree/"):
                about = {"id": self.repository, "sha": self.commit}
                return self.send(request, 200, headers, json.dumps(about).encode())
            if self.next_page:
                headers["Link"] = f'<{self.next_page}>; rel="next"'
            listing = json.dumps(self.tree()).encode() if self.listing is None else self.listing
            return self.send(request, 200, headers, listing)
        name = path.rpartition("/")[2]
        if path.startswith("/api/"):
            return self.send(request, 404, {"X-Error-Code": "RepoNotFound"})
        if name not in self.files:
            return self.send(request, 404, {"X-Error-Code": "EntryNotFound"})
        if path == f"/datasets/{self.repository}/resolve/{COMMIT}/{name}":
            size = str(len(self.files[name]))
            return self.send(
                request,
                302,
                {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"', "X-Linked-Size": size, "Location": f"/cdn/{name}"},
            )
        return self.send_file(request, name, span)

    def tree(self) -> list[dict[str, object]]:
        return [{"type": "file", "path": "README.md", "oid": "0" * 40, "size": 5}] + [
            {
                "type": "file",
                "path": name,
                "oid": "0" * 40,
                "size": len(content),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134},
            }
            for name, content in self.files.items()
        ]

    def send_file(self, request: BaseHTTPRequestHandler, name: str, span: str | None) -> None:
        content = self.files[name]
        fault = self.faults[name].pop(0) if request.command == "GET" and self.faults[name] else None
        if isinstance(fault, int):
            return self.send(request, fault, {"Retry-After": "0"} if fault == 429 else {})
        if fault in ("around", "file"):
            return self.send(request, 302, {"Location": "file:///etc/passwd" if fault == "file" else f"/cdn/{name}"})
        if fault in ("trickle", "endless"):
            return self.send_for_ever(request, *((b"x", 0.05) if fault == "trickle" else (bytes(2**16), 0.0)))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "") if fault != "no range" else None
        start, stop = (int(asked[1]), int(asked[2] or len(content)) + 1) if asked else (0, len(content))
        if start >= len(content):
            return self.send(request, 416, {"Content-Range": f"bytes */{len(content)}"})
        part = content[start:stop]
        if fault == "flip":
            part = part[:-7] + bytes([part[-7] ^ 1]) + part[-6:]
        part = {"short": part[: len(part) // 2], "long": part + b"more"}.get(str(fault), part)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.send(request, 206 if asked else 200, headers, part, cut=fault == "cut")

    def send_for_ever(self, request: BaseHTTPRequestHandler, piece: bytes, wait_s: float) -> None:
        """In chunks, up to 64 MiB, so that a client without bounds ends too."""
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.close_connection = True
        try:
            while self.sent < 2**26 and not self.pause.wait(wait_s):
                request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.sent += len(piece)
        except OSError:
            pass  # the client left

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        cut: bool = False,
    ) -> None:
        request.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        body = body[: len(body) // 2] if cut else body
        try:
            for at in range(0, len(body), 2**16):
                if self.slow_s:
                    self.pause.wait(self.slow_s)
                request.wfile.write(body[at : at + 2**16])
                request.wfile.flush()
        except OSError:
            request.close_connection = True  # the client left
        if cut:
            request.close_connection = True
