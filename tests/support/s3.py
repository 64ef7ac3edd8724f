"""A stand-in for S3 on this machine: moto's server, which is made for that."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest

FAKE = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}


@functools.cache
def served() -> str:
    """The server's address: one for a process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return "http://{}:{}".format(*server.get_host_and_port())


@contextlib.contextmanager
def empty_bucket(name: str) -> Iterator[Any]:
    """A client of an empty bucket, in place of the real ones for this process while the block lasts."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**FAKE, "AWS_ENDPOINT_URL": served()}.items():
            patch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=name)
        yield client
        for found in client.list_objects_v2(Bucket=name).get("Contents", []):
            client.delete_object(Bucket=name, Key=found["Key"])
        client.delete_bucket(Bucket=name)
        client.close()
