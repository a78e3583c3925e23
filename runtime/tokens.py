"""The API token: as the configuration has it, or in a file that its owner alone may read."""

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from runtime.errors import DefibError

LIMIT = 4096  # bytes of a file


class TokenError(DefibError):
    """There is no token that can be used."""


@dataclass(frozen=True)
class ApiToken:
    """What callers of an HTTP API must show: the value of a setting, else what a file holds at that time.

    `file` is None where it is not known where the file is.
    """

    setting: str
    configured: SecretStr | None
    file: Path | None

    def get(self) -> SecretStr:
        """The token. Raises TokenError."""
        if self.configured is not None:
            return self.configured
        if self.file is None:
            raise TokenError(f"{self.setting} is not set")
        return read_token(self.file)


def read_token(path: Path) -> SecretStr:
    """The token in a file. Raises TokenError where there is none, or where others may read the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found, text = os.fstat(descriptor), os.read(descriptor, LIMIT)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise TokenError(f"there is no token file {path}") from None
    except OSError as error:
        raise TokenError(f"the token file {path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise TokenError(f"the token file {path} is no file")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise TokenError(
            f"the token file {path} has the mode {mode:04o}, so that others than its owner may use it: chmod 600 it "
            "if nobody else has read it, else remove it and restart the remediator, which writes a new one"
        )
    token = text.decode("ascii", "replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(f"the token file {path} holds no token: it must have one line of printable ASCII characters")
    return SecretStr(token)


def create_token_file(path: Path, owner: tuple[int, int] | None = None) -> bool:
    """Write a random token to a new file of mode 0600, for a user and group; False where there is a file already.

    The file appears whole: of two processes that do this at the same time, one writes it and both can read it.
    Raises TokenError.
    """
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(whole, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask is
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.write(descriptor, f"{secrets.token_urlsafe(32)}\n".encode())
            os.fsync(descriptor)
            os.link(whole, path)
        finally:
            os.close(descriptor)
            whole.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        raise TokenError(f"the token file {path} cannot be written: {error.strerror}") from error
    return True


def ensure_token(path: Path) -> SecretStr:
    """The token in a file, which is written where it is missing. Raises TokenError."""
    if not os.path.lexists(path):
        create_token_file(path)
    return read_token(path)
