"""Which files are meant: by files, folders and globs, with every name that a file can have."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from offload.merge.engine import Merge
from offload.merge.sources import Sources
from offload.merge.split import split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.log", "a.log", "c.txt", ".hidden.log", "sub/d.log", "sub/deeper/e.log", ".git/f.log", "sub/.g.log"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    return tmp_path


def found(folder: Path, *arguments: str) -> list[str]:
    """Names relative to the folder, for arguments relative to it."""
    files, missing = Sources([os.path.join(folder, argument) for argument in arguments]).scan()
    assert not missing
    return [os.path.relpath(path, folder) for path in files]


def test_a_folder_gives_all_below_but_hidden_ones(folder: Path) -> None:
    """A folder means every regular file in it and below, by name, without hidden files and folders."""
    assert found(folder, ".") == ["a.log", "b.log", "c.txt", "sub/d.log", "sub/deeper/e.log"]


def test_a_hidden_file_is_taken_if_it_is_named(folder: Path) -> None:
    """What is named outright is taken, hidden or not."""
    assert found(folder, ".hidden.log", ".git") == [".hidden.log", ".git/f.log"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.log", ["a.log", "b.log"]),
        ("?.txt", ["c.txt"]),
        ("[ac].*", ["a.log", "c.txt"]),
        ("*/*.log", ["sub/d.log"]),
        ("**/*.log", ["a.log", "b.log", "sub/d.log", "sub/deeper/e.log"]),
        ("sub/**", ["sub/d.log", "sub/deeper/e.log"]),
        ("s*", []),  # a folder that a glob matches is no file
    ],
)
def test_globs(folder: Path, pattern: str, names: list[str]) -> None:
    """Globs mean regular files, `**` also those in folders below."""
    files, missing = Sources([os.path.join(folder, pattern)]).scan()
    assert [os.path.relpath(path, folder) for path in files] == names
    assert bool(missing) == (not names)


def test_arguments_keep_their_order_and_a_file_comes_once(folder: Path) -> None:
    """Files come in the order of the arguments; named twice, in the place of the first."""
    assert found(folder, "c.txt", "*.log", ".", "a.log")[:3] == ["c.txt", "a.log", "b.log"]
    assert len(found(folder, "c.txt", "*.log", ".", "a.log")) == 5


def test_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    """A file called `[a].log` is that file, not a pattern for `a.log`."""
    for name in ("[a].log", "a.log", "*"):
        (tmp_path / name).write_text(name)
    assert found(tmp_path, "[a].log") == ["[a].log"]
    assert found(tmp_path, "*") == ["*"]


@pytest.mark.parametrize("name", [b"with space", b"new\nline", b"-dash", "größe".encode(), b"\xff\xfe", b"\x1b[31m"])
def test_strange_names(tmp_path: Path, name: bytes) -> None:
    """Any name that a file can have is found, as a file, in a folder and by a glob."""
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(b"x")
    for argument in (path, tmp_path, tmp_path / "*"):
        files, missing = Sources([str(argument)]).scan()
        assert list(files) == [str(path)]
        assert not missing


def test_paths_are_absolute_and_plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file gives the same path, however it is written."""
    monkeypatch.chdir(folder / "sub")
    paths = {
        path for argument in ("../a.log", "./../a.log", "../sub/../a.log") for path in Sources([argument]).scan()[0]
    }
    assert paths == {str(folder / "a.log")}


def test_the_working_folder_of_the_start_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative argument means what it meant when it was given."""
    monkeypatch.chdir(folder)
    sources = Sources(["sub"])
    monkeypatch.chdir("/")
    assert list(sources.scan()[0]) == [str(folder / "sub/d.log"), str(folder / "sub/deeper/e.log")]


def test_what_is_missing_is_told_by_argument(folder: Path) -> None:
    """A name or glob that names nothing is told; an empty folder is not: its files may come."""
    (folder / "void").mkdir()
    arguments = [str(folder / name) for name in ("nope", "*.nope", "void", "a.log")]
    files, missing = Sources(arguments).scan()
    assert list(files) == [str(folder / "a.log")]
    assert {path: exc.errno for path, exc in missing.items()} == dict.fromkeys(arguments[:2], errno.ENOENT)


def test_what_is_no_file_is_told_if_named_and_left_out_if_not(tmp_path: Path) -> None:
    """A FIFO is an error as an argument and is passed over in a folder; it is never opened."""
    os.mkfifo(tmp_path / "fifo")
    files, missing = Sources([str(tmp_path)]).scan()
    assert not files
    assert not missing
    files, missing = Sources([str(tmp_path / "fifo"), "/dev/null"]).scan()
    assert not files
    assert {exc.errno for exc in missing.values()} == {errno.EINVAL}


def test_links(tmp_path: Path) -> None:
    """A link to a file is found, a dangling one and one to a folder are not; a circle of folders ends."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert found(tmp_path, ".") == ["a", "link"]


def test_no_arguments() -> None:
    """Sources without any argument are a mistake."""
    with pytest.raises(ValueError, match="no sources given"):
        Sources([])


def test_folders_are_where_new_files_may_appear(folder: Path) -> None:
    """To be watched: the folder of a file, all folders below a folder, and those that a glob can reach."""

    def folders(*arguments: str) -> list[str]:
        paths = Sources([os.path.join(folder, argument) for argument in arguments]).folders()
        return sorted(os.path.relpath(path, folder) for path in paths)

    assert folders("a.log") == ["."]
    assert folders("not/there") == []
    assert folders(".") == [".", "sub", "sub/deeper"]
    assert folders("*.log") == ["."]
    assert folders("*/x.log") == ["sub"]
    assert folders("**/*.log") == [".", "sub", "sub/deeper"]
    assert folders("a.log", "b.log", ".") == [".", "sub", "sub/deeper"]


def test_new_files_are_found_at_the_next_look(folder: Path) -> None:
    """Each scan looks anew."""
    sources = Sources([str(folder / "*.log")])
    assert len(sources.scan()[0]) == 2
    (folder / "new.log").write_text("x")
    (folder / "a.log").unlink()
    assert [os.path.basename(path) for path in sources.scan()[0]] == ["b.log", "new.log"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["*.log"], [], ["a.log", "b.log", "sub/d.log", "sub/deeper/e.log"]),
        ([], ["*.log"], ["c.txt"]),
        (["*.log"], ["[ab].log", "e.*"], ["sub/d.log"]),
        (["a.*", "c.*"], [], ["a.log", "c.txt"]),
        (["sub/*.log"], [], ["sub/d.log", "sub/deeper/e.log"]),
        ([], ["deeper/e.log"], ["a.log", "b.log", "c.txt", "sub/d.log"]),
        ([], ["eeper/e.log"], ["a.log", "b.log", "c.txt", "sub/d.log", "sub/deeper/e.log"]),
        (["*.none"], [], []),
    ],
)
def test_include_and_exclude(folder: Path, include: list[str], exclude: list[str], names: list[str]) -> None:
    """Patterns choose among what a folder names: by the last part, or with a slash by the end of the path."""
    files, missing = Sources([str(folder)], include=include, exclude=exclude).scan()
    assert [os.path.relpath(path, folder) for path in files] == names
    assert not missing


def test_a_path_pattern_may_be_absolute(folder: Path) -> None:
    """A pattern that begins with a slash is for the whole path."""
    files, _ = Sources([str(folder)], exclude=[f"{folder}/sub/*", f"{folder}/?.txt"]).scan()
    assert [os.path.relpath(path, folder) for path in files] == ["a.log", "b.log"]


def test_what_is_named_itself_is_always_taken(folder: Path) -> None:
    """No pattern keeps out a file that an argument names; also where a folder names it too."""
    sources = Sources([str(folder / "c.txt"), str(folder)], include=["*.log"], exclude=["c*"])
    assert next(iter(sources.scan()[0])) == str(folder / "c.txt")


def test_a_glob_of_which_all_is_left_out_is_told(folder: Path) -> None:
    """A glob that matches only files which are left out is told, and why."""
    files, missing = Sources([str(folder / "*.txt")], exclude=["*.txt"]).scan()
    assert not files
    assert [exc.strerror for exc in missing.values()] == ["include and exclude leave out all of it"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("", "it is empty"),
        ("a\0", "NUL"),
        ("old/", r"only files are matched; for all below write 'old/\*'"),
        ("./a.log", "without //, . and .."),
        ("a/../b", "without //, . and .."),
        ("/nowhere/*.log", "it is below none of the sources: /logs/here"),
        ("*.opk", "only taken if they are named themselves"),
    ],
)
def test_a_pattern_that_can_never_match(pattern: str, why: str) -> None:
    """A pattern that no file can match is refused, with why."""
    with pytest.raises(ValueError, match=why):
        Sources(["/logs/here"], include=[pattern])


def test_patterns_come_in_a_list() -> None:
    """One pattern instead of a list of them would be taken for one of each letter."""
    with pytest.raises(TypeError, match=r"write \['\*.log'\]"):
        Sources(["x"], exclude="*.log")


async def test_rotation_is_followed_to_names_that_are_left_out(folder: Path, tmp_path: Path) -> None:
    """A rotated file whose new name is excluded is read to its end, also if that came while nobody read."""
    logs = folder / "sub" / "deeper"
    log, out = logs / "e.log", tmp_path / "out.opk"

    async def merged() -> None:
        async with Merge(Sources([str(logs)], include=["*.log"], exclude=["*.log.*"]), out) as merge:
            await merge.run()

    log.write_bytes(b"one\n")
    await merged()
    with log.open("ab") as file:
        file.write(b"two\n")
    log.rename(logs / "e.log.1")
    log.write_bytes(b"three\n")
    await merged()
    split(out, tmp_path / "back")
    assert sorted(path.read_bytes() for path in (tmp_path / "back").iterdir()) == [b"one\ntwo\n", b"three\n"]
