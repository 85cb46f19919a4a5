"""Write RUN/report.html, a self-contained page, and its figures, from the files that triderm stack wrote.

The program is triderm_dist/commands/report.py; from any folder: triderm report
"""

from triderm_dist.commands.report import start

if __name__ == "__main__":
    start()
