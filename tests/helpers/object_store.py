"""A local object store that speaks S3's protocol, for tests: moto's server on loopback, in this process."""

import logging
import urllib.request

import pytest

BUCKET = "data"


class Store:
    """The store, empty at first; its objects stay when it is stopped and started again."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make = ThreadedMotoServer
        self._port = 0
        self.start()
        # All servers of a process have the same objects.
        urllib.request.urlopen(f"http://127.0.0.1:{self._port}/moto-api/reset", data=b"").close()

    def start(self) -> None:
        self._server = self._make(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    @property
    def environment(self) -> dict[str, str]:
        """By which the libraries find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def start_store():
    """A generator for a fixture: a store with a bucket, found by this process and those that it starts."""
    pytest.importorskip("s3fs", reason="needs jaxsft[buckets]")
    pytest.importorskip("moto", reason="needs moto")
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # which may know the address of a store before
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield store
    store.stop()


def upload(folder, target):
    """All files of a folder on this disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (target / str(path.relative_to(folder))).write_bytes(path.read_bytes())


def download(source, folder):
    """All objects of a folder in a bucket, to this disk."""
    for each in source.files():
        to = folder / str(each.relative_to(source))
        to.parent.mkdir(parents=True, exist_ok=True)
        each.download(to)
    return folder
