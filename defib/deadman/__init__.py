"""`defib deadman`: the watcher outside, which notifies when the pings of a remediator stop, and when they return."""
