"""Fit the stacker and the ensemble on OUTPUT/oof.parquet, and estimate them on lesions they were not fitted on.

The program is triderm_dist/commands/stack.py; from any folder: triderm stack
"""

from triderm_dist.commands.stack import start

if __name__ == "__main__":
    start()
