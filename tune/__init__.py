"""Programs that search for settings."""
