"""Process managers: command lines of docker, systemd and supervisor, and parsers of their output."""
