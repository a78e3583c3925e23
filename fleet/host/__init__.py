"""Read a host: several sections in one round trip, and parsers for their output."""
