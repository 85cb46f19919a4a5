"""The process of a program: signals, limits, environment variables, log, terminal, and secrets kept out of texts."""
