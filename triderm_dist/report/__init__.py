"""The report of a run: one HTML page that opens from disk, with its pictures beside it as PNG."""

from triderm_dist.report.page import write_report

__all__ = ["write_report"]
