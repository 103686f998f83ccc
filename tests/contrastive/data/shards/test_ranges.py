import pickle

import pytest

from contrastive.config import RemoteConfig, UserError
from contrastive.data.decode import SourceLost, Unreadable
from contrastive.data.shards import chunk_cache, ranges
from contrastive.data.shards.chunk_cache import ChunkCache
from contrastive.data.shards.ranges import Place, RangeFile, Ranges, Span, check_url

CONTENT = bytes(range(256)) * 1200  # 300 KiB


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reader(clock):
    def build(**settings):
        return Ranges(RemoteConfig(**settings), clock=lambda: clock.now, sleep=clock.sleep)

    return build


@pytest.fixture
def place(tmp_path, serve):
    """Return a server, and the place of its object."""
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "a.tar").write_bytes(CONTENT)
    server = serve(tmp_path / "objects")
    return server, Place(f"{server.url}/a.tar", len(CONTENT), "1")


def cut(place, *bounds):
    return [Span(place, start, stop) for start, stop in bounds]


BOUNDS = ((0, 10), (200_000, 200_400), (5, 90), (300_000, 300_100), (7, 7))


@pytest.mark.parametrize("cache", [False, True], ids=["uncached", "cached"])
def test_bytes_are_those_of_the_spans_in_any_order(place, reader, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(ranges, "CHUNK", 1000)
    read = reader(cache=str(tmp_path / "cache") if cache else None).read
    wanted = [CONTENT[start:stop] for start, stop in BOUNDS]
    assert read(cut(place[1], *BOUNDS)) == wanted
    assert read(cut(place[1], *BOUNDS)) == wanted
    local = Place(str(tmp_path / "objects" / "a.tar"), len(CONTENT), "1")
    assert read(cut(local, *BOUNDS)) == wanted


def test_spans_near_each_other_are_one_request_and_far_ones_are_not(place, reader):
    server, where = place
    reader().read(cut(where, (0, 100), (100, 200), (16_000, 60_000), (200_000, 200_010)))
    assert sorted(server.requests) == [("/a.tar", 0, 60_000), ("/a.tar", 200_000, 200_010)]


def test_no_request_is_larger_than_the_most(place, reader, monkeypatch):
    monkeypatch.setattr(ranges, "_MOST", 1000)
    reader().read(cut(place[1], *((at, at + 100) for at in range(0, 3000, 100))))
    assert sorted(place[0].requests) == [("/a.tar", at, at + 1000) for at in (0, 1000, 2000)]


def test_what_is_cached_is_not_fetched_again_until_the_object_changes(place, reader, tmp_path):
    server, where = place
    cached = reader(cache=str(tmp_path / "cache"))
    cached.read(cut(where, (0, 10)))
    again = pickle.loads(pickle.dumps(Ranges(RemoteConfig(cache=str(tmp_path / "cache")))))
    assert again.read(cut(where, (1000, 1010))) == [CONTENT[1000:1010]]
    assert server.requests == [("/a.tar", 0, len(CONTENT))]
    cached.read(cut(Place(where.url, where.size, "2"), (0, 10)))
    cached.forget(cut(where, (0, 10)))
    cached.read(cut(where, (0, 10)))
    assert len(server.requests) == 3


@pytest.mark.parametrize("faults", [[500, 503, 429], ["cut", 500, "cut"], [408, "cut"]])
def test_what_passes_is_tried_again_with_longer_pauses(place, reader, clock, faults):
    place[0].faults += faults
    assert reader().read(cut(place[1], (0, 200_000))) == [CONTENT[:200_000]]
    assert clock.slept == [0.5, 1.0, 2.0][: len(faults)]


def test_a_server_that_stays_away_ends_it_after_the_time_allowed(place, reader, clock):
    server, where = place
    server.close()
    with pytest.raises(
        SourceLost, match=r"a\.tar: .* gave up after \d+ tries in 60 s .*data\.remote\.retry_s"
    ):
        reader(retry_s=60.0).read(cut(where, (0, 10)))
    assert clock.now == 60
    assert max(clock.slept) == 15


def test_a_slow_answer_counts_as_none(place, reader, clock):
    place[0].faults += ["slow"]
    assert reader(timeout_s=0.2).read(cut(place[1], (0, 10))) == [CONTENT[:10]]
    assert clock.slept == [0.5]


@pytest.mark.parametrize(
    ("status", "reason"), [(403, "access is refused"), (401, "refused"), (410, "is gone")]
)
def test_a_refusal_ends_it_at_once(place, reader, clock, status, reason):
    place[0].faults += [status]
    with pytest.raises(SourceLost, match=reason):
        reader().read(cut(place[1], (0, 10)))
    assert clock.slept == []


def test_a_missing_object_ends_it_at_once(place, reader):
    gone = Place(f"{place[0].url}/b.tar", 10, "")
    with pytest.raises(SourceLost, match=r"b\.tar: not found; put it back"):
        reader().read(cut(gone, (0, 10)))
    assert reader().whole(gone.url) is None
    with pytest.raises(SourceLost, match="No such file"):
        reader().read(cut(Place("/nowhere/b.tar", 10, ""), (0, 10)))


def test_an_object_that_ends_before_makes_those_spans_unreadable(place, reader, tmp_path):
    longer = Place(place[1].url, 2 * len(CONTENT), "")
    end = len(CONTENT)
    for where in (longer, Place(str(tmp_path / "objects" / "a.tar"), 2 * end, "")):
        good, short, beyond = reader().read(
            cut(where, (0, 10), (end - 5, end + 5), (end + 90_000, end + 90_010))
        )
        assert good == CONTENT[:10]
        assert isinstance(short, Unreadable)
        assert isinstance(beyond, Unreadable)
        assert "a.tar ends before byte" in str(beyond)


def test_a_server_without_ranges_is_refused(place, reader):
    place[0].faults += ["whole"]
    with pytest.raises(SourceLost, match="knows no ranges"):
        reader().read(cut(place[1], (0, 10)))


def test_a_place_as_a_file(place, reader):
    file = RangeFile(reader(), place[1])
    assert file.seek(-5, 2) == len(CONTENT) - 5
    assert file.read(100) == CONTENT[-5:]
    assert file.read(1) == b""
    file.seek(1000)
    assert file.read(10) == CONTENT[1000:1010]


def test_secrets_in_a_url_are_refused_and_not_repeated():
    for url in ("https://me:secret@host/x", "https://host/x?X-Amz-Signature=secret"):
        with pytest.raises(UserError, match="environment variables") as refusal:
            check_url(url)
        assert "secret" not in str(refusal.value)
    assert check_url("s3://bucket/a@b/") == "s3://bucket/a@b"


def test_an_unknown_protocol_names_the_extra(reader):
    with pytest.raises(UserError, match=r"contrastive-pretrain\[remote\]"):
        reader().read(cut(Place("nosuch://x/a", 10, ""), (0, 10)))


def test_the_cache_stays_within_its_limit_and_keeps_the_newest(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    cache = ChunkCache(str(tmp_path), 64_000.0)
    for number in range(200):
        cache.put("a", number, bytes(1000))
        if (path := cache._path("a", number)).exists():
            chunk_cache.os.utime(path, (at := next(clock), at))
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 49_000
    assert cache.get("a", 199, 0, 1000) == bytes(1000)
    assert cache.get("a", 0, 0, 1000) is None
    assert sum(1 for _ in tmp_path.glob("*/*")) >= 45


def test_a_cache_that_cannot_be_written_is_said_once_and_left_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = ChunkCache(str(tmp_path / "file"), 1e6)
    cache.put("a", 0, b"x")
    cache.put("a", 1, b"x")
    assert cache.get("a", 0, 0, 1) is None
    assert len(caplog.records) == 1
