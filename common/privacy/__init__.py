"""Privacy that can be checked: mechanisms as events, accountants, the filter, noise, receipts.

Nothing here knows logs, models or Flower.
"""
