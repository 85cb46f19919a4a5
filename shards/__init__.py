"""Programs that make and check data."""
