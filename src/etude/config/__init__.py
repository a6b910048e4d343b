"""config.yml: its keys and defaults, and how it is read."""
