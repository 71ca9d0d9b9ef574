"""An object store for tests: moto's server speaks S3 in this process."""

import contextlib
import pathlib
import urllib.request
from collections.abc import Iterator

import pytest

from jaxembed import storage

BUCKET = "tests"


@contextlib.contextmanager
def serving(copies: pathlib.Path) -> Iterator[str]:
    """Gives the URL of an empty bucket; what is copied out of it goes to `copies`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(f"{address}/moto-api/reset", b"").close()  # what an earlier server was given is kept
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "XDG_CACHE_HOME": str(copies),
        }.items():
            patch.setenv(name, value)
        forget_stores()
        import fsspec

        fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
        yield f"s3://{BUCKET}"
    forget_stores()
    server.stop()


def forget_stores() -> None:
    """Lets go of file systems that know an earlier server."""
    import s3fs

    storage._file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def other_machine(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> pathlib.Path:
    """Lets copies go to a new folder, as on another machine; returns where they are in it."""
    folder.mkdir()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "jaxembed"
