"""What installs Defib; not installed."""
