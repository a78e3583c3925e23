"""The demo: the whole loop on one machine, with real programs; the tests use its parts."""
