"""Files appear whole or not at all, and what is no file is refused before it is opened."""

import os

import pytest

from llama.files.new_folder import new_files, new_folder
from llama.files.plain import check_file


def test_files_get_their_names_together_and_replace_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with new_files(tmp_path) as part:
        part("a").write_text("new")
        part("b").write_text("b")
        assert part("a") == tmp_path / "a.part"
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "b").exists()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "b"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_files_that_were_interrupted(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def write():
        with new_files(tmp_path) as part:
            part("a").write_text("new")
            part("b")  # not begun
            raise error

    with pytest.raises(error):
        write()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}


def test_a_folder_that_is_in_use_is_refused(tmp_path):
    def make():
        with new_folder(tmp_path / "x", 1) as part:
            (part / "file").touch()

    make()
    with pytest.raises(FileExistsError, match="x is not empty"):
        make()


def test_what_is_no_plain_file_is_refused_unread(tmp_path):
    (tmp_path / "large").write_bytes(b"12345")
    check_file(tmp_path / "large", largest=5)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, error, message in (
        ("gone", FileNotFoundError, "gone is missing"),
        ("link", ValueError, "link is a link to gone, which is missing"),
        ("", ValueError, "is not a file but a folder"),
        ("pipe", ValueError, "is not a file but a device or a pipe"),
        ("large", ValueError, "large: has 5 bytes, and may have 4"),
    ):
        with pytest.raises(error, match=message):
            check_file(tmp_path / name, largest=4)
