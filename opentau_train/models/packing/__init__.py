"""Packing: the tokens of a micro-batch laid end to end, without padding (`model.packing=true`)."""
