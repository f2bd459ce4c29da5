"""Behaviour logs: schema, readers by format, cleaning, catalog, histories. Knows neither models nor privacy."""
