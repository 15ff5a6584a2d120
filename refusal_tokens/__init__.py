"""Refusal tokens: train a model to open every reply with one, then dial refusal rates by category.

Importing this package imports neither torch nor transformers; import the modules you need, for
example ``from refusal_tokens.steering import SteeredModel``.
"""

__version__ = "0.1.0"
