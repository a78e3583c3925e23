"""The life of alerts, incidents and actions: each change is one transaction."""
