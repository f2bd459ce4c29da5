"""The interest model: encoders, temporal cores, heads, and the families by name.

Plain tensors in, plain tensors out: nothing here knows logs, privacy or Flower.
"""
