"""Extract embeddings of a model's pretrained tower, without fine-tuning, as additional columns for triderm stack.

The program is triderm_dist/commands/embed.py; from any folder: triderm embed
"""

from triderm_dist.commands.embed import start

if __name__ == "__main__":
    start()
