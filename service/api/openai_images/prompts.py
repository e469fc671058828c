"""Prompts that name a class.

A model here knows its classes and no language, so a prompt is the name of one, as people write names: in any case, with
an article, in the plural, as "a photo of a …". What says more than that is refused: it could not be drawn.
"""

from __future__ import annotations

import difflib
import re

from service.api.context import MOST_SHOWN
from service.errors import InvalidRequest
from service.jobs import ModelInfo

ANYTHING = "anything"
"""The prompt that asks for no class."""
MOST_NEAR = 3
"""Names that an error suggests."""
LONGEST_PROMPT = 32_000
"""Characters, as the real service allows."""

_SURROUNDINGS = re.compile(
    r"^(?:(?:an?|the|one|some|my) )?(?:(?:photo|photograph|picture|image|drawing|pair|pairs)s? of )?"
    r"(?:(?:an?|the|one|some|my) )?(?=\S)"
)
_PLURALS = (("ies", "y"), ("es", ""), ("s", ""))


def _plain(text: str) -> str:
    """Words in lower case, with single spaces between them and no punctuation around."""
    return " ".join(re.sub(r"[_\s-]+", " ", text.casefold()).strip(" .,;:!?\"'").split())


def _forms(text: str) -> set[str]:
    """A name, and what it may be the plural of."""
    singulars = {
        text.removesuffix(ending) + instead
        for ending, instead in _PLURALS
        if text.endswith(ending) and not text.endswith("ss") and len(text) > len(ending) + 1
    }
    return {text, *singulars}


def _named(name: str) -> set[str]:
    """What a class may be called: its name, or a part of a name that lists several, as "T-shirt/top"."""
    parts = [_plain(part) for part in re.split(r"[/,|]", name)]
    return {form for called in (_plain(name), *parts) if called for form in _forms(called)}


def _refused(model: ModelInfo, prompt: str, reason: str) -> InvalidRequest:
    names = ", ".join(map(repr, model.class_names[:MOST_SHOWN]))
    more = ", …" if len(model.class_names) > MOST_SHOWN else ""
    return InvalidRequest(
        f"prompt: got {prompt[:100]!r}; {reason}allowed is a class, {names}{more}, or {ANYTHING!r} for none",
        param="prompt",
        code="class_not_found",
    )


def class_of(model: ModelInfo, prompt: str) -> int | None:
    """The class that a prompt names, or ``None`` for "anything"; raises ``InvalidRequest`` with the nearest names."""
    if len(prompt) > LONGEST_PROMPT:
        raise InvalidRequest(
            f"prompt: got {len(prompt)} characters, allowed are {LONGEST_PROMPT}",
            param="prompt",
            code="string_above_max_length",
        )
    names = model.class_names
    if prompt in names:
        return names.index(prompt)
    asked = _plain(prompt)
    if asked == ANYTHING and ANYTHING not in map(_plain, names):
        return None
    if not names:
        raise InvalidRequest(
            f"prompt: got {prompt[:100]!r}, but model {model.name!r} knows no classes; allowed is {ANYTHING!r}",
            param="prompt",
            code="class_not_found",
        )
    same = [index for index, name in enumerate(names) if _plain(name) == asked]
    if len(same) == 1:
        return same[0]
    bare = _SURROUNDINGS.sub("", asked)
    wanted = _forms(asked) | _forms(bare)
    found = [index for index, name in enumerate(names) if wanted & _named(name)] if asked else []
    if len(found) == 1:
        return found[0]
    if found:
        raise _refused(model, prompt, f"that may be {' or '.join(repr(names[index]) for index in found)}; ")
    calls = {form: name for name in names for form in _named(name)}
    near = dict.fromkeys(calls[form] for form in difflib.get_close_matches(bare, calls, n=MOST_NEAR))
    # A sentence with a class in it is near none by its letters.
    words = {form for word in bare.split() for form in _forms(word)}
    near |= dict.fromkeys(name for form, name in calls.items() if words & set(form.split()))
    hint = f"did you mean {' or '.join(map(repr, list(near)[:MOST_NEAR]))}? " if near else ""
    raise _refused(model, prompt, hint)
