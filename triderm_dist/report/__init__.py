"""The report of a run: a self-contained HTML page, and its figures as PNG files."""

from triderm_dist.report.page import write_report

__all__ = ["write_report"]
