"""The connections of a server: limits on their number, timeouts for slow clients, and suspended ones.

A new connection that exceeds a limit takes the place of another one, preferably of a client that has shown no
credential. Clients without one can therefore not lock out those that have one, even from the same address.
"""
