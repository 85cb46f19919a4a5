"""Programs that run work: each parses its settings, calls the library, prints."""
