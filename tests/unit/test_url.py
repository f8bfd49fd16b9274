"""Storage URLs: corrected where the meaning is clear, else refused in one sentence; passwords are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.engine import network_filesystem
from storage.errors import UserError
from storage.url import file_of, parse, redact, sqlite_url


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
        ("sqlite+pysqlite:///study.db", "sqlite:///study.db"),
        ("postgres://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgresql://me@host:5433/db", "postgresql+psycopg://me@host:5433/db"),
        ("postgresql+psycopg2://me@host/db", "postgresql+psycopg://me@host/db"),
    ],
)
def test_corrected(text: str, meant: str) -> None:
    assert parse(text).render_as_string(hide_password=False) == meant


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("study.db", "sqlite:///study.db"),
        ("/data/study.db", "sqlite:////data/study.db"),
        ("", "sqlite:///study.db"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite://study.db", "three slashes"),
        ("mysql://me@host/db", "got mysql://"),
        ("postgresql://me@host", "names no database"),
        ("postgresql://me:hunter2@host:port/db", "unreadable storage URL"),
        ("postgresql://me:hunt@hunter2@host/db", "as %40"),
        ("postgresql:/me:hunter2@host/db", "got another text"),
        ("host=h password=hunter2", "got another text"),
    ],
)
def test_refused(text: str, fault: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse(text)
    assert fault in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("text", ["postgresql://me:hunter2@host/db", "postgresql://host/db?user=me&password=hunter2"])
def test_password_is_not_shown(text: str) -> None:
    assert "hunter2" not in redact(parse(text))
    assert "host" in redact(parse(text))


def test_it_is_shown_as_it_is_typed() -> None:
    assert redact(parse("postgresql://me:hunter2@host/db")) == "postgresql://me:***@host/db"
    assert redact(parse("sqlite:///study.db")) == "sqlite:///study.db"


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert file_of(parse("sqlite:///~/study.db")) == Path("/home/me/study.db")
    assert file_of(parse("sqlite:////~/study.db")) == Path("/~/study.db")
    with pytest.raises(UserError, match="no home folder"):
        parse("sqlite:///~nobody-of-this-name/study.db")


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%20b", "~", "a b", "日本", "a&b=c", "::", "@"])
def test_the_url_of_any_file(name: str, tmp_path: Path) -> None:
    assert file_of(parse(sqlite_url(tmp_path / name))) == tmp_path / name
    assert file_of(parse(sqlite_url(name))) == Path.cwd() / name


def test_file_of() -> None:
    assert str(file_of(parse("sqlite:////tmp/study.db"))) == "/tmp/study.db"
    assert file_of(parse("postgresql://me@host/db")) is None


def test_network_file_systems_are_known(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        f"server:/home {tmp_path}/shared nfs4 rw 0 0\n"
        f"/dev/sdb1 {tmp_path}/shared/local ext4 rw 0 0\n"
        f"//box/with {tmp_path}/a\\040b cifs rw 0 0\n"
    )
    kinds = {
        "here": None,
        "shared": "nfs4",
        "shared/deep/er": "nfs4",
        "shared/local": None,
        "a b": "cifs",
    }
    for folder, kind in kinds.items():
        assert network_filesystem(tmp_path / folder / "study.db", mounts) == kind, folder
    assert network_filesystem(tmp_path / "study.db", tmp_path / "no such file") is None
