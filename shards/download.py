"""Download, check and unpack the official files of MILK10k; after an interruption the same command resumes.

The program is triderm_dist/commands/download.py; from any folder: triderm download
"""

from triderm_dist.commands.download import start

if __name__ == "__main__":
    start()
