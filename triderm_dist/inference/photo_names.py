"""The lesion and the view that the name of a photo states.

`X.clinical.jpg` and `X.dermoscopic.jpg` are two views of lesion X, and so are `clinical/X.jpg` and
`dermoscopic/X.jpg`, or `X/clinical.jpg` and `X/dermoscopic.jpg`.
"""

from __future__ import annotations

from pathlib import Path

from triderm_dist.schema import Task

SEPARATORS = "._- "
"""Characters that may separate the id of a lesion from the view in the name of a photo."""


def lesion_of(path: Path, folder: Path, task: Task) -> tuple[str, str | None]:
    """Return (lesion, view) by the name of a photo, or of the folder that it is in; None for an unknown view.

    folder: that of the photo within the input; it is a part of the lesion's name.
    """
    words = view_words(task)
    stem, parts = path.stem, folder.parts
    name, view = split_view(stem, task)
    if view is None and stem.lower() in words:
        inside = parts or path.absolute().parent.parts[-1:]
        return "/".join(inside), words[stem.lower()]
    if view is None and parts and parts[-1].lower() in words:
        view, parts = words[parts[-1].lower()], parts[:-1]
    return "/".join((*parts, name)), view


def split_view(stem: str, task: Task) -> tuple[str, str | None]:
    """Split the name of a photo, as `X.clinical`, into the lesion and the view."""
    words = view_words(task)
    for word in sorted(words, key=len, reverse=True):
        at = len(stem) - len(word)
        if at > 1 and stem[at:].lower() == word and stem[at - 1] in SEPARATORS:
            return stem[: at - 1], words[word]
    return stem, None


def view_words(task: Task) -> dict[str, str]:
    """Return the view by each word that names it, in lower case: its name, its title or one of its words."""
    return {word.lower(): view.name for view in task.views for word in (view.name, view.title, *view.words) if word}
