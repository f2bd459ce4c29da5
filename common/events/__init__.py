"""Behaviour logs: schema, readers, cleaning, catalog, histories. Knows neither models nor privacy."""
