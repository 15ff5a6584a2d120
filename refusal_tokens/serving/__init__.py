"""Serving: the vLLM plugin, the middleware in front of it, and clients of other servers."""
