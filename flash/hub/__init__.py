"""The InferenceHub, its workers and the pools that start them."""
