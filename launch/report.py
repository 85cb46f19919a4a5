"""Write OUTPUT/report.html, one page that opens from disk, and its pictures, from what triderm stack left.

The program is triderm_dist/commands/report.py; `triderm report` runs it from anywhere.
"""

from triderm_dist.commands.report import start

if __name__ == "__main__":
    start()
