"""Summarize a search, also an unfinished one: its trials as a table, the best settings, and a page with figures.

The program is triderm_dist/commands/results.py; from any folder: triderm results
"""

from triderm_dist.commands.results import start

if __name__ == "__main__":
    start()
