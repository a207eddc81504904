"""From candidates and banked scores to the score table: which rows, calibrated how, in what contract. No torch."""
