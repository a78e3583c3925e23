"""What is watched and how to reach it: the inventory, and shells on its hosts."""
