"""Reports: availability, incidents, restarts and what to watch, from the record and Prometheus."""
