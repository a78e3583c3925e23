"""Reading a host: several sections in one round trip, and parsers of their output."""
