import os
import stat

import pytest

from ddpm.system.files import write_text


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
