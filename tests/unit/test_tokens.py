"""The files of tokens and of other secrets."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from defib import starter
from runtime import tokens
from runtime.errors import StartError
from runtime.tokens import TokenError, read_secret_file
from runtime.webconfig import WebConfigFile


def test_concurrent_writers_write_one_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    before = os.umask(0)
    try:
        with ThreadPoolExecutor(20) as threads:
            read = list(threads.map(lambda _: tokens.ensure_token(path).get_secret_value(), range(200)))
    finally:
        os.umask(before)
    assert len(set(read)) == 1
    assert len(read[0]) >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert not tokens.create_token_file(path)
    assert tokens.read_token(path).get_secret_value() == read[0]


@pytest.mark.needs("root")
def test_a_link_to_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """The account of a service could let root send any file's content to the service."""
    folder, secret = tmp_path / "state", tmp_path / "secret"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    secret.write_text("s3cret-of-another\n")
    secret.chmod(0o600)
    (folder / "token").symlink_to(secret)
    with pytest.raises(TokenError, match="does not belong to the owner of its folder") as refused:
        tokens.read_token(folder / "token")
    assert "s3cret-of-another" not in str(refused.value)
    os.chown(secret, 65534, 65534)
    assert tokens.read_token(folder / "token").get_secret_value() == "s3cret-of-another"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o601])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text("s3cret-token")
    path.chmod(mode)
    with pytest.raises(TokenError, match=rf"{path} has mode {mode:04o}") as refused:
        tokens.ensure_token(path)
    assert "s3cret" not in str(refused.value)
    assert path.read_text() == "s3cret-token"


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", "schlüssel", "\0"])
def test_an_invalid_token_is_refused_and_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(TokenError, match="must contain one line"):
        tokens.ensure_token(path)
    assert path.read_text() == text


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, said in (
        ("fifo", "is not a regular file"), ("dangling", "there is no token file"), ("none/token", "cannot write the token file"),
    ):  # fmt: skip
        with pytest.raises(TokenError, match=said):
            tokens.ensure_token(tmp_path / name)
    with pytest.raises(TokenError, match="there is no token file"):
        tokens.read_token(tmp_path / "none")


def test_init_writes_the_token_for_the_owner_of_the_database_folder(tmp_path: Path) -> None:
    path = tmp_path / "record" / "token"
    assert not starter.write_token(path)
    path.parent.mkdir()
    if os.geteuid() == 0:
        os.chown(path.parent, 12345, 12346)
    assert starter.write_token(path)
    found = path.stat()
    owner = path.parent.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, owner.st_uid, owner.st_gid)
    written = path.read_text()
    assert not starter.write_token(path)
    assert path.read_text() == written


def test_a_path_with_nul_is_refused() -> None:
    with pytest.raises(TokenError, match=r"the path of the secret file 'a.x00b' must not contain NUL"):
        read_secret_file(Path("a\0b"))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "large"])
def test_a_file_that_cannot_be_read_to_its_end_is_refused(tmp_path: Path, kind: str) -> None:
    """It would hold the reload that reads it, and all later ones, for ever."""
    path = tmp_path / "secret"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(bytes(70_000))
    with pytest.raises(TokenError, match=r"is not a regular file|Is a directory|larger than 64 KiB"):
        read_secret_file(path)
    if kind in ("fifo", "device"):
        with pytest.raises(StartError, match="is not a regular file"):
            WebConfigFile(path)
        config = tmp_path / "web.yml"
        config.write_text(f"tls_server_config: {{cert_file: {path}, key_file: {path}}}\n")
        with pytest.raises(StartError, match="is not a regular file"):
            WebConfigFile(config)
