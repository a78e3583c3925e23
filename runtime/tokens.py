"""Tokens in the configuration and in files, and the local token, in a file that only its owner may read."""

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from runtime.errors import DefibError
from runtime.files import create_file

SIZE_LIMIT = 4096  # bytes of a token file
SECRET_LIMIT = 64 * 1024  # bytes


class TokenError(DefibError):
    """There is no usable token."""


@dataclass(frozen=True)
class ConfiguredToken:
    """A token of the configuration: the value of a setting, or the present content of a file.

    An `owned` file is the local token's, which only its owner may read; `file` is None where its location is unknown.
    """

    setting: str
    value: SecretStr | None = None
    file: Path | None = None
    owned: bool = False

    @property
    def is_set(self) -> bool:
        return self.value is not None or self.file is not None

    def read(self) -> SecretStr:
        """Return the token. Raises TokenError."""
        if self.file is not None:
            return read_token(self.file) if self.owned else SecretStr(read_secret_file(self.file))
        if not isinstance(self.value, SecretStr):  # None, or a reference that this program could not resolve
            raise TokenError(f"{self.setting} is not set")
        return self.value


def _read_regular(path: Path, what: str, size: int) -> tuple[os.stat_result, bytes]:
    """Return the status of a file and its first bytes. Raises OSError, and TokenError unless it is a regular file."""
    if "\0" in str(path):
        raise TokenError(f"the path of the {what} {str(path)!r} must not contain NUL")
    # Opening a FIFO would wait for somebody who writes to it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise TokenError(f"the {what} {path} is not a regular file")
        return status, file.read(size)


def read_secret_file(path: Path) -> str:
    """Return the content of a file that the configuration refers to. Raises TokenError."""
    try:
        _, content = _read_regular(path, "secret file", SECRET_LIMIT + 1)
    except OSError as error:
        raise TokenError(f"cannot read the secret file {path}: {error.strerror}") from error
    if len(content) > SECRET_LIMIT:
        raise TokenError(f"the secret file {path} is larger than {SECRET_LIMIT // 1024} KiB")
    try:
        value = content.decode().rstrip("\r\n")
    except ValueError:
        raise TokenError(f"the secret file {path} is not text") from None
    if not value:
        raise TokenError(f"the secret file {path} is empty")
    return value


def read_token(path: Path) -> SecretStr:
    """Return the token in a file.

    Raises TokenError where there is none, where other users may read the file, or where it does not belong to the owner
    of its folder, who could have put a link to a file of root there.
    """
    try:
        status, content = _read_regular(path, "token file", SIZE_LIMIT)
        owner_of_folder = path.parent.stat().st_uid
    except FileNotFoundError:
        raise TokenError(f"there is no token file {path}") from None
    except OSError as error:
        raise TokenError(f"cannot read the token file {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise TokenError(
            f"the token file {path} has mode {mode:04o}, so that other users may read it; run chmod 600 on it, and if "
            "others may have read it, replace the token"
        )
    if owner_of_folder not in (0, status.st_uid):
        raise TokenError(f"the token file {path} does not belong to the owner of its folder")
    token = content.decode("ascii", "replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(f"the token file {path} must contain one line of printable ASCII characters without spaces")
    return SecretStr(token)


def create_token_file(path: Path, owner: tuple[int, int] | None = None) -> bool:
    """Write a random token to a new file of mode 0600, for a user and group; return False where the file exists.

    The file is created atomically: of two processes that do so at the same time, one writes it and both can read it.
    Raises TokenError.
    """
    try:
        create_file(path, f"{secrets.token_urlsafe(32)}\n".encode(), owner=owner)
    except FileExistsError:
        return False
    except OSError as error:
        raise TokenError(f"cannot write the token file {path}: {error.strerror}") from error
    return True


def ensure_token(path: Path) -> SecretStr:
    """Return the token in a file, which is created where it is missing. Raises TokenError."""
    if not os.path.lexists(path):
        create_token_file(path)
    return read_token(path)
