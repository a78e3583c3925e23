"""The pre-rendered part of `/metrics`: series of services and hosts."""
