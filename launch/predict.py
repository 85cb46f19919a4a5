"""Predict a test set with every fold's model and test-time augmentation, and write submission.csv.

The program is triderm_dist/commands/predict.py; from any folder: triderm predict
"""

from triderm_dist.commands.predict import start

if __name__ == "__main__":
    start()
