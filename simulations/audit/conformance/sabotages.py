"""Sabotages: a site's real code with one thing wrong in it, patched in this process for as long as a check is asked.

Each is a change that one could slip into a site's code, and that a run would not show. `sabotage.py` puts all of them
through the whole of `fedtide audit conformance`; `controls_training.py` puts each that training's checks can see to the
check that is meant to see it. The changes themselves stand in `sabotages_training.py`, `sabotages_answers.py` and
`sabotages_noise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import client.site
from simulations.audit.conformance.sabotages_answers import (
    clock_for_a_key,
    few_are_refused,
    metrics_fail,
    noised_again,
    norm_up_to_forty,
    released_otherwise,
    scaled_by_users,
    trained_together,
    users_in_lowest_bits,
    users_of_all_counted,
)
from simulations.audit.conformance.sabotages_noise import (
    cut_at_three,
    drawn_otherwise,
    four_uniforms,
    heavy_items_unscaled,
    in_float32,
    large_drawn_again,
    last_draw_turned,
    last_numbers_shuffled,
    long_histories_in_two,
    many_places_unscaled,
    ranked_as_they_come,
    second_half_negated,
)
from simulations.audit.conformance.sabotages_training import (
    Patched,
    breaks_off,
    draws_long_users_again,
    floored,
    handed_otherwise,
    in_the_last_step,
    largest_layer,
    later_doubled,
    later_units,
    long_users_twice,
    noised_by_step,
    norm_without_biases,
    read_times,
    sampled_otherwise,
    trained_by_hand,
    with_replacement,
    without,
)
from simulations.audit.trainers import Trainer


@dataclass(frozen=True)
class Sabotage:
    """One thing wrong.

    Attributes:
        name: of a few words.
        does: one line for the table.
        trainer: stands in for `train_round` wherever one is called; None: the real one.
        patched: changes the code around it, while it is open.
        mode: of the encoder, in which it does anything.
    """

    name: str
    does: str
    trainer: Trainer | None = None
    patched: Patched = nullcontext
    mode: str = "vectors"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The site's code with this wrong in it."""
        with ExitStack() as stack:
            if self.trainer is not None:
                stack.enter_context(patch.object(client.site, "train_round", self.trainer))
            stack.enter_context(self.patched())
            yield


def _named(*sabotages: Sabotage) -> Mapping[str, Sabotage]:
    return {each.name: each for each in sabotages}


SABOTAGES: Mapping[str, Sabotage] = _named(
    # what a user adds
    Sabotage("clip factor with a floor", "scales nobody by less than 1/50", trained_by_hand(floored)),
    Sabotage(
        "biases out of the norm", "clips by a norm without the biases", trained_by_hand(norm_without_biases)
    ),
    Sabotage(
        "later units clipped to 10 C", "clips to 10 C from the fourth unit on", trained_by_hand(later_units)
    ),
    Sabotage(
        "largest layer's norm", "clips by the norm of the largest layer", trained_by_hand(largest_layer)
    ),
    Sabotage(
        "adapters not clipped",
        "leaves LoRA out of the norm, and does not scale it",
        trained_by_hand(without("lora")),
        mode="lora",
    ),
    Sabotage("breaks off at inf", "ends a round where a gradient is not finite", trained_by_hand(breaks_off)),
    # a round's steps
    Sabotage(
        "long users in two rows",
        "takes users of more than 20 events twice",
        handed_otherwise(rows_of=long_users_twice),
    ),
    Sabotage(
        "long users drawn more often",
        "draws users of more than 20 events twice a step",
        draws_long_users_again,
    ),
    Sabotage(
        "all noise in the last step",
        "noises the last step alone, sqrt(steps) wide",
        handed_otherwise(noise_of=in_the_last_step),
    ),
    Sabotage(
        "a step in a hundred bare",
        "leaves the noise out of one step in a hundred",
        handed_otherwise(noise_of=noised_by_step(lambda step, normals: normals * (step % 100 != 99))),
    ),
    Sabotage(
        "later steps half noised",
        "halves the noise from the second step on",
        handed_otherwise(noise_of=noised_by_step(lambda step, normals: normals * (0.5 if step else 1.0))),
    ),
    Sabotage(
        "batches with replacement",
        "draws round(q n) users with replacement",
        handed_otherwise(sampler_of=sampled_otherwise(with_replacement)),
    ),
    Sabotage(
        "q doubled after step 200",
        "samples at 2 q from step 200 of a round on",
        handed_otherwise(sampler_of=sampled_otherwise(later_doubled)),
    ),
    # what is read of the plan
    Sabotage("C read doubled", "reads twice the plan's clip norm", patched=read_times(clip_norm=2.0)),
    Sabotage(
        "sigma read halved",
        "reads half the plan's noise multiplier",
        patched=read_times(noise_multiplier=0.5),
    ),
    Sabotage(
        "normaliser read halved",
        "divides sums by half the plan's constant",
        patched=read_times(normaliser=0.5),
    ),
    Sabotage(
        "learning rate read doubled", "takes steps twice as long", patched=read_times(learning_rate=2.0)
    ),
    Sabotage("q read doubled", "samples at twice the plan's rate", patched=read_times(sampling_rate=2.0)),
    # what is answered
    Sabotage(
        "update scaled by users",
        "multiplies the update by 1 + users / 10,000",
        patched=released_otherwise(scaled_by_users),
    ),
    Sabotage(
        "users in the lowest bits",
        "hides the number of users in the lowest bits of sixteen numbers",
        patched=released_otherwise(users_in_lowest_bits),
    ),
    Sabotage(
        "few users refused",
        "refuses, before any charge, with fewer users than agreed",
        patched=few_are_refused,
    ),
    Sabotage("retry noised again", "sends a second noising under the first receipt", patched=noised_again),
    Sabotage("metrics fail at inf", "fails where a user's scores are no numbers", patched=metrics_fail),
    Sabotage(
        "clock for a key",
        "makes the noise's key from the time in nanoseconds",
        patched=clock_for_a_key,
    ),
    # what the noise is like
    Sabotage(
        "second half negated",
        "makes the second half of each draw the first, negated",
        patched=drawn_otherwise(second_half_negated),
    ),
    Sabotage(
        "last draw turned",
        "gives every second draw the one before it, turned by one place",
        patched=last_draw_turned,
    ),
    Sabotage(
        "last draw shuffled",
        "makes a tenth of each draw of the last one's numbers, in another order and with other signs",
        patched=drawn_otherwise(last_numbers_shuffled()),
    ),
    Sabotage(
        "four uniforms",
        "draws sums of four uniforms: the right variance, nothing beyond 3.46 deviations",
        patched=drawn_otherwise(four_uniforms),
    ),
    Sabotage(
        "cut at three",
        "draws again what lies beyond three deviations, and puts the variance right",
        patched=drawn_otherwise(cut_at_three),
    ),
    Sabotage(
        "large draws again",
        "draws once more where a draw's norm is above the mean",
        patched=drawn_otherwise(large_drawn_again),
    ),
    Sabotage("noise in float32", "adds the noise in float32, off the grid", patched=in_float32),
    # sums
    Sabotage(
        "many places unscaled",
        "does not scale what users add to more than 60 places",
        patched=many_places_unscaled,
    ),
    Sabotage(
        "heavy items unscaled",
        "counts items that a user has more than five times as often, unscaled",
        patched=heavy_items_unscaled,
    ),
    Sabotage(
        "long histories in two",
        "takes the transitions of more than 500 events as two contributions",
        patched=long_histories_in_two,
    ),
    Sabotage(
        "ranked as they come",
        "ranks users in as many rows as there are, on kernels whose rounding follows the number of rows",
        patched=ranked_as_they_come,
    ),
    # sites that are trained together
    Sabotage(
        "together: norm up to 40 C",
        "caps the norm at 40 C in a batch of sites, so louder users are clipped too little",
        patched=trained_together(norm_up_to_forty),
    ),
    Sabotage(
        "together: users of all sites counted",
        "divides by a constant that grows with the users of all sites of a batch",
        patched=trained_together(settings_of=users_of_all_counted),
    ),
    Sabotage(
        "together: one noise",
        "gives all sites of a batch the same noise",
        patched=trained_together(one_noise=True),
    ),
)
