"""Access control of the HTTP servers: who calls, by which credential, and what the caller's role permits."""
