"""The folder of compiled encoders: what is found again, and what goes."""

import os

import pytest

from blsam.runtimes import cache


def put(root, name, size=1000, most=cache.MOST_BYTES, **facts):
    return cache.store(root, name, facts, lambda folder: (folder / "file").write_bytes(bytes(size)), most)


def test_what_was_stored_is_found(tmp_path):
    assert cache.find(tmp_path, "a", {"x": 1}) is None
    folder = put(tmp_path, "a", x=1)
    assert cache.find(tmp_path, "a", {"x": 1}) == folder and (folder / "file").stat().st_size == 1000
    with pytest.raises(ValueError, match="of another model"):
        cache.find(tmp_path, "a", {"x": 2})


def test_those_used_longest_ago_go(tmp_path):
    first, second = put(tmp_path, "first"), put(tmp_path, "second")
    (tmp_path / "somebody-elses").mkdir()
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    cache.find(tmp_path, "first", {})  # used again
    third = put(tmp_path, "third", most=2500)
    assert first.is_dir() and third.is_dir() and not second.exists()
    fourth = put(tmp_path, "fourth", size=5000, most=2500)  # larger than what there is room for: it alone stays
    assert sorted(path.name for path in tmp_path.iterdir()) == [fourth.name, "somebody-elses"]


def test_who_comes_second_takes_what_is_there(tmp_path):
    def make(folder):
        (folder / "file").write_text("ours")
        put(tmp_path, "a")  # another process, meanwhile

    folder = cache.store(tmp_path, "a", {}, make)
    assert (folder / "file").stat().st_size == 1000
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_nothing_is_left_of_what_failed(tmp_path):
    def make(folder):
        (folder / "file").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.store(tmp_path, "a", {}, make)
    assert not list(tmp_path.iterdir())


def test_default_folder(tmp_path, monkeypatch, caplog):
    for name in ("BLSAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "blsam"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache.default_folder() == tmp_path / "mine" / "blsam"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache.default_folder() is None and "BLSAM_CACHE names one" in caplog.text
    monkeypatch.setenv("BLSAM_CACHE", str(tmp_path / "named"))  # taken as it is: what is wrong with it is an error
    assert cache.default_folder() == tmp_path / "named"


def test_an_entry_that_another_process_removed_is_none(tmp_path):
    folder = put(tmp_path, "a")
    (folder / "facts.json").unlink()
    with pytest.raises(ValueError, match="damaged"):
        cache.find(tmp_path, "a", {})
    cache.shutil.rmtree(folder)
    assert cache.find(tmp_path, "a", {}) is None


def test_what_was_never_finished_goes_after_a_day(tmp_path):
    for name, age in ((".making-old", 2 * cache.ABANDONED), (".making-now", 0)):
        (tmp_path / name).mkdir()
        then = cache.time.time() - age
        os.utime(tmp_path / name, (then, then))
    put(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".making-now", "encoder-a"]
