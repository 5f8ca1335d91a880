"""An S3 server on the loopback, moto's, in front of which faults can be put."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

KEY, SECRET = "AKIATESTTESTTESTTEST", "not-a-real-secret-but-a-long-one"


@dataclass
class ObjectStore:
    """A server that runs.

    Attributes:
        endpoint: its address.
        faults: by the end of an object's key, what happens to requests for its bytes: `slow`, `drop`, `forbid`, `cut`,
            or one of these with `<2` for the requests before the second alone, or `>1` for those after the first.
        requests: GET requests for objects, by key.
        pause: seconds that a slow answer takes.
    """

    endpoint: str
    client: Any
    faults: dict[str, str] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    pause: float = 3.0

    def put(self, key: str, data: bytes) -> str:
        """Store an object; its URL."""
        self.client.put_object(Bucket="bucket", Key=key, Body=data, ACL="public-read")
        return f"s3://bucket/{key}"

    def fault(self, key: str) -> str:
        """What is to happen to this request."""
        for end, fault in self.faults.items():
            kind, sign, count = (part or "" for part in re.fullmatch(r"(\w+)([<>]?)(\d*)", fault).groups())
            number = self.requests[key]
            here = number < int(count) if sign == "<" else number > int(count) if sign == ">" else True
            if key.endswith(end) and here:
                return kind
        return ""


def running() -> Iterator[ObjectStore]:
    """Start a server with an empty bucket, and stop it."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    inner = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        key = environ["PATH_INFO"].lstrip("/").partition("/")[2]
        if key.startswith("moved/"):  # moved/HOST/KEY: sent on to that host, or, with -, to this one
            host, _, there = key.removeprefix("moved/").partition("/")
            address = "" if host == "-" else f"http://{host}:{environ['SERVER_PORT']}"
            start_response("302 Found", [("Location", f"{address}/bucket/{there}"), ("Content-Length", "0")])
            return []
        if environ["REQUEST_METHOD"] != "GET" or not key:
            return inner(environ, start_response)
        store.requests[key] += 1
        fault = store.fault(key)
        if fault == "forbid":
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if fault == "drop":
            environ["werkzeug.socket"].shutdown(2)
            start_response("200 OK", [])
            return []
        if fault == "slow":
            time.sleep(store.pause)
        body = b"".join(inner(environ, start_response))
        # The length that was promised is that of all of it.
        return [body[: len(body) // 2]] if fault == "cut" else [body]

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None: ...

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    store = ObjectStore(endpoint, client)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client.create_bucket(Bucket="bucket")
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
