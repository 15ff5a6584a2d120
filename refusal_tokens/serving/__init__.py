"""Serving: the decision rule inside and in front of inference servers."""
