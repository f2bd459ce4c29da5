"""A data site's agent: its logs, its ledger, its training. Only what the contract allows leaves it."""
