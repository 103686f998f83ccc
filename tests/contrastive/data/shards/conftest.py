import pytest

from tests import tiny
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
