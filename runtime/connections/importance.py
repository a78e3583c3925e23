"""How important connections are, when one has to be dropped."""

import enum


class Importance(enum.IntEnum):
    """How important a connection is, when one has to be dropped."""

    REFUSED = 0  # it waits for its refusal
    SILENT = 1  # it has not sent a request for a while
    UNKNOWN = 2  # its last request had no valid credential
    UNKNOWN_BUSY = 3  # the application answers its request, which had no valid credential, or none yet
    NEW = 4  # its first request may be on its way
    KNOWN = 5  # its last request had a valid credential
    BUSY = 6  # the application answers its request, which has a valid credential: it is never dropped
