"""The interest model: encoders, temporal cores, heads, and the families by name."""
