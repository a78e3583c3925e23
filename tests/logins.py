"""Login shells of the tests' sshd."""

import pytest

from defib.demo.sshd import Sshd


def has_login_shell(host: Sshd) -> bool:
    """Whether the account is the sshd's own, so that its login shell can be chosen: that needs libnss_wrapper."""
    return (host.key_file.parent / "passwd").is_file()


def logs_in_with(host: Sshd, script: str) -> None:
    """Have the account's login shell be this script, which is given `-c` and the command."""
    if not has_login_shell(host):
        pytest.skip("needs libnss_wrapper")
    folder = host.key_file.parent
    (folder / "login").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "login").chmod(0o755)
    (folder / "passwd").write_text((folder / "passwd").read_text().replace(":/bin/sh\n", f":{folder}/login\n", 1))
