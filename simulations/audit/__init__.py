"""Checks of what a run says about privacy, by someone who believes neither the server nor a site."""
