"""An S3 server for tests, which is reached over HTTP."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pyarrow.fs as pafs
from processes import free_ports

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server(log: str) -> Iterator[str]:
    """Starts a server with a bucket named `bucket`. Yields the options of an s3:// URI for this server."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | CREDENTIALS)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, open(log).read()  # noqa: PT018, SIM115
                time.sleep(0.2)
        server_options = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
        keys = {"access_key": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secret_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        pafs.S3FileSystem(**server_options, **keys, allow_bucket_creation=True).create_dir("bucket")
        yield "&".join(f"{key}={value}" for key, value in server_options.items())
    finally:
        server.kill()
        server.wait()
