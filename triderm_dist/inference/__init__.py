"""Use of a trained run: predictions of new lesions, its networks, and their export."""
