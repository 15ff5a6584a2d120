"""The ids that tests without a model give to the control tokens."""

CONTROL_IDS = (100, 101, 102, 103, 104, 105)
