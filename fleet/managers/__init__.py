"""Process managers: the command lines of docker, systemd and supervisor, and how to parse their output."""
