"""Write a small SYNTHETIC challenge folder: generated lesions in the official layout, with a labeled test set.

The program is triderm_dist/commands/synthetic.py; from any folder: triderm synthetic
"""

from triderm_dist.commands.synthetic import start

if __name__ == "__main__":
    start()
