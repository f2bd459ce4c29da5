"""Federations on one machine: public data, partitions, evaluation, audits and benchmarks."""
