"""Write what a model's pretrained tower sees in every photo, untouched by training, for triderm stack to try.

The program is triderm_dist/commands/embed.py; `triderm embed` runs it from anywhere.
"""

from triderm_dist.commands.embed import start

if __name__ == "__main__":
    start()
