"""The subcommands of ``refusal-tokens``, one module each; ``cli.py`` puts them together."""
