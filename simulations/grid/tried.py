"""What was tried on validation data before the table's settings were fixed: it stands below the table."""

TRIED = """Tried on validation data before any test figure of this table was seen, one run each where noise was drawn:

- statistics (`recommend`'s scorer; all families share it): on each of the three benches 15 choices of items and gaps
  and up to 46 of thresholds, weights and decay, one draw of noise at epsilon 8. Nothing beat the defaults of
  `fedtide simulate` by more than draws differ, so all rows keep these. The form of the scorer came from an earlier
  laboratory that had seen test figures of both data sets' leave-one-out splits.
- DP-SGD alone: 11 (learning rate 2 to 60, clip norm 0.1, 0.3, 1, 15 or 30 steps) with `recommend` on
  MovieLens-100K, and the best one used for all families and both data sets: fewer than the statistics got.
- all phases: 2 learning rates of fine-tuning; pre-training: 1 setting.
- without privacy: 1 setting (AdamW 3e-3, at most 8 epochs, the best epoch on validation, the start included).
- gru4rec, sasrec: {sequential}
- popularity, content only, item transitions: none; item transitions use the statistics' form and weights.

`lstm-lm` reads 20 events and takes 6 steps, as each step runs a language model; it has one seed."""
