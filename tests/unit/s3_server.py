"""A real S3 server, moto's, on the loopback and in its own process.

python -m tests.unit.s3_server      makes the bucket `bucket`, prints its address, serves until its stdin is closed
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

BUCKET = "bucket"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with an empty bucket; it ends with the block, or with this process."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.s3_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, "the server did not start"
        yield address
    finally:
        server.communicate()


def environment(address: str) -> dict[str, str]:
    """What a process must have in its environment to use the server, and nothing else."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


def ask(address: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and content of a plain request that is not signed."""
    connection = HTTPConnection(address.removeprefix("http://"))
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def one_create_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """S3 decides who was first. Moto looks whether the object is there, and then makes it."""
    lock = threading.Lock()

    def serialized(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with lock if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            return application(environ, start_response)

    return serialized


def serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = one_create_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    status, said = ask(address, "PUT", f"/{BUCKET}")
    assert status == 200, said
    print(address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
