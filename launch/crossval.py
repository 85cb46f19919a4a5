"""Train all folds of all models, then gather their held-out predictions in oof.parquet.

The program is triderm_dist/commands/crossval.py; from any folder: triderm crossval
"""

from triderm_dist.commands.crossval import start

if __name__ == "__main__":
    start()
