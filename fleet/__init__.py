"""The inventory of hosts and services, shells on the hosts, and their process managers."""
