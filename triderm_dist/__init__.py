"""Distributed multi-GPU training for skin-lesion diagnosis from paired clinical and dermoscopic photos."""

__version__ = "0.1.0"
