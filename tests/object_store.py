"""An S3 server of this machine (moto, in a process of its own), and a wire to it that is slow and can be cut."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(words: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server of this machine, once it listens."""
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    for _ in range(2000):
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.01)
    process.kill()
    raise RuntimeError(f"{words} does not listen")


class Wire:
    """What carries bytes to and from a server, as a process, which can be ended and started again at the same port."""

    def __init__(self, target: int, rate: int) -> None:
        self.port = free_port()
        self._words = [__file__, str(self.port), str(target), str(rate)]
        self._process = started(self._words, self.port)

    def cut(self) -> None:
        """End it, and every transfer with it: from now on connections are refused."""
        self._process.kill()
        self._process.wait()

    def mend(self) -> None:
        self.cut()
        self._process = started(self._words, self.port)


class Store:
    """The server, with one bucket. It is read and changed by boto3, which nothing of the package uses.

    Attributes:
        environment: variables with which a command finds it, by a wire.
        wire: that wire.
    """

    def __init__(self, port: int, rate: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.wire = Wire(port, rate)
        nothing = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        self.environment = {**KEYS, **nothing, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.wire.port}"}
        self._clients: dict[tuple[str, int], Any] = {}
        self._client("s3").create_bucket(Bucket=BUCKET)

    def _client(self, service: str) -> Any:
        """Straight to the server; of this process, since a forked one would share its connections."""
        import boto3

        key = (service, os.getpid())
        if key not in self._clients:
            session = boto3.Session(KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
            self._clients[key] = session.client(service, endpoint_url=self.url)
        return self._clients[key]

    def enforce(self) -> None:
        """From now on keys count, and the environment's is none."""
        self._authenticate("0")

    def trust(self) -> None:
        """Whoever comes may do all, as at the beginning."""
        self._authenticate("inf")

    def reader(self) -> dict[str, str]:
        """The environment of someone who may read and list, and no more."""
        iam = self._client("iam")
        iam.create_user(UserName="reader")
        allowed = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def _authenticate(self, after: str) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", after.encode(), headers))

    def names(self, prefix: str) -> list[str]:
        pages = self._client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", ())]

    def get(self, name: str) -> bytes:
        return self._client("s3").get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def put(self, name: str, data: bytes) -> None:
        self._client("s3").put_object(Bucket=BUCKET, Key=name, Body=data)

    def remove(self, name: str) -> None:
        self._client("s3").delete_object(Bucket=BUCKET, Key=name)

    def put_folder(self, folder: Path, prefix: str) -> None:
        for file in (file for file in folder.rglob("*") if file.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

    def copy(self, prefix: str, to: Path) -> Path:
        for name in self.names(prefix):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(self.get(f"{prefix}/{name}"))
        return to


@contextmanager
def served(rate: int = 0) -> Iterator[Store]:
    """A store that carries `rate` bytes a second in either direction of a connection; 0: as fast as it can."""
    port = free_port()
    server = started(["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    try:
        store = Store(port, rate)
        try:
            yield store
        finally:
            store.wire.cut()
    finally:
        server.kill()
        server.wait()


async def _carry(port: int, target: int, rate: int) -> None:
    async def one_way(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(16 << 10):
                to.write(data)
                await to.drain()
                if rate:
                    await asyncio.sleep(len(data) / rate)
        except ConnectionError:
            pass
        finally:
            to.close()

    async def both_ways(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(one_way(source, back), one_way(there, to))

    async with await asyncio.start_server(both_ways, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_carry(*map(int, sys.argv[1:])))
