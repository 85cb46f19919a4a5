"""Write a small SYNTHETIC data set of a task: generated lesions with the task's columns and words, and a test set.

The program is triderm_dist/commands/synthetic.py; from any folder: triderm synthetic
"""

from triderm_dist.commands.synthetic import start

if __name__ == "__main__":
    start()
