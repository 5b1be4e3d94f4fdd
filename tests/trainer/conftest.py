"""Fixtures of the trainer's tests."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SimpleNamespace]:
    """An S3 store on loopback with an empty ``bucket``; ``client`` is boto3's, which shares no cache with fsspec."""
    # seconds to import, and only the tests of stores need them
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield SimpleNamespace(client=client, url="s3://bucket")
        client.close()
    server.stop()
