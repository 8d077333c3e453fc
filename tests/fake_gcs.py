"""A Google Cloud Storage on the loopback, in memory: as much of its JSON API as the tests use."""

import contextlib
import email
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

_OBJECT = re.compile(
    r"(?:/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>.+))?)?"
)


class Store(http.server.ThreadingHTTPServer):
    """Objects by (bucket, name) as (bytes, generation); every bucket exists."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, str]] = {}
        self.lock, self.generation = threading.Lock(), 0

    def handle_error(self, request, client_address) -> None:
        """Says nothing of clients that left before they were answered."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, key: tuple[str, str], data: bytes) -> dict:
        """Stores an object and describes it."""
        self.generation += 1
        self.objects[key] = data, self.generation
        return self.describe(key)

    def describe(self, key: tuple[str, str]) -> dict:
        """The resource of an object."""
        data, generation = self.objects[key]
        return {
            "kind": "storage#object", "bucket": key[0], "name": key[1], "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "contentType": "text/plain",
            "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
        }  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *_):
        """Says nothing."""

    def answer(self, status: int, body=b"", **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def dispatch(self) -> None:
        path, _, query = self.path.partition("?")
        args = dict(urllib.parse.parse_qsl(query))
        body = self.body()
        found = _OBJECT.fullmatch(path)
        with self.server.lock:
            if found is None:
                return self.answer(404, {"error": {"code": 404, "message": path}})
            bucket = urllib.parse.unquote(found["bucket"])
            if found["name"] is None:
                return self.of_bucket(bucket, args, body)
            name, verb, target = re.fullmatch(r"(.+?)(?:/(moveTo)/o/(.+))?", found["name"]).groups()
            key = bucket, urllib.parse.unquote(name)
            if verb:
                return self.move(key, (bucket, urllib.parse.unquote(target)))
            return self.of_object(key, args)

    do_GET = do_POST = do_PUT = do_DELETE = dispatch

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def of_bucket(self, bucket: str, args: dict, body: bytes) -> None:
        if "/upload/" in self.path:
            return self.upload(bucket, args, body)
        if not self.path.partition("?")[0].endswith("/o"):
            return self.answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        prefix, delimiter = args.get("prefix", ""), args.get("delimiter")
        names = sorted(n for b, n in self.server.objects if b == bucket and n.startswith(prefix))
        names = [n for n in names if args.get("startOffset", "") <= n]
        names = [n for n in names if "endOffset" not in args or n < args["endOffset"]]
        prefixes = set()
        if delimiter:
            deeper = {n for n in names if delimiter in n[len(prefix) :]}
            prefixes = {
                prefix + n[len(prefix) :].partition(delimiter)[0] + delimiter for n in deeper
            }
            names = [n for n in names if n not in deeper]
        items = [self.server.describe((bucket, n)) for n in names]
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self, bucket: str, args: dict, body: bytes) -> None:
        kind, name = args.get("uploadType"), args.get("name")
        if self.command == "PUT" or "upload_id" in args:
            return self.answer(200, self.server.put(self.server.uploads[args["upload_id"]], body))
        if kind == "multipart":
            head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            meta, content = email.message_from_bytes(head + body).get_payload()
            name, body = json.loads(meta.get_payload())["name"], content.get_payload(decode=True)
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            ident = str(len(self.server.uploads))
            self.server.uploads[ident] = bucket, name
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={ident}"
            return self.answer(200, Location=where)
        held = self.server.objects.get((bucket, name), (b"", 0))[1]
        if int(args.get("ifGenerationMatch", held)) != held:
            return self.answer(412, {"error": {"code": 412, "message": "generation"}})
        return self.answer(200, self.server.put((bucket, name), body))

    def of_object(self, key: tuple[str, str], args: dict) -> None:
        if key not in self.server.objects:
            return self.answer(404, {"error": {"code": 404, "message": f"no object {key}"}})
        data, generation = self.server.objects[key]
        if int(args.get("ifGenerationMatch", generation)) != generation:
            return self.answer(412, {"error": {"code": 412, "message": "generation"}})
        if int(args.get("ifGenerationNotMatch", -1)) == generation:
            return self.answer(304)
        if self.command == "DELETE":
            del self.server.objects[key]
            return self.answer(204)
        if args.get("alt") != "media" and "/download/" not in self.path:
            return self.answer(200, self.server.describe(key))
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        extra = {"x_goog_generation": generation}
        if part is None:
            return self.answer(200, data, **extra)
        start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        extra["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        return self.answer(206, data[start : end + 1], **extra)

    def move(self, source: tuple[str, str], target: tuple[str, str]) -> None:
        if source not in self.server.objects:
            return self.answer(404, {"error": {"code": 404, "message": f"no object {source}"}})
        return self.answer(200, self.server.put(target, self.server.objects.pop(source)[0]))


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """A store that listens while the context lasts."""
    store = Store()
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        thread.join()
        store.server_close()


def environment(store: Store) -> dict[str, str]:
    """What tells gcsfs, google-cloud-storage and TensorStore to use this store."""
    return {
        "STORAGE_EMULATOR_HOST": store.url,
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it is asked by gRPC
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
