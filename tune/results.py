"""What a search has found: its trials as a table, the best settings, and a page with pictures; also of one that is not

The program is triderm_dist/commands/results.py; `triderm results` runs it from anywhere.
"""

from triderm_dist.commands.results import start

if __name__ == "__main__":
    start()
