"""The coordinator: rounds, admission, aggregation and the run's folder. It never sees a log."""
