"""Categories of request that may be declined, and the control tokens that stand for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from refusal_tokens.errors import InputError, nearest, one_message, unknown

RESPOND = "respond"
# The category of requests that must never be answered in training; see ``safeguards``.
HARMFUL = "safety"
RESPOND_TOKEN = "<|respond|>"
SINGLE_TOKEN = "<|refuse|>"
SINGLE_KNOB = "refuse"
MAX_CATEGORIES = 64
_ID = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Category:
    """One kind of request that may be declined.

    Attributes:
        id: short name, ``[a-z][a-z0-9_]{0,31}``; the knob and the column value.
        description: one sentence; its words start the token's embedding.
    """

    id: str
    description: str


@dataclass(frozen=True)
class Taxonomy:
    """The categories in order, with their control tokens.

    Attributes:
        categories: what rows are labelled with, 1 to 64 of them, ids unique.
        respond_description: starts the embedding of ``<|respond|>``.
        single_token: one ``<|refuse|>`` token for all categories (the paper's one-token form);
            the categories of rows are then kept for reporting only.
    """

    categories: tuple[Category, ...]
    respond_description: str
    single_token: bool = False

    def __post_init__(self) -> None:
        faults = _faults(self.categories)
        if faults:
            raise one_message(faults, "taxonomy")

    @cached_property
    def category_ids(self) -> tuple[str, ...]:
        """The ids that rows may carry, in order."""
        return tuple(category.id for category in self.categories)

    @cached_property
    def knobs(self) -> tuple[str, ...]:
        """The names that can be biased, one a refusal token, in order."""
        return (SINGLE_KNOB,) if self.single_token else self.category_ids

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The K+1 control tokens: ``<|respond|>`` first, then the refusal tokens in order."""
        if self.single_token:
            return (RESPOND_TOKEN, SINGLE_TOKEN)
        return (RESPOND_TOKEN, *(refusal_token(name, False) for name in self.category_ids))

    @cached_property
    def descriptions(self) -> tuple[str, ...]:
        """What each of the K+1 tokens stands for, in the order of ``tokens``."""
        refusals = [category.description for category in self.categories]
        return (
            self.respond_description,
            *([" ".join(refusals)] if self.single_token else refusals),
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 over categories, order and form: equal hashes mean interchangeable tokens."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def token_index(self, label: str, category: str | None) -> int:
        """Return the index, within ``tokens``, of the token that opens a row's reply.

        Raises:
            InputError: for an unknown label or category.
        """
        if label == RESPOND:
            return 0
        if label != "refuse":
            raise InputError(unknown("label", label, ["refuse", RESPOND]))
        if category not in self.category_ids:
            raise InputError(unknown("category", category, self.category_ids))
        return 1 if self.single_token else 1 + self.category_ids.index(category)

    def knob_index(self, knob: str) -> int:
        """Return the index of a knob within ``knobs``.

        Raises:
            InputError: naming the nearest knob.
        """
        if knob not in self.knobs:
            raise InputError(unknown("category", knob, self.knobs))
        return self.knobs.index(knob)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that checkpoints and profiles store."""
        return {
            "respond": {"token": RESPOND_TOKEN, "description": self.respond_description},
            "single_token": self.single_token,
            "categories": [
                {
                    "id": category.id,
                    "token": refusal_token(category.id, self.single_token),
                    "description": category.description,
                }
                for category in self.categories
            ],
        }


def _faults(categories: tuple[Category, ...]) -> list[str]:
    faults = []
    if not 1 <= len(categories) <= MAX_CATEGORIES:
        faults.append(f"{len(categories)} categories; allowed: 1 to {MAX_CATEGORIES}")
    seen: set[str] = set()
    for category in categories:
        if not _ID.fullmatch(category.id):
            faults.append(f"category id {category.id!r}; allowed: {_ID.pattern}")
        if category.id in (RESPOND, SINGLE_KNOB):
            faults.append(f"category id {category.id!r} is reserved")
        if category.id in seen:
            faults.append(f"category id {category.id!r} twice")
        if not category.description.strip():
            faults.append(f"category {category.id!r} has no description; one sentence is needed")
        seen.add(category.id)
    return faults


def taxonomy_from_dict(data: Any, where: str, single_token: bool | None = None) -> Taxonomy:
    """Build a taxonomy from YAML or JSON data.

    Args:
        data: a mapping with ``categories`` (a list of ``id`` and ``description``) and optionally
            ``respond`` (the description of ``<|respond|>``, or ``{token, description}``) and
            ``single_token``. A ``token``, if given, must be the one that the stated form makes.
        where: what to name in messages, usually the file.
        single_token: overrides the form stated in ``data``.

    Raises:
        InputError: listing every fault.
    """
    if not isinstance(data, Mapping):
        raise InputError(
            f"{where}: found {type(data).__name__}; allowed: a mapping with categories"
        )
    allowed = ("respond", "categories", "single_token")
    faults = [f"{where}: {unknown('key', key, allowed)}" for key in data if key not in allowed]
    entries = data.get("categories")
    if not isinstance(entries, list) or not entries:
        faults.append(f"{where}: categories must be a list of id and description")
        entries = []
    categories = []
    for number, entry in enumerate(entries, 1):
        found = _category_faults(entry, data.get("single_token") is True)
        faults += [f"{where}: category {number}{fault}" for fault in found]
        if not found:
            categories.append(Category(entry["id"], " ".join(entry["description"].split())))
    respond = data.get("respond", default_taxonomy_data()["respond"])
    if isinstance(respond, Mapping):
        faults += [f"{where}: respond{fault}" for fault in _token_faults(respond, RESPOND_TOKEN)]
        respond = respond.get("description")
    if not isinstance(respond, str) or not respond.strip():
        faults.append(f"{where}: respond must be a sentence that describes requests to answer")
    if not isinstance(data.get("single_token", False), bool):
        faults.append(f"{where}: single_token must be true or false")
    if faults:
        raise one_message(faults, where)
    single = bool(data.get("single_token", False)) if single_token is None else single_token
    try:
        return Taxonomy(tuple(categories), " ".join(str(respond).split()), single)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _category_faults(entry: Any, single_token: bool) -> list[str]:
    fields = ("id", "description", "token")
    if not isinstance(entry, Mapping) or not all(isinstance(v, str) for v in entry.values()):
        return [" must have a text id and description"]
    faults = [f": unknown key {key!r}{nearest(key, fields)}" for key in entry if key not in fields]
    if "id" not in entry or "description" not in entry:
        return [*faults, " needs both id and description"]
    return faults + _token_faults(entry, refusal_token(entry["id"], single_token))


def _token_faults(entry: Mapping[str, Any], token: str) -> list[str]:
    """Tokens are made from ids; a stored one is for readers, and must not say otherwise."""
    found = entry.get("token", token)
    return [] if found == token else [f": token {found!r}; allowed: {token}, or no token key"]


def refusal_token(category: str, single_token: bool) -> str:
    """Return the control token of a category.

    >>> refusal_token("safety", single_token=False)
    '<|refuse:safety|>'
    """
    return SINGLE_TOKEN if single_token else f"<|refuse:{category}|>"


def default_taxonomy_data() -> dict[str, Any]:
    """Return the default taxonomy as plain data."""
    text = resources.files("refusal_tokens").joinpath("default_taxonomy.yaml").read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def default_taxonomy(single_token: bool = False) -> Taxonomy:
    """Return CoCoNot's five categories (Brahman et al. 2024).

    >>> default_taxonomy().tokens[:2]
    ('<|respond|>', '<|refuse:safety|>')
    """
    return taxonomy_from_dict(default_taxonomy_data(), "default taxonomy", single_token)


def load_taxonomy(path: str | Path, single_token: bool | None = None) -> Taxonomy:
    """Read a user's taxonomy from a YAML file.

    Raises:
        InputError: if the file is missing, not YAML, or not a taxonomy.
    """
    from refusal_tokens.files import read_yaml

    return taxonomy_from_dict(read_yaml(path), str(path), single_token)
