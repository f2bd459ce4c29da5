"""The table of results: every family, budget, layout and data set, cell by cell, and the page made of them."""
