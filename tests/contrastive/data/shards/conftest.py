import contextlib
import os
import shutil
import socket
import subprocess

import pytest

from tests import tiny
from tests.faults.harness import free_port
from tests.object_server import ObjectServer


@pytest.fixture
def serve():
    """Start servers of folders; they end with the test."""
    servers = []

    def start(folder, **options):
        servers.append(ObjectServer(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def nginx(tmp_path):
    """Start nginx servers of folders, where it is installed; they end with the test."""
    command = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if command is None:
        pytest.skip("nginx is not installed")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    stores = " ".join(f"{kind}_temp_path {tmp_path / kind};" for kind in kinds)
    with contextlib.ExitStack() as servers:

        def start(folder):
            port = free_port()
            (tmp_path / "nginx.conf").write_text(
                f"daemon off; master_process off; pid {tmp_path / 'nginx.pid'}; events {{}}\n"
                f"http {{ access_log off; {stores} server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
            )
            server = servers.enter_context(
                subprocess.Popen([command, "-e", "stderr", "-c", str(tmp_path / "nginx.conf")])
            )
            servers.callback(server.kill)
            while server.poll() is None:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    return f"http://127.0.0.1:{port}"
            raise AssertionError("nginx ended at once")

        yield start


@pytest.fixture
def photos(tmp_path):
    """Two class folders of 12 images."""
    for channel, name in enumerate(("cat", "dog")):
        tiny.write_images(tmp_path / "photos" / name, 12, size=(12, 12), channel=channel, seed=channel)
    return tmp_path / "photos"


@pytest.fixture
def packed(photos, tmp_path):
    """The images in three shards, and the source."""
    from contrastive.data.files import open_tree
    from contrastive.data.shards.pack import pack

    source = open_tree(photos, 12)
    pack(source, tmp_path / "set", shard_bytes=14_000, shuffle=True)
    return tmp_path / "set", source


@pytest.fixture
def open_set():
    """Open a set by its root."""

    def start(root, **remote):
        from contrastive.config import DataConfig, RemoteConfig
        from contrastive.data.shards.images import open_shards

        data = DataConfig("shards", str(root), image_size=12, remote=RemoteConfig(**remote))
        return open_shards(data)

    return start
