"""Entry points that make and check packed data."""
