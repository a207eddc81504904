"""Stage 0, if wanted: a cross-encoder of one's own, fine-tuned on a collection's judgements and mined candidates."""
