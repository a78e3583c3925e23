"""The inventory: its model, how it is loaded from YAML files, and how it is checked."""
