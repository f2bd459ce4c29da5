"""How fast things are; run by hand, each prints what it measured."""
