"""Discovery: what runs on a host, the services that it could become, and the keys of hosts."""
