"""As much of Google Cloud Storage's JSON API as gcsfs and tensorstore ask for, in this process.

Objects have generations, and a write may be bound to one (`ifGenerationMatch`), on which tensorstore's databases rely.
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import hashlib
import itertools
import json
import pathlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config
import pytest

from jaxembed import storage

BUCKET = "tests"
_PATH = re.compile(r"(?P<upload>/upload)?(/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<o>/o)?(/(?P<name>.+))?")


class _Objects:
    """What the buckets hold: (content, generation) by bucket and name."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.generations = itertools.count(1)
        self.sessions: dict[str, tuple[str, bytes]] = {}  # uploads that have begun: name and content
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    objects: _Objects
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, code: int = 200) -> None:
        self._answer(code, json.dumps(value).encode(), Content_Type="application/json")

    def _described(self, bucket: str, name: str) -> dict[str, str]:
        content, generation = self.objects.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _route(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self._body()
        found = _PATH.fullmatch(url.path)
        bucket = found["bucket"] if found else ""
        with self.objects.lock:
            if bucket not in self.objects.buckets:
                self._json({"error": {"code": 404, "message": "The specified bucket does not exist."}}, 404)
            elif found["upload"]:
                self._upload(bucket, query, body)
            elif not found["o"]:
                self._json({"kind": "storage#bucket", "name": bucket, "location": "US", "storageClass": "STANDARD"})
            elif found["name"]:
                self._object(bucket, unquote(found["name"]), query)
            else:
                self._list(bucket, query)

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = _route

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "resumable" and "upload_id" not in query:
            number = str(next(self.objects.generations))
            self.objects.sessions[number] = json.loads(body)["name"], b""
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            self._answer(200, Location=f"{where}&upload_id={number}")
            return
        if query["uploadType"] == "resumable":
            name, before = self.objects.sessions[query["upload_id"]]
            content = before + body
            self.objects.sessions[query["upload_id"]] = name, content
            if self.headers["Content-Range"].endswith("/*"):
                self._answer(308, Range=f"bytes=0-{len(content) - 1}")
                return
        elif query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, rest = body.split(b"--" + boundary, 2)
            name = json.loads(about.split(b"\n\n", 1)[1])["name"]
            content = rest.split(b"\n\n", 1)[1].rsplit(b"\n--" + boundary, 1)[0]
        else:
            name, content = query["name"], body
        there = self.objects.buckets[bucket].get(name, (b"", 0))[1]
        if int(query.get("ifGenerationMatch", there)) != there:
            self._json({"error": {"code": 412, "message": "precondition"}}, 412)
            return
        self.objects.buckets[bucket][name] = content, next(self.objects.generations)
        self._json(self._described(bucket, name))

    def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
        names = self.objects.buckets[bucket]
        if name not in names:
            self._json({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}, 404)
            return
        content, generation = names[name]
        if self.command == "DELETE":
            del names[name]
            self._answer(204)
        elif query.get("alt") == "media":
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                if first >= len(content):
                    self._answer(416)
                    return
                part = content[first : last + 1]
                where = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                self._answer(206, part, x_goog_generation=str(generation), Content_Range=where)
            else:
                self._answer(200, content, x_goog_generation=str(generation))
        else:
            self._json(self._described(bucket, name))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], {}
        for name in sorted(self.objects.buckets[bucket]):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                prefixes[prefix + head + delimiter] = True
            else:
                items.append(self._described(bucket, name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Says nothing of clients that leave before they have read the answer."""


@contextlib.contextmanager
def serving(copies: pathlib.Path) -> Iterator[str]:
    """Gives the URL of an empty bucket; what is copied out of it goes to `copies`."""
    objects = _Objects()
    objects.buckets[BUCKET] = {}
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"objects": objects}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "tests",  # so that tensorstore looks for no other
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "XDG_CACHE_HOME": str(copies),
        }.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        storage._file_system.cache_clear()
        yield f"gs://{BUCKET}"
    storage._file_system.cache_clear()
    server.shutdown()
