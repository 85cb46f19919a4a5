"""Upper limits of numbers among the settings."""

MAX_SEED = 2**53
"""Every generator takes this seed, and JSON holds it exactly."""
MAX_BATCH = 2**20
"""Lesions: far more than a step needs, and their photos than a device holds."""
MAX_SECONDS = 1e9
"""Thirty years; what waits overflows somewhere above it."""
