"""Data files and the Hub, rows, and the examples made of them."""
