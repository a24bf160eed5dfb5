import contextlib
import errno
import os
import stat

import pytest

from ddpm.runs.folder import RunFolder
from ddpm.system.files import clear_scratch, whole, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    for text in ("first", "second, with an ä"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "a" * 100_000 + "\ud800")  # a lone surrogate is not UTF-8
    assert (tmp_path / "file").read_text() == "before"


def test_a_file_has_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_folder_of_many_files_is_whole_or_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with contextlib.suppress(KeyError), whole(tmp_path / "folder") as scratch:
        scratch.mkdir()
        (scratch / "new").touch()
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
    with whole(tmp_path / "folder") as scratch:
        (scratch / "inner").mkdir(parents=True)
        (scratch / "inner" / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "inner", "new"]


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / ".file.4711").touch()
    (tmp_path / ".folder.4711.removed").mkdir()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "file.1").touch()
    clear_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hydra", "file.1"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    expected = pytest.raises(ValueError, match=r"\.lock cannot be locked \(No locks available\)")
    with expected, RunFolder(tmp_path).lock():
        pass
